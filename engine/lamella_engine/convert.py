"""From the names and layouts of checkpoint files to those of the native module tree, one layer at a time.

Owns the plan: which source tensors make which native tensors, with exact shapes, known before anything is read. The
rules themselves (renaming, fusing experts, splitting projections) are transformers' own. Neighbours: `checkpoint` and
`gguf_checkpoint` supply conversions, `shard_builder` runs them shard by shard.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from lamella_engine.architecture import Architecture, table_names
from lamella_engine.errors import CheckpointError, UnsupportedModel
from lamella_engine.safetensors_header import TensorEntry
from lamella_engine.weight_source import Conversion, TensorShape

logger = logging.getLogger(__name__)

_FLOATS = frozenset({"float64", "float32", "float16", "bfloat16"})
_COMPUTED = re.compile(r"rotary_emb\.inv_freq|(^|\.)position_ids$")
_STORED = _FLOATS | {"int64", "int32", "int16", "int8", "uint8", "bool"}


@dataclass(frozen=True)
class ShardPlan:
    """The conversions of one shard; `prefix` is cut off the native names (empty for the root)."""

    prefix: str
    conversions: tuple[Conversion, ...]

    @property
    def tensors(self) -> tuple[TensorShape, ...]:
        """What the shard will hold, under names relative to the layer."""
        return tuple(
            replace(target, name=target.name.removeprefix(self.prefix))
            for conversion in self.conversions
            for target in conversion.targets
        )


@dataclass(frozen=True)
class ModelPlan:
    """Everything that has to be converted: the root and one shard per layer.

    `is_untied` says that the checkpoint stores a head of its own, though the config ties it to the embedding. `tied`
    has, by the name that a table is stored under, the other name that it goes by.
    """

    root: ShardPlan
    layers: tuple[ShardPlan, ...]
    is_untied: bool
    tied: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Group:
    """Source tensors (name, pattern that matched) which one converter makes into `target` and its siblings."""

    target: str
    converter: WeightConverter
    sources: list[tuple[str, str]]

    def run(self, built: Architecture, read: Callable[[str], torch.Tensor]) -> dict[str, torch.Tensor]:
        converter = copy.deepcopy(self.converter)
        for source, pattern in self.sources:
            converter.add_tensor(self.target, source, pattern, _deferred(source, read))
        results = converter.convert(self.target, model=built.model, config=built.model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in results.items()}

    def conversion(
        self, built: Architecture, tensors: Mapping[str, TensorEntry], read: Callable[[str], torch.Tensor]
    ) -> Conversion:
        names = tuple(source for source, _ in self.sources)
        try:
            rehearsed = self.run(built, lambda source: _on_meta(tensors[source]))
        except (RuntimeError, ValueError, IndexError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''} do not make up {self.target!r}: {error}. "
                "config.json and the weights do not belong together, or weights are missing; fetch them again."
            ) from error
        targets = tuple(
            TensorShape(name, str(value.dtype).removeprefix("torch."), tuple(value.shape))
            for name, value in rehearsed.items()
        )
        return Conversion(targets, names, lambda: self.run(built, read))


def hub_conversions(
    built: Architecture, tensors: Mapping[str, TensorEntry], read: Callable[[str], torch.Tensor]
) -> list[Conversion]:
    """Conversions from a hub checkpoint's tensors; `read` is called only when a conversion runs.

    Shapes come from a rehearsal on the meta device, so they are exact and cost no memory.

    Raises:
        CheckpointError: the tensors do not fit together as the family's rules need.
    """
    model = built.model
    mapping = get_model_conversion_mapping(model)
    renamings = [rule for rule in mapping if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in mapping if isinstance(rule, WeightConverter)]
    native = model.state_dict()
    simple: list[Conversion] = []
    groups: dict[str, _Group] = {}
    for source in sorted(tensors, key=dot_natural_key):
        target, pattern = rename_source_key(source, renamings, converters, model.base_model_prefix, native)
        if target not in native and source in native:
            target, pattern = source, None
        if pattern is None or target not in native:
            shape = TensorShape(target, tensors[source].dtype, tensors[source].shape)
            simple.append(Conversion((shape,), (source,), _renamed(target, source, read), is_copy=True))
        else:
            converter = next(rule for rule in converters if pattern in rule.source_patterns)
            groups.setdefault(target, _Group(target, converter, [])).sources.append((source, pattern))
    return simple + [group.conversion(built, tensors, read) for group in groups.values()]


def native_conversions(built: Architecture) -> list[Conversion]:
    """What a checkpoint that stores the module tree as it is would hold, in the tree's own dtype: shapes only."""
    return [
        Conversion(
            (TensorShape(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)),),
            (name,),
            partial(dict, ((name, tensor),)),
        )
        for name, tensor in built.model.state_dict().items()
        if name not in built.model.all_tied_weights_keys
    ]


