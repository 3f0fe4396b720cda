"""Routed experts: where each one's bytes lie in a layer's shard, and who asks for them when a token is routed to them.

A sweep with few tokens visits few experts of a layer. Layers that stream then come without their experts, and those
that the router chose are fetched when it has chosen, into the places where a whole layer would have them, so that the
model's own code computes as ever. With many tokens most experts are visited, and layers come whole, ahead of time.
Packed tensors have the parts of an expert beside those of the next one as plain tensors have its numbers, so an expert
is some ranges of bytes either way. Neighbours: `pieces` carries the ranges, `weight_stream` fetches, `binding` expands.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

from lamella_engine.expert_share import is_sparse
from lamella_engine.formats import find_format
from lamella_engine.shard import TensorSpec
from lamella_engine.weight_source import TensorShape

Stored = TypeVar("Stored", TensorSpec, TensorShape)
Range = tuple[int, int]
Fetch = Callable[[Sequence[int]], None]


@dataclass(frozen=True)
class ExpertBytes:
    """Where the experts of a layer lie in its shard.

    Attributes:
        path: of the module that owns them, within the layer.
        count: experts.
        routed: how many of them a token visits.
        parts: offset of the first expert's bytes and bytes an expert, for each tensor or part of a packed one; experts
            follow each other.
        tensors: names of the tensors within the layer that experts are entries of.
    """

    path: str
    count: int
    routed: int
    parts: tuple[Range, ...]
    tensors: tuple[str, ...] = ()

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert."""
        return sum(nbytes for _, nbytes in self.parts)

    @property
    def nbytes(self) -> int:
        """Bytes of all experts."""
        return self.count * self.expert_bytes

    def ranges(self, experts: Iterable[int]) -> list[Range]:
        """Offset and length of what the chosen experts need, neighbours joined, ascending."""
        chosen = sorted(set(experts))
        found = [(start + expert * nbytes, nbytes) for start, nbytes in self.parts for expert in chosen]
        return _joined(sorted(found))

    def others(self, total: int) -> list[Range]:
        """Offset and length of everything in a shard of `total` bytes that is no expert, ascending."""
        found, at = [], 0
        for start, nbytes in sorted(self.parts):
            found.append((at, start - at))
            at = start + self.count * nbytes
        return [(start, nbytes) for start, nbytes in (*found, (at, total - at)) if nbytes > 0]

    def is_sparse(self, tokens: int) -> bool:
        """Whether a sweep of `tokens` tokens does better to fetch the experts it visits."""
        return is_sparse(self.count, self.routed, tokens)


def find_experts(layer: nn.Module, tensors: Sequence[TensorSpec], routed: int | None) -> ExpertBytes | None:
    """The experts of `layer`, whose shard holds `tensors`; None where it has none that can be fetched one by one."""
    found = expert_tensors(layer, tensors, routed)
    if found is None or routed is None:
        return None
    path, count, own = found
    parts = {spec.name: tuple(_entry_bytes(spec, count)) for spec in own}
    cut = tuple(name for name, ranges in parts.items() if ranges)
    return ExpertBytes(path, count, routed, tuple(each for name in cut for each in parts[name]), cut)


def expert_tensors(
    layer: nn.Module, tensors: Sequence[Stored], routed: int | None
) -> tuple[str, int, list[Stored]] | None:
    """Path of the module that owns the experts of `layer`, how many there are, and which of `tensors` are theirs.

    They can be told apart where transformers' interface for experts is used: one module a layer, told which experts are
    visited, with tensors whose first dimension counts the experts.
    """
    owners = [(path, module) for path, module in layer.named_modules() if hasattr(module, "_is_expert_parallel")]
    if len(owners) != 1 or not routed:
        return None
    path, module = owners[0]
    count = getattr(module, "num_experts", None)
    own = [tensor for tensor in tensors if tensor.name.rpartition(".")[0] == path]
    names = {name for name, weight in module._parameters.items() if weight is not None}
    if not isinstance(count, int) or not own or {tensor.name.rpartition(".")[2] for tensor in own} != names:
        return None
    if any(not tensor.shape or tensor.shape[0] != count for tensor in own) or routed >= count:
        return None
    return path, count, own


def tell_when_routed(layer: nn.Module, experts: ExpertBytes, fetch: Fetch) -> None:
    """Call `fetch` with the experts that tokens are routed to, before the experts of `layer` compute."""
    module = layer.get_submodule(experts.path)
    name = list(inspect.signature(type(module).forward).parameters)[2]

    def before(module: nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor]) -> None:
        indices = kwargs[name] if name in kwargs else args[1]
        fetch(_visited(indices, experts.count))

    module.register_forward_pre_hook(before, with_kwargs=True)


def _entry_bytes(spec: TensorSpec, count: int) -> Iterator[Range]:
    """Where the first of `count` entries of a tensor begins and its bytes, for each part that entries do not share."""
    if spec.packed is None:
        yield spec.offset, spec.nbytes // count
        return
    shared = find_format(spec.packed.format).shared_parts(spec.shape)
    yield from ((part.offset, part.nbytes // count) for part in spec.packed.parts if part.name not in shared)


def _visited(indices: torch.Tensor, count: int) -> list[int]:
    """The different experts in `indices`; beyond the last one lies what stands for none."""
    return [expert for expert in torch.unique(indices).tolist() if 0 <= expert < count]


def _joined(ranges: Sequence[Range]) -> list[Range]:
    found: list[Range] = []
    for start, nbytes in ranges:
        if found and found[-1][0] + found[-1][1] == start:
            found[-1] = (found[-1][0], found[-1][1] + nbytes)
        else:
            found.append((start, nbytes))
    return found
