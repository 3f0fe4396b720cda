"""Which checkpoints are imported: the families that transformers has no class for, found by their config alone.

Owns the table of families. Neighbours: `architecture` asks it first for every config, `checkpoint` for the rules.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from transformers import CONFIG_MAPPING

from lamella_engine.importers.baichuan import import_baichuan
from lamella_engine.importers.chatglm import import_chatglm
from lamella_engine.importers.imported import ImportedModel, refuse
from lamella_engine.importers.internlm import import_internlm
from lamella_engine.importers.internlm2 import import_internlm2
from lamella_engine.importers.qwen import import_qwen
from lamella_engine.json_file import JsonFile


@dataclass(frozen=True)
class _Family:
    """A foreign family: its name, the classes that generate text, and its adapter."""

    title: str
    classes: tuple[str, ...]
    adapt: Callable[[JsonFile], ImportedModel]


_FAMILIES = {
    "qwen": _Family("QWen v1", ("QWenLMHeadModel",), import_qwen),
    "chatglm": _Family(
        "ChatGLM", ("ChatGLMModel", "ChatGLMForConditionalGeneration", "ChatGLMForCausalLM"), import_chatglm
    ),
    "baichuan": _Family("Baichuan", ("BaichuanForCausalLM", "BaiChuanForCausalLM"), import_baichuan),
    "internlm": _Family("InternLM v1", ("InternLMForCausalLM",), import_internlm),
    "internlm2": _Family("InternLM2", ("InternLM2ForCausalLM",), import_internlm2),
}


def find_import(directory: Path) -> ImportedModel | None:
    """How the checkpoint in `directory` is imported; None if it is no checkpoint of a foreign family.

    Only JSON files are read.

    Raises:
        CheckpointError: its config is damaged.
        UnsupportedModel: its family is known, and this variant cannot run.
    """
    config = JsonFile(directory / "config.json")
    family = _family(config)
    if family is None:
        return None
    named = [name for name in _classes(config) if name not in family.classes]
    if named:
        raise refuse(
            config,
            family.title,
            f"its class is {named[0]}, which does not generate text",
            f"Use a checkpoint of {family.classes[0]}.",
        )
    return family.adapt(config)


def _family(config: JsonFile) -> _Family | None:
    """By model type; a config without one, by its class."""
    model_type = config.values.get("model_type")
    if isinstance(model_type, str) and model_type:
        return _FAMILIES.get(model_type) if model_type not in CONFIG_MAPPING else None
    named = set(_classes(config))
    return next((family for family in _FAMILIES.values() if named & set(family.classes)), None)


def _classes(config: JsonFile) -> list[str]:
    """The classes of ``architectures``, else the ones that ``auto_map`` loads for generation."""
    named = config.values.get("architectures")
    if isinstance(named, list) and named:
        return [name for name in named if isinstance(name, str)]
    mapped = config.values.get("auto_map")
    loaders = mapped if isinstance(mapped, dict) else {}
    found = loaders.get("AutoModelForCausalLM") or loaders.get("AutoModel")
    return [found.rpartition(".")[2]] if isinstance(found, str) else []