def plan(built: Architecture, conversions: list[Conversion], dtype: str | None) -> ModelPlan:
    """Sort `conversions` into shards, after checking that they make exactly what the model needs.

    Args:
        built: the model without weights.
        conversions: from a checkpoint; those of tensors that the model does not have are left out, with a log line.
        dtype: torch dtype name to store floating-point weights in; None keeps each tensor's own.

    Raises:
        CheckpointError: weights are missing, of the wrong shape, or there twice.
        UnsupportedModel: weights of a type that is not stored.
    """
    native: dict[str, torch.Tensor] = built.model.state_dict()
    wanted = _of_the_model(built, conversions, native)
    wanted, is_untied = _store_tied_once(built, wanted)
    _check_complete(built, wanted, native)
    wanted = [_cast(conversion, dtype) for conversion in wanted]
    return _by_shard(built, wanted, is_untied)


def left_out(built: Architecture, conversions: list[Conversion]) -> list[str]:
    """Source tensors that no shard will hold, less tables that are computed anyway."""
    native = built.model.state_dict()
    extra = [name for item in conversions if not _is_of_the_model(item, native) for name in item.sources]
    return [name for name in extra if not _COMPUTED.search(name)]


def _of_the_model(
    built: Architecture, conversions: list[Conversion], native: Mapping[str, torch.Tensor]
) -> list[Conversion]:
    patterns = getattr(built.model, "_keys_to_ignore_on_load_unexpected", None) or ()
    expected = re.compile("|".join(patterns) or r"(?!)")  # without patterns: matches nothing
    surprising = [name for name in left_out(built, conversions) if not expected.search(name)]
    if surprising:
        logger.warning(
            "%d tensors of the checkpoint are not part of a %s model and are left out, such as %s",
            len(surprising),
            built.family,
            ", ".join(surprising[:3]),
        )
    return [item for item in conversions if _is_of_the_model(item, native)]


def _is_of_the_model(conversion: Conversion, native: Mapping[str, torch.Tensor]) -> bool:
    return any(target.name in native for target in conversion.targets)


def _store_tied_once(built: Architecture, conversions: list[Conversion]) -> tuple[list[Conversion], bool]:
    """Leave out what is tied to another tensor, and say whether a stored twin differs and has to stay."""
    by_target = {target.name: item for item in conversions for target in item.targets}
    is_untied = False
    tied: dict[str, str] = built.model.all_tied_weights_keys
    for target, source in tied.items():
        if target not in by_target:
            continue
        if source not in by_target:
            by_target[source] = _as(by_target[target], target, source)
        elif not _are_equal(by_target[target], target, by_target[source], source):
            logger.warning(
                "%s and %s are tied in the config but stored with different values: both are kept", target, source
            )
            is_untied = True
            continue
        del by_target[target]
    return list(dict.fromkeys(by_target.values())), is_untied


def _as(conversion: Conversion, old: str, new: str) -> Conversion:
    targets = tuple(replace(target, name=new) if target.name == old else target for target in conversion.targets)

    def run() -> dict[str, torch.Tensor]:
        return {new if name == old else name: value for name, value in conversion.run().items()}

    return Conversion(targets, conversion.sources, run, conversion.is_copy)


def _are_equal(left: Conversion, left_name: str, right: Conversion, right_name: str) -> bool:
    """Compare two stored tensors through digests, so that only one of them is in memory at a time."""
    shapes = [
        (target.dtype, target.shape)
        for item, name in ((left, left_name), (right, right_name))
        for target in item.targets
        if target.name == name
    ]
    return shapes[0] == shapes[1] and _digest(left, left_name) == _digest(right, right_name)


