"""Small copies of a family's module tree with weights of their own, to be computed with where only behaviour matters.

Owns how a config is made narrow: widths and counts are divided, what is inside one head stays, of the layers a few of
each kind remain. The copy must have the same modules in the same places, else there is none. `parts_probe` computes
with copies; `architecture` builds their trees as it builds all others.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from lamella_engine.rehearsal import kinds_of
from lamella_engine.sequence_state import SequenceState, StateForward

Tree = tuple[PreTrainedModel, nn.ModuleList]
BuildTree = Callable[[PretrainedConfig], Tree]

# What building and running code of a family raises that gets values it was not made for.
NOT_MADE_FOR = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError)

SHORT_TOKENS = 8  # a window, block or choice of tokens in a copy that is to meet its end
VOCABULARY = 256
MAX_LAYERS = 24
MAX_BYTES = 64 * 1024**2
_MAX_EXPERTS = 32
_NARROWEST = 64  # numbers of a hidden row
_MAX_DIVISOR = 128
_STRENGTH = 1.5  # of a product's result by its input: what comes far before a token can be seen behind it

# Config values that widths or counts are made of; all are divided by one number, which keeps their relations.
_DIVIDED = re.compile(
    r"^(hidden_size|d_model|n_embd|embedding_dim|\w*intermediate_size|\w+_hidden_size|ffn_dim|n_inner|ffn_hidden_size"
    r"|\w*embed\w*_dim|lru_width|mamba_d_ssm|n_head|(\w+_)?(num|n)_(\w+_)?(heads|groups))$"
)
_EXPERTS = re.compile(r"(num|n)_(\w+_)?experts$")
# Those that are about a text's length or a token's number, not about how tokens are treated.
_KEPT = re.compile(r"token_id|position|max_length|seq_?len|context_length|ctx|label|layer|seed|vocab|per_tok")
# Those that certainly count the tokens that a token looks at together.
_SPAN = re.compile(r"window|chunk|block_size|topk$|budget")


def narrow_config(config: PretrainedConfig, divisor: int, num_layers: int) -> PretrainedConfig:
    """`config` with widths and counts divided by `divisor`, and its first `num_layers` layers."""
    narrow = copy.deepcopy(config)
    text = narrow.get_text_config(decoder=True)
    depth = int(text.num_hidden_layers)
    for name, value in list(vars(text).items()):
        if name.endswith("token_id"):
            setattr(text, name, None)
        elif isinstance(value, list) and len(value) == depth:
            setattr(text, name, value[:num_layers])
        elif _is_number(value) and _DIVIDED.match(name):
            setattr(text, name, max(1, value // divisor))
        elif _is_number(value) and _EXPERTS.search(name):
            setattr(text, name, min(value, _MAX_EXPERTS))  # of which some groups or a fixed number are chosen
    if text.num_hidden_layers != num_layers:
        text.num_hidden_layers = num_layers
    text.vocab_size = min(text.vocab_size, VOCABULARY)
    return narrow


def narrow_tree(model: PreTrainedModel, layers: nn.ModuleList, build: BuildTree) -> Tree | None:
    """A copy of `model` on the meta device, as narrow as can be built; None if no narrow one has the same modules.

    Args:
        model: on the meta device, with `layers` its decoder's.
        build: makes the module tree of a config on the meta device.
    """
    num_layers = _layers_of_every_kind(model, layers)
    if num_layers > MAX_LAYERS:
        return None
    hidden = int(model.config.get_text_config(decoder=True).hidden_size)
    divisor = _MAX_DIVISOR
    while divisor >= 1:
        if hidden >= divisor * _NARROWEST or divisor == 1:
            tree = _build_like(narrow_config(model.config, divisor, num_layers), layers, build)
            if tree is not None:
                return tree
        divisor //= 2
    return None


def shortened(tree: Tree, build: BuildTree) -> Tree | None:
    """A copy of the copy whose windows and blocks end after a few tokens; None if there is one that cannot.

    Those are the whole numbers of the config that say so by name or that no weight's shape depends on, as far as the
    copy runs with them changed.
    """
    model, layers = tree
    short = copy.deepcopy(model.config)
    for name, value in _own_numbers(model.config):
        if value <= SHORT_TOKENS or _KEPT.search(name) or _DIVIDED.match(name):
            continue
        changed = copy.deepcopy(model.config)
        setattr(changed.get_text_config(decoder=True), name, SHORT_TOKENS)
        built = _build_like(changed, layers, build)
        is_span = bool(_SPAN.search(name))
        if built is not None and (is_span or _shapes(built[0]) == _shapes(model)) and _runs(built[0]):
            setattr(short.get_text_config(decoder=True), name, SHORT_TOKENS)
        elif is_span:
            return None
    if short.to_dict() == model.config.to_dict():
        return tree
    return _build_like(short, layers, build)


def give_weights(model: PreTrainedModel, seed: int) -> None:
    """Give `model`, on the meta device or not, random weights on the CPU, such that far tokens show in near ones."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model.to_empty(device="cpu")
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.zero_()
            tensor._is_hf_initialized = False
        for module in model.modules():
            module._is_hf_initialized = False
        model.initialize_weights()
        for name, weight in model.named_parameters():
            if weight.dim() < 2 or "A_log" in name:
                weight.add_(0.05 * torch.randn_like(weight))
            else:
                weight.normal_(std=_STRENGTH * weight.shape[-1] ** -0.5)
        model.tie_weights()


def _build_like(config: PretrainedConfig, layers: nn.ModuleList, build: BuildTree) -> Tree | None:
    """The tree of `config`, if its layers have the modules that the first of `layers` have and it is small."""
    try:
        model, own = build(config)
    except NOT_MADE_FOR:
        return None
    if sum(weight.numel() for weight in model.parameters()) * 4 > MAX_BYTES:
        return None
    return (model, own) if all(map(_is_like, own, layers)) else None


def _runs(model: PreTrainedModel) -> bool:
    """Whether `model`, on the meta device, gets through a step, with weights that are all 0."""
    model.to_empty(device="cpu")
    with torch.inference_mode():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.zero_()
        try:
            StateForward(model, torch.device("cpu"))(SequenceState(), [0] * 3 * SHORT_TOKENS)
        except NOT_MADE_FOR:
            return False
        finally:
            model.to("meta")
    return True


def _is_like(layer: nn.Module, other: nn.Module) -> bool:
    return _outline(layer) == _outline(other)


def _outline(layer: nn.Module) -> list[tuple[str, type]]:
    """A layer's modules, but for those of a list, of which there may be fewer."""
    return [
        (path, type(module))
        for path, module in layer.named_modules()
        if not any(step.isdigit() for step in path.split("."))
    ]


def _layers_of_every_kind(model: PreTrainedModel, layers: nn.ModuleList) -> int:
    kinds = kinds_of(model, list(layers))
    return max(kinds.index(kind) for kind in set(kinds)) + 1


def _own_numbers(config: PretrainedConfig) -> Iterator[tuple[str, int]]:
    for name, value in vars(config.get_text_config(decoder=True)).items():
        if _is_number(value):
            yield name, value


def _is_number(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    return {name: tuple(weight.shape) for name, weight in model.named_parameters()}
