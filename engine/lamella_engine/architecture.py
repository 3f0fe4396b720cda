"""The model without its weights: a transformers module tree on the meta device, and where its decoder layers are.

Neighbours: `checkpoint` before it (config files), `family_path` and `state_size`, which it asks how the family is run,
`convert` and `sweep` after it (names and modules).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
)

from lamella_engine.alibi import slopes_of
from lamella_engine.errors import CheckpointError, UnsupportedModel
from lamella_engine.family_path import FamilyPath, check_decoder, check_layers, choose_path, reads_in_parts
from lamella_engine.importers.registry import find_import
from lamella_engine.narrow_copy import Tree
from lamella_engine.parts_probe import parts_agree
from lamella_engine.state_size import StateSize, rehearse

_ORIGINS = {"_name_or_path", "transformers_version", "architectures", "dtype"}
_MAX_KEPT = 16
_PROBED: dict[str, bool] = {}  # configs whose narrow copy has read in parts, with the outcome
_REHEARSED: dict[tuple[str, torch.dtype], StateSize] = {}
_Key = TypeVar("_Key")
_Found = TypeVar("_Found")


@dataclass(frozen=True)
class Architecture:
    """A causal language model on the meta device.

    Attributes:
        model: the whole module tree, all parameters and buffers on meta.
        config: the text model's config.
        layers_path: dotted path of the decoder's ModuleList, such as ``model.layers``.
        layers: that ModuleList.
        path: how its sequences are run.
        state_size: what a sequence keeps on the stepwise path; None on the packed one, where config values tell.
        reads_in_parts: a prompt may be read in several steps.
    """

    model: PreTrainedModel
    config: PretrainedConfig
    layers_path: str
    layers: nn.ModuleList
    path: FamilyPath = FamilyPath.PACKED
    state_size: StateSize | None = None
    reads_in_parts: bool = True

    @property
    def family(self) -> str:
        """The config's model type, such as ``llama``."""
        return str(self.model.config.model_type)


def load_config(config_dir: Path) -> PretrainedConfig:
    """Read ``config.json`` of `config_dir`; code from the model's repository is never run.

    Raises:
        CheckpointError: the file is missing or not a config.
        UnsupportedModel: transformers has no class of its own for the family.
    """
    if not (config_dir / "config.json").is_file():
        raise CheckpointError(f"{config_dir} has no config.json; give the directory of a transformers checkpoint")
    try:
        if (imported := find_import(config_dir)) is not None:
            return imported.config
        return AutoConfig.from_pretrained(config_dir, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, ArithmeticError, StrictDataclassError) as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UnsupportedModel(
            f"transformers cannot build this model from {config_dir / 'config.json'}: {first_line}. "
            "Families whose code lives in the model repository are not run."
        ) from error


def build(config: PretrainedConfig, dtype: torch.dtype) -> Architecture:
    """Build the module tree of `config` on the meta device (no memory for weights, no weight is read).

    Raises:
        UnsupportedModel: not a causal language model, or one whose layers cannot be streamed.
    """
    check_decoder(config)
    model, layers_path, layers = _text_tree(config, dtype)
    check_layers(model, layers_path, layers)
    path = choose_path(model, layers)
    built = Architecture(model, model.config.get_text_config(), layers_path, layers, path)
    slopes = slopes_of(built.config)
    if path is FamilyPath.PACKED:
        return built
    if slopes is not None:
        raise UnsupportedModel(
            f"{built.family!r} models compute their attention themselves, so that this one's linear position biases "
            "cannot be added; use another checkpoint of the model"
        )
    key = json.dumps(_of_behaviour(model.config.to_dict()), sort_keys=True, default=str)
    size = _once(_REHEARSED, (key, dtype), lambda: rehearse(model, layers))
    agrees = reads_in_parts(model) or _once(_PROBED, key, lambda: parts_agree(model, layers, _narrow_text_tree))
    return replace(built, state_size=size, reads_in_parts=agrees)


def _once(kept: dict[_Key, _Found], key: _Key, ask: Callable[[], _Found]) -> _Found:
    """What `ask` finds; asked once in a process for each key, since it takes seconds for some families."""
    if key not in kept:
        while len(kept) >= _MAX_KEPT:
            kept.pop(next(iter(kept)))
        kept[key] = ask()
    return kept[key]


