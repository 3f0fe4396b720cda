"""Rules by which tensors of a foreign checkpoint become native ones: names, and how one tensor is cut into several.

Owns the cuts; knows no family. A cut never holds more than about one copy beside its input.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

Cut = Callable[[torch.Tensor], tuple[torch.Tensor, ...]]
_ROWS_AT_A_TIME = 4096


@dataclass(frozen=True)
class TensorRule:
    """Tensors whose whole name matches `pattern` become `targets`.

    Attributes:
        pattern: regular expression for the whole name in the checkpoint.
        targets: native names, with ``\\1`` and so on for the pattern's groups; none means: not needed.
        cut: makes as many tensors as there are targets.
    """

    pattern: str
    targets: tuple[str, ...]
    cut: Cut

    def native_names(self, name: str) -> tuple[str, ...] | None:
        """Native names of the tensor `name`, or None where the rule does not match."""
        match = re.fullmatch(self.pattern, name)
        return None if match is None else tuple(match.expand(target) for target in self.targets)


def rename(pattern: str, target: str) -> TensorRule:
    """The tensor is taken as it is."""
    return TensorRule(pattern, (target,), _as_it_is)


def drop(pattern: str) -> TensorRule:
    """The tensor is computed from the config here, and not needed."""
    return TensorRule(pattern, (), _none)


def split_rows(pattern: str, targets: tuple[str, ...], rows: tuple[int, ...]) -> TensorRule:
    """The tensor's first `rows[0]` rows become the first target, the next `rows[1]` the second, and so on."""
    return TensorRule(pattern, targets, partial(_split_rows, rows=rows))


def split_grouped_rows(pattern: str, targets: tuple[str, ...], sizes: tuple[int, ...], width: int) -> TensorRule:
    """Rows come in equal groups; in each, `sizes[i]` heads of `width` rows belong to target `i`."""
    return TensorRule(pattern, targets, partial(_split_groups, sizes=sizes, width=width))


def unit_rows(pattern: str, target: str) -> TensorRule:
    """Each row is divided by its length (2-norm, at least 1e-12), in the tensor's own dtype."""
    return TensorRule(pattern, (target,), _unit_rows)


def _as_it_is(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return (tensor,)


def _none(_tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return ()


def _split_rows(tensor: torch.Tensor, rows: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
    return torch.split(tensor, list(rows))


def _split_groups(tensor: torch.Tensor, sizes: tuple[int, ...], width: int) -> tuple[torch.Tensor, ...]:
    inner = tensor.shape[1:]
    groups = tensor.reshape(-1, sum(sizes), width, *inner)
    return tuple(part.reshape(-1, *inner) for part in torch.split(groups, list(sizes), dim=1))


def _unit_rows(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    for block in torch.split(tensor, _ROWS_AT_A_TIME):
        block.copy_(torch.nn.functional.normalize(block))
    return (tensor,)
