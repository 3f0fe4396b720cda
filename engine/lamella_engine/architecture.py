"""The model without its weights: a transformers module tree on the meta device, and where its decoder layers are.

Owns the decision whether a family can run in the packed sweep. Neighbours: `checkpoint` before it (config files),
`convert` and `sweep` after it (names and modules).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from inspect import signature
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from lamella_engine.errors import CheckpointError, UnsupportedModel


@dataclass(frozen=True)
class Architecture:
    """A causal language model on the meta device.

    Attributes:
        model: the whole module tree, all parameters and buffers on meta.
        config: the text model's config.
        layers_path: dotted path of the decoder's ModuleList, such as ``model.layers``.
        layers: that ModuleList.
    """

    model: PreTrainedModel
    config: PretrainedConfig
    layers_path: str
    layers: nn.ModuleList

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
        UnsupportedModel: not a causal language model, or its attention cannot be packed.
    """
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except ValueError as error:
        raise UnsupportedModel(
            f"{config.model_type!r} is not a causal language model that transformers can build; "
            "use a text-generation checkpoint"
        ) from error
    model.eval()
    _keep_in_float32(model, dtype)
    _check_packable(model)
    path, layers = _find_layers(model)
    return Architecture(model, model.config.get_text_config(), path, layers)


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
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * num_layers
    window = getattr(config, "sliding_window", None)
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def table_names(built: Architecture) -> tuple[str | None, str | None]:
    """Names of the embedding table's and the head's weight in the module tree; None where there is no such module."""
    paths = {id(module): path for path, module in built.model.named_modules()}

    def weight_of(module: nn.Module | None) -> str | None:
        return None if id(module) not in paths else f"{paths[id(module)]}.weight"

    return weight_of(built.model.get_input_embeddings()), weight_of(built.model.get_output_embeddings())


def _check_packable(model: PreTrainedModel) -> None:
    family = model.config.model_type
    if getattr(model, "_is_stateful", False):
        raise UnsupportedModel(
            f"family {family!r} keeps a recurrent state per sequence, which the packed sweep does not carry yet; "
            "use a model whose layers are all attention, such as llama, qwen3, mistral, gemma3 or gpt_oss"
        )
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
    if unknown := kinds - {"full_attention", "sliding_attention"}:
        raise UnsupportedModel(
            f"family {family!r} has layers of kind {', '.join(sorted(unknown))}, which the packed sweep cannot run; "
            "use a model whose layers are full or sliding-window attention"
        )
    if "position_ids" not in signature(model.forward).parameters:
        raise UnsupportedModel(
            f"family {family!r} takes no position ids, which the packed sweep needs; "
            "use a family that does, such as llama, qwen3, mistral, gemma3 or gpt_oss"
        )
    if not getattr(model, "_supports_attention_backend", False):
        raise UnsupportedModel(
            f"family {family!r} does not let its attention be replaced, which the packed sweep needs; "
            "use a family that does, such as llama, qwen3, mistral, gemma3 or gpt_oss"
        )


def _find_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    num_layers = model.config.get_text_config().num_hidden_layers
    kinds = set(getattr(model, "_no_split_modules", None) or ())
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    for name, module in lists:
        if len(module) == num_layers and type(module[0]).__name__ in kinds:
            return name, module
    for name, module in lists:
        if len(module) == num_layers:
            return name, module
    raise UnsupportedModel(f"found no list of {num_layers} decoder layers in {type(model).__name__}")
