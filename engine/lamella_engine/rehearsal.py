"""Runs a model without weights, to see how it treats its layers: in which order, with what attention, what they keep.

Owns the stand-ins for forwards on the meta device. One layer of each kind runs, the others would do the same; what
cannot be computed without values, such as a choice of experts, gives back what it was given. `family_path` and
`state_size` ask; the model is left as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

# What code does that looks at values, of which there are none on the meta device.
_NO_VALUES = (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError)


class Rehearsal:
    """One model's rehearsal, of one or more steps.

    Attributes:
        order: the layers called in the first step.
        kinds: for each layer, what tells it apart from those that keep or compute something else.
        is_whole: nothing that `carries` says to be of interest was left out for want of values.
        rewrites_weights: a step changed weights of a layer in place, which streamed ones would not keep.
        changed: for each kind that ran, the attributes of its modules that a step left a tensor in, by dotted path.
    """

    def __init__(self, model: PreTrainedModel, layers: nn.ModuleList, carries: Callable[[object], bool]) -> None:
        self._model = model
        self._layers = list(layers)
        self._carries = carries
        self._results: dict[object, Any] = {}
        self._is_first = True
        self.kinds = kinds_of(model, self._layers)
        self.order: list[int] = []
        self.is_whole = True
        self.rewrites_weights = False
        self.changed: dict[object, tuple[str, ...]] = {}

    def run(
        self, steps: list[Callable[[], object]], watch: Callable[[object, Callable[[], Any]], Any], *, skips: bool
    ) -> None:
        """Run `steps`, the layers through `watch(kind, layer)`; with `skips` only the first of each kind."""
        with torch.device("meta"), torch.no_grad(), self._stand_ins(watch, skips=skips):
            try:
                for step in steps:
                    self._results.clear()
                    step()
                    self._is_first = False
            except _NO_VALUES:
                self.is_whole = False

    @contextmanager
    def _stand_ins(self, watch: Callable[[object, Callable[[], Any]], Any], *, skips: bool) -> Iterator[None]:
        numbers = {id(layer): index for index, layer in enumerate(self._layers)}
        modules = [module for module in self._model.modules() if module is not self._model]
        before = {id(module): _plain_values(module) for module in modules}
        versions = self._versions()
        for module in modules:
            index = numbers.get(id(module))
            module.forward = (
                self._tolerant(module.forward)
                if index is None
                else self._watched(index, module.forward, watch, skips=skips)
            )
        try:
            yield
        finally:
            for module in modules:
                module.__dict__.pop("forward", None)
            self.rewrites_weights |= self._versions() != versions
            for kind, layer in zip(self.kinds, self._layers, strict=True):
                self.changed[kind] = tuple(sorted({*self.changed.get(kind, ()), *_changes(layer, before)}))
            for module in modules:
                for name, value in before[id(module)].items():
                    setattr(module, name, value)

    def _versions(self) -> list[int]:
        return [weight._version for layer in self._layers for weight in layer.parameters()]

    def _watched(
        self,
        index: int,
        forward: Callable[..., Any],
        watch: Callable[[object, Callable[[], Any]], Any],
        *,
        skips: bool,
    ) -> Callable[..., Any]:
        kind = self.kinds[index]

        def run_layer(*args: Any, **kwargs: Any) -> Any:
            if self._is_first:
                self.order.append(index)
            if kind not in self._results or not skips:
                self._results[kind] = watch(kind, lambda: forward(*args, **kwargs))
            return self._results[kind]

        return run_layer

    def _tolerant(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            try:
                return forward(*args, **kwargs)
            except RuntimeError:
                leaves = tree_leaves((args, kwargs))
                if any(self._carries(leaf) for leaf in leaves):
                    self.is_whole = False
                return next(leaf for leaf in leaves if isinstance(leaf, torch.Tensor))

        return run


def kinds_of(model: PreTrainedModel, layers: list[nn.Module]) -> list[object]:
    """For each layer, what tells it apart from those that keep or compute something else."""
    config = model.config.get_text_config(decoder=True)
    types = list(getattr(config, "layer_types", None) or ())
    sharing = list(getattr(config, "kv_sharing_modes", None) or ())
    return [
        (
            type(layer),
            tuple((name, tuple(weight.shape)) for name, weight in layer.named_parameters()),
            *types[index : index + 1],
            *sharing[index : index + 1],
        )
        for index, layer in enumerate(layers)
    ]


def _plain_values(module: nn.Module) -> dict[str, torch.Tensor | None]:
    """Attributes that hold, or may come to hold, a tensor that is neither weight nor buffer."""
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_") and (value is None or isinstance(value, torch.Tensor))
    }


def _changes(layer: nn.Module, before: dict[int, dict[str, torch.Tensor | None]]) -> Iterator[str]:
    for path, module in layer.named_modules():
        for name, value in _plain_values(module).items():
            if isinstance(value, torch.Tensor) and before[id(module)].get(name) is not value:
                yield f"{path}.{name}" if path else name
