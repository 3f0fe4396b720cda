"""From a foreign checkpoint's tensors to the native module tree's, by the family's rules.

Shapes come from cutting on the meta device, so they are exact before anything is read. Neighbours: `tensor_rules`
before it, `checkpoint` calls it in place of `convert.hub_conversions`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch

from lamella_engine.errors import CheckpointError
from lamella_engine.importers.tensor_rules import TensorRule
from lamella_engine.safetensors_header import TensorEntry
from lamella_engine.weight_source import Conversion, TensorShape


def rule_conversions(
    rules: Sequence[TensorRule], tensors: Mapping[str, TensorEntry], read: Callable[[str], torch.Tensor]
) -> list[Conversion]:
    """Conversions of all `tensors`; the first rule that matches a name decides, without one the name stays.

    Raises:
        CheckpointError: a tensor does not have the rows that the config says.
    """
    made = (_conversion(rules, entry, partial(read, name)) for name, entry in tensors.items())
    return [conversion for conversion in made if conversion is not None]


def _conversion(rules: Sequence[TensorRule], entry: TensorEntry, read: Callable[[], torch.Tensor]) -> Conversion | None:
    for rule in rules:
        names = rule.native_names(entry.name)
        if names is not None:
            return _by_rule(rule, names, entry, read) if names else None
    shape = TensorShape(entry.name, entry.dtype, entry.shape)
    return Conversion((shape,), (entry.name,), lambda: {entry.name: read()}, is_copy=True)


def _by_rule(
    rule: TensorRule, names: tuple[str, ...], entry: TensorEntry, read: Callable[[], torch.Tensor]
) -> Conversion:
    try:
        rehearsed = rule.cut(torch.empty(entry.shape, dtype=getattr(torch, entry.dtype), device="meta"))
    except (RuntimeError, IndexError) as error:
        raise CheckpointError(
            f"tensor {entry.name!r} has shape {list(entry.shape)}, which does not make up {', '.join(names)} as "
            "config.json describes them; they do not belong together, fetch them again"
        ) from error
    targets = tuple(
        TensorShape(name, entry.dtype, tuple(part.shape)) for name, part in zip(names, rehearsed, strict=True)
    )

    def run() -> dict[str, torch.Tensor]:
        return dict(zip(names, rule.cut(read()), strict=True))

    return Conversion(targets, (entry.name,), run)