def _digest(conversion: Conversion, name: str) -> bytes:
    data = conversion.run()[name].contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(data.numpy()).digest()  # type: ignore[arg-type] # numpy arrays are buffers


def _check_complete(built: Architecture, conversions: list[Conversion], native: Mapping[str, torch.Tensor]) -> None:
    made: dict[str, TensorShape] = {}
    for conversion in conversions:
        for target in conversion.targets:
            if target.name in made:
                raise CheckpointError(f"the checkpoint holds {target.name!r} twice, under different names")
            made[target.name] = target
    tied: dict[str, str] = built.model.all_tied_weights_keys
    missing = sorted((name for name in native if name not in made and tied.get(name) not in made), key=dot_natural_key)
    if missing:
        raise CheckpointError(
            f"the checkpoint lacks {len(missing)} of the {len(native)} weights of this {built.family} model: "
            f"{', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}. Its files are incomplete, or config.json "
            "belongs to another model; fetch them again."
        )
    for name, target in made.items():
        if name not in native or target.shape != tuple(native[name].shape):
            expected = list(native[name].shape) if name in native else "no such tensor"
            raise CheckpointError(
                f"tensor {name!r} has shape {list(target.shape)} in the checkpoint, the model of its config.json has "
                f"{expected}; they do not belong together"
            )
        if target.dtype not in _STORED:
            raise UnsupportedModel(
                f"tensor {name!r} is stored as {target.dtype}, which is not read yet; use an unquantised checkpoint"
            )


def _cast(conversion: Conversion, dtype: str | None) -> Conversion:
    if dtype is None or all(target.dtype in (dtype, *(_STORED - _FLOATS)) for target in conversion.targets):
        return conversion
    targets = tuple(
        replace(target, dtype=dtype) if target.dtype in _FLOATS else target for target in conversion.targets
    )
    torch_dtype: torch.dtype = getattr(torch, dtype)

    def run() -> dict[str, torch.Tensor]:
        return {
            name: value.to(torch_dtype) if value.is_floating_point() else value
            for name, value in conversion.run().items()
        }

    return Conversion(targets, conversion.sources, run)


def _by_shard(built: Architecture, conversions: list[Conversion], is_untied: bool) -> ModelPlan:
    in_layer = re.compile(re.escape(built.layers_path) + r"\.(\d+)\.")
    shards: dict[int | None, list[Conversion]] = defaultdict(list)
    for conversion in conversions:
        places = {int(match[1]) if (match := in_layer.match(t.name)) else None for t in conversion.targets}
        if len(places) != 1:
            names = ", ".join(target.name for target in conversion.targets[:3])
            raise UnsupportedModel(f"one stored tensor makes parts of several layers ({names}), which cannot be split")
        shards[places.pop()].append(conversion)
    layers = tuple(
        ShardPlan(f"{built.layers_path}.{index}.", tuple(shards[index])) for index in range(len(built.layers))
    )
    root = ShardPlan("", tuple(shards[None]))
    return ModelPlan(root, layers, is_untied, _other_names(built, {tensor.name for tensor in root.tensors}))


def _other_names(built: Architecture, stored: set[str]) -> dict[str, str]:
    """By the name that the head or the embedding is stored under, that of the other where they are one tensor."""
    names = table_names(built)
    embedding, head = names
    tied: dict[str, str] = built.model.all_tied_weights_keys
    if embedding is None or head is None or len(stored.intersection(names)) != 1:
        return {}
    if tied.get(head) != embedding and tied.get(embedding) != head:
        return {}
    return {embedding: head} if embedding in stored else {head: embedding}


def _on_meta(entry: TensorEntry) -> torch.Tensor:
    return torch.empty(entry.shape, dtype=getattr(torch, entry.dtype), device="meta")


def _deferred(source: str, read: Callable[[str], torch.Tensor]) -> Callable[[], torch.Tensor]:
    return lambda: read(source)


def _renamed(target: str, source: str, read: Callable[[str], torch.Tensor]) -> Callable[[], dict[str, torch.Tensor]]:
    return lambda: {target: read(source)}