def _text_tree(config: PretrainedConfig, dtype: torch.dtype) -> tuple[PreTrainedModel, str, nn.ModuleList]:
    """What writes text of the model of `config`, and where its layers are."""
    try:
        with torch.device("meta"):
            model = _module_tree(config, dtype)
    except (ValueError, AssertionError, ImportError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UnsupportedModel(
            f"{config.model_type!r} is not a causal language model that transformers can build ({reason}); "
            "use a text-generation checkpoint, such as one of llama, qwen3, mistral, gemma3 or gpt_oss"
        ) from error
    model.eval()
    # Halving activations and, in place, the weights behind them: a guard for half precision that streaming cannot keep.
    if getattr(model.config, "rescale_every", 0):
        model.config.rescale_every = 0
    _keep_in_float32(model, dtype)
    layers_path, layers = _find_layers(model)
    _keep_text(model, layers_path)
    return model, layers_path, layers


def _narrow_text_tree(config: PretrainedConfig) -> Tree:
    tree, _, own = _text_tree(config, torch.float32)
    return tree, own


def _of_behaviour(values: object) -> object:
    """Config values without those that say where a model comes from or in which type it is stored."""
    if not isinstance(values, dict):
        return values
    return {name: _of_behaviour(value) for name, value in values.items() if name not in _ORIGINS}


def _module_tree(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """A model that writes text; of those that also see, some are known by that alone."""
    sees = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    loader = AutoModelForCausalLM
    if sees and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        loader = AutoModelForImageTextToText
    model: PreTrainedModel = loader.from_config(config, dtype=dtype)
    return model


def _keep_text(model: PreTrainedModel, layers_path: str) -> None:
    """Leave out what a model that also sees or hears has beside its text model: a text passes none of it."""
    if model.config.get_text_config() is model.config:
        return
    steps = layers_path.split(".")[:-1]  # to the text model, which owns the layers
    head = model.get_output_embeddings()
    left_out = list(model._keys_to_ignore_on_load_unexpected or ())
    owner: nn.Module = model
    for step in steps:
        for name, child in list(owner.named_children()):
            if name != step and child is not head and any(True for _ in child.parameters()):
                setattr(owner, name, nn.Module())
                left_out.append(rf"(^|\.){name}\.")
        owner = owner.get_submodule(step)
    model._keys_to_ignore_on_load_unexpected = left_out


def _keep_in_float32(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Give the weights that transformers never loads in half precision (router biases, some norms) their own type."""
    parts = [part for part, kept in model._get_dtype_plan(dtype).items() if kept is torch.float32]
    pattern = re.compile(r"(^|\.)(" + "|".join(parts) + r")(\.|$)")
    if not parts:
        return
    for path, module in model.named_modules():
        for tensors in (module._parameters, module._buffers):
            for leaf, tensor in tensors.items():
                if tensor is not None and tensor.is_floating_point() and pattern.search(f"{path}.{leaf}"):
                    tensors[leaf] = _retyped(tensor)


def _retyped(tensor: torch.Tensor) -> torch.Tensor:
    made = tensor.detach().to(torch.float32)
    return nn.Parameter(made, requires_grad=False) if isinstance(tensor, nn.Parameter) else made


def sliding_windows(config: PretrainedConfig, num_layers: int) -> tuple[int | None, ...]:
    """Each layer's sliding window in tokens, or None where it sees everything, from the config's layer types."""
    # Attention layers are numbered as the config counts layers, which may be more than there are blocks.
    num_layers = max(num_layers, int(config.num_hidden_layers))
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * num_layers
    window = getattr(config, "sliding_window", None)
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def table_names(built: Architecture) -> tuple[str | None, str | None]:
    """Names of the embedding table's and the head's weight in the module tree; None where there is no such module."""
    paths = {id(module): path for path, module in built.model.named_modules()}

    def weight_of(module: nn.Module | None) -> str | None:
        return None if id(module) not in paths else f"{paths[id(module)]}.weight"

    return weight_of(built.model.get_input_embeddings()), weight_of(built.model.get_output_embeddings())


def _find_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    num_layers = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    if num_layers is None:
        raise UnsupportedModel(
            f"family {model.config.model_type!r} is not one row of layers (its config names no number of them); "
            "use a decoder-only family, such as llama, qwen3, mistral, gemma3 or gpt_oss"
        )
    kinds = set(getattr(model, "_no_split_modules", None) or ())
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    for name, module in lists:
        if len(module) == num_layers and type(module[0]).__name__ in kinds:
            return name, module
    for name, module in lists:
        if len(module) == num_layers:
            return name, module
    # Some families count a block with two attentions as two layers.
    for name, module in lists:
        if len(module) and {type(layer).__name__ for layer in module} <= kinds:
            return name, module
    raise UnsupportedModel(f"found no list of {num_layers} decoder layers in {type(model).__name__}")
