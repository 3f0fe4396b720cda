"""From the hub's tensor names to those of transformers' module tree, one decoder layer at a time.

Checkpoints on the hub keep experts apart and use older names; the native classes fuse and rename. transformers knows
how (`get_model_conversion_mapping`); here its converters are fed lazily, so that one layer is in memory at a time.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from lamella_engine.architecture import Architecture
from lamella_engine.checkpoint import ROOT_GROUP, GroupSource, SafetensorsCheckpoint
from lamella_engine.errors import CheckpointError

logger = logging.getLogger(__name__)


@dataclass
class _Recipe:
    """How the tensors of one group are made: copied from a source name, or converted from several."""

    copied: dict[str, str] = field(default_factory=dict)  # native name -> source name
    converted: dict[str, list[tuple[str, str]]] = field(default_factory=dict)  # target -> (source name, pattern)


class HubGroup:
    """The tensors of one group of a safetensors checkpoint; see `checkpoint.GroupSource`."""

    def __init__(
        self,
        source: SafetensorsCheckpoint,
        built: Architecture,
        names: GroupNames,
        recipe: _Recipe,
        converters: list[WeightConverter],
    ) -> None:
        self._source = source
        self._built = built
        self._names = names
        self._recipe = recipe
        self._converters = converters

    def expected(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """See `GroupSource`."""
        return {
            short: (self._dtype(full, tensor), tuple(tensor.shape))
            for short, (full, tensor) in self._names.tensors.items()
        }

    def load(self) -> dict[str, torch.Tensor]:
        """See `GroupSource`."""
        found = {native: self._source.tensor(name) for native, name in self._recipe.copied.items()}
        for target, sources in self._recipe.converted.items():
            found |= self._convert(target, sources)
        return self._names.collect(found, {name: self._dtype(name, t) for _, (name, t) in self._names.tensors.items()})

    def _dtype(self, full: str, tensor: torch.Tensor) -> str:
        """Stored type of a tensor: as asked for, else as it is in the source."""
        if self._names.dtype is not None and tensor.is_floating_point():
            return str(tensor.dtype).removeprefix("torch.")
        sources = [self._recipe.copied[full]] if full in self._recipe.copied else []
        for listed in self._recipe.converted.values():
            sources += [name for name, _ in listed]
        return self._source.entry(sources[0]).dtype if sources else str(tensor.dtype).removeprefix("torch.")

    def _convert(self, target: str, sources: list[tuple[str, str]]) -> dict[str, torch.Tensor]:
        pattern = sources[0][1]
        converter = copy.deepcopy(next(c for c in self._converters if pattern in c.source_patterns))
        for name, source_pattern in sources:
            converter.add_tensor(target, name, source_pattern, lambda name=name: self._source.tensor(name))
        try:
            made = converter.convert(target, model=self._built.model, config=self._built.model.config)
        except (RuntimeError, ValueError, KeyError, IndexError, TypeError) as error:
            raise CheckpointError(f"the tensors for {target!r} do not fit together: {error}") from error
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


class GroupNames:
    """The native tensors that one group must have.

    Attributes:
        tensors: name within the group -> full native name and meta tensor (shape, compute type).
        dtype: type to store floating-point tensors in, or None for the source's.
    """

    def __init__(self, tensors: dict[str, tuple[str, torch.Tensor]], dtype: str | None) -> None:
        self.tensors = tensors
        self.dtype = dtype

    def collect(self, found: Mapping[str, torch.Tensor], dtypes: Mapping[str, str]) -> dict[str, torch.Tensor]:
        """The group's tensors out of `found` (full native names), checked and in the type to store."""
        missing = [full for full, _ in self.tensors.values() if full not in found]
        if missing:
            raise CheckpointError(f"the checkpoint lacks {_listed(missing)}. Fetch it again.")
        collected = {}
        for short, (full, meta) in self.tensors.items():
            tensor = found[full]
            if tensor.shape != meta.shape:
                raise CheckpointError(
                    f"tensor {full!r} has shape {list(tensor.shape)}, the config says {list(meta.shape)}"
                )
            collected[short] = tensor.to(getattr(torch, dtypes[full]))
        return collected


def native_groups(built: Architecture, present: set[str], dtype: str | None) -> dict[int, GroupNames]:
    """What each group must have. Tied weights that the checkpoint leaves out are left out here too."""
    state = built.model.state_dict()
    tied = set(built.model.all_tied_weights_keys)
    pattern = re.compile(re.escape(built.layers_path) + r"\.(\d+)\.(.+)")
    groups: dict[int, dict[str, tuple[str, torch.Tensor]]] = {ROOT_GROUP: {}}
    groups |= {index: {} for index in range(len(built.layers))}
    for full, tensor in state.items():
        if full in tied and full not in present:
            continue
        match = pattern.fullmatch(full)
        group, short = (int(match[1]), match[2]) if match else (ROOT_GROUP, full)
        groups[group][short] = (full, tensor)
    return {group: GroupNames(tensors, dtype) for group, tensors in groups.items()}


def hub_groups(source: SafetensorsCheckpoint, built: Architecture, dtype: str | None) -> dict[int, GroupSource]:
    """The groups of a safetensors checkpoint for the module tree `built`; nothing is read yet.

    Raises:
        CheckpointError: weights that the model needs are not in the checkpoint.
    """
    model = built.model
    mapping = get_model_conversion_mapping(model)
    renamings = [item for item in mapping if isinstance(item, WeightRenaming)]
    converters = [item for item in mapping if isinstance(item, WeightConverter)]
    state = model.state_dict()
    layer = re.compile(re.escape(built.layers_path) + r"\.(\d+)\.")
    recipes = {index: _Recipe() for index in (ROOT_GROUP, *range(len(built.layers)))}
    unexpected: list[str] = []
    for name in sorted(source.names(), key=dot_natural_key):
        native, pattern = _native_name(name, renamings, converters, model, state)
        match = layer.match(native)
        recipe = recipes.get(int(match[1]) if match else ROOT_GROUP)
        if recipe is None or (pattern is None and native not in state):
            unexpected.append(name)
        elif pattern is None:
            recipe.copied[native] = name
        else:
            recipe.converted.setdefault(native, []).append((name, pattern))
    if unexpected:
        logger.warning("the checkpoint holds tensors that the model does not use: %s", _listed(unexpected))
    present = {native for recipe in recipes.values() for native in recipe.copied}
    groups = native_groups(built, present, dtype)
    lacking = [
        full
        for index, names in groups.items()
        for full, _ in names.tensors.values()
        if full not in recipes[index].copied and not recipes[index].converted
    ]
    if lacking:
        raise CheckpointError(f"the checkpoint lacks {_listed(lacking)}. Fetch it again.")
    return {index: HubGroup(source, built, names, recipes[index], converters) for index, names in groups.items()}


def _native_name(
    name: str,
    renamings: list[WeightRenaming],
    converters: list[WeightConverter],
    model: Any,
    state: Mapping[str, torch.Tensor],
) -> tuple[str, str | None]:
    native, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
    return str(native), pattern


def _listed(names: list[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(repr(name) for name in names[:most]) + more
