"""Which format a quantised checkpoint has, told by its config; what is not known is refused with the reason.

Neighbours: `checkpoint` asks with the config and the headers, `model_source` with the config alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from transformers import PretrainedConfig

from lamella_engine.dequantise import awq, bitsandbytes, compressed_tensors, float8, gptq, mxfp4, settings
from lamella_engine.dequantise.expansion import Expansion, PackedWeights
from lamella_engine.dequantise.settings import Settings
from lamella_engine.errors import CheckpointError
from lamella_engine.json_file import JsonFile

CONFIG_KEYS = ("quantization_config", "compression_config")
# Where the tools that made the format wrote its settings before they were part of the config.
_OWN_FILES = (("quantize_config.json", "gptq"), ("quant_config.json", "awq"))

_EXPANDED_TO = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class _Method:
    """A format: `describe` checks settings, `expand` checks headers too."""

    describe: Callable[[Settings], str]
    expand: Callable[[PackedWeights], Expansion]


_METHODS: Mapping[str, _Method] = MappingProxyType(
    {
        "awq": _Method(awq.describe, awq.expand),
        "bitsandbytes": _Method(bitsandbytes.describe, bitsandbytes.expand),
        "compressed-tensors": _Method(compressed_tensors.describe, compressed_tensors.expand),
        "fbgemm_fp8": _Method(float8.describe_fbgemm, float8.expand_fbgemm),
        "fp8": _Method(float8.describe_fp8, float8.expand_fp8),
        "gptq": _Method(gptq.describe, gptq.expand),
        "modelopt": _Method(float8.describe_modelopt, float8.expand_modelopt),
        "mxfp4": _Method(mxfp4.describe, mxfp4.expand),
    }
)


def find_settings(config: PretrainedConfig, directory: Path) -> Settings | None:
    """The quantisation settings of the config, or of the older files beside it in `directory`; None if unquantised.

    Raises:
        CheckpointError: they cannot be read.
    """
    for owner in _owners(config):
        for key in CONFIG_KEYS:
            found = getattr(owner, key, None)
            if found is not None:
                return _as_settings(found)
    for file, method in _OWN_FILES:
        if (directory / file).is_file():
            return {"quant_method": method, **JsonFile(directory / file).values}
    return None


def forget_settings(config: PretrainedConfig) -> None:
    """Make `config` that of an unquantised model."""
    for owner in _owners(config):
        for key in CONFIG_KEYS:
            with contextlib.suppress(AttributeError):
                delattr(owner, key)


def expanded_dtype(config: PretrainedConfig) -> torch.dtype:
    """What packed tensors expand to: the type that the config names; bfloat16 if it names none of use."""
    for owner in reversed(_owners(config)):
        named = str(getattr(owner, "dtype", None)).removeprefix("torch.")
        for dtype in _EXPANDED_TO:
            if str(dtype) == f"torch.{named}":
                return dtype
    return torch.bfloat16


def check_settings(found: Settings) -> str:
    """Check what can be told without the weights; return the format in words.

    Raises:
        UnsupportedModel: a method or a setting that is not read.
    """
    return _method(found).describe(found)


def open_expansion(packed: PackedWeights) -> Expansion:
    """Plan the expansion of every packed tensor; weights are not read.

    Raises:
        UnsupportedModel: a method or a setting that is not read.
        CheckpointError: tensors are missing or do not fit their settings.
    """
    return _method(packed.settings).expand(packed)


def _method(found: Settings) -> _Method:
    name = settings.text(found, "quant_method").replace("_", "-") if found.get("quant_method") else _guessed(found)
    name = {"fbgemm-fp8": "fbgemm_fp8"}.get(name, name)
    if name not in _METHODS:
        raise settings.refused(f"it is quantised with {name!r}; read are {', '.join(_METHODS)}")
    return _METHODS[name]


def _guessed(found: Settings) -> str:
    """Early bitsandbytes checkpoints do not name their method."""
    is_bitsandbytes = settings.flag(found, "load_in_4bit") or settings.flag(found, "load_in_8bit")
    return "bitsandbytes" if is_bitsandbytes else "a method that it does not name"


def _owners(config: PretrainedConfig) -> tuple[PretrainedConfig, ...]:
    """The config and, where it is another one, that of its text model."""
    text = config.get_text_config(decoder=True)
    return (config,) if text is config else (config, text)


def _as_settings(found: object) -> Settings:
    if isinstance(found, Mapping):
        return found
    as_object = getattr(found, "to_dict", None)
    values = as_object() if callable(as_object) else None
    if not isinstance(values, Mapping):
        raise CheckpointError(f"quantization_config of config.json is {found!r}, not an object; fetch it again")
    return values
