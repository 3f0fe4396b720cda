"""What the matrices of a model's layers are given over a text: their inputs' second moments, layer by layer.

Owns the model in full precision while it is packed with a calibration text: all windows of the text pass layer 0, then
all pass layer 1, and so on, each layer's weights being in memory for that time only. After a layer has been measured it
is packed, and the windows pass it as it was packed, so that the layers behind it are measured on the inputs they will
have. Neighbours: `calibration_windows` makes the windows, `formats.calibrated_rounding` uses the moments,
`shard_builder` drives it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lamella_engine.architecture import Architecture, table_names
from lamella_engine.convert import ModelPlan
from lamella_engine.errors import CheckpointError, EngineError
from lamella_engine.formats.calibrated_rounding import Feedback, feedback_of, spans_of
from lamella_engine.resident import compute_buffers


class _Passed(Exception):
    """A window has passed the layer that was wanted; what follows is not computed."""


class LayerInputs:
    """The windows of a text on their way through a model's layers; used by one thread.

    Args:
        built: the model, on the meta device, in the type to compute in; its forwards are replaced while this is open.
        plan: what makes its weights.
        windows: tokens, int64 [number, length].
        device: where it computes.
    """

    def __init__(self, built: Architecture, plan: ModelPlan, windows: torch.Tensor, device: torch.device) -> None:
        self._built = built
        self._plan = plan
        self._windows = windows
        self._device = device
        self._behind: list[Any] = [None] * len(windows)  # what the last layer that was passed gave for each window
        self._next = 0
        self._at = 0
        self._keeps = False
        self._give_root()
        for index, layer in enumerate(built.layers):
            layer.forward = self._standing_in(index, layer.forward)

    def measure(self, index: int, weights: Mapping[str, torch.Tensor], wanted: Iterable[str]) -> dict[str, Feedback]:
        """Pass all windows through layer `index`, which comes next, and say what its `wanted` matrices are given.

        Args:
            index: of the layer.
            weights: its tensors by their names in the layer.
            wanted: names of weights; those that are no matrix of a linear layer, or whose layer the text did not come
                to, are left out of the result.

        Returns:
            By name, for each of `spans_of` the columns, `feedback_of` the inputs' second moments.

        Raises:
            EngineError: the model does not run its layers in order.
            CheckpointError: the layer gives no finite numbers.
        """
        layer = self._built.layers[index]
        with self._given(index, weights), _watched(layer, wanted) as inputs:
            self._pass_all(index, keeps=False)
        return inputs.feedback()

    def go_on(self, index: int, weights: Mapping[str, torch.Tensor]) -> None:
        """Have all windows pass layer `index` with `weights`, which are those it will have when it is used.

        Raises:
            As `measure`.
        """
        with self._given(index, weights):
            self._pass_all(index, keeps=True)
        self._next = index + 1

    def _give_root(self) -> None:
        """What lies outside the layers but for the head, which no window comes to."""
        model = self._built.model
        embedding, head = table_names(self._built)
        for conversion in self._plan.root.conversions:
            if all(target.name == head and target.name != embedding for target in conversion.targets):
                continue
            for name, value in conversion.run().items():
                _put(model, name, value, self._device)
        for parameter in model.parameters():
            parameter._is_hf_initialized = True
        compute_buffers(model, self._device)

    @contextmanager
    def _given(self, index: int, weights: Mapping[str, torch.Tensor]) -> Iterator[None]:
        layer = self._built.layers[index]
        for name, value in weights.items():
            _put(layer, name, value, self._device)
        try:
            yield
        finally:
            for name in weights:
                _take(layer, name)

    @torch.no_grad()
    def _pass_all(self, index: int, *, keeps: bool) -> None:
        if index != self._next:
            raise EngineError(f"layer {index} was asked for, and layer {self._next} comes next")
        self._at, self._keeps = index, keeps
        for number in range(len(self._windows)):
            self._window = number
            ids = self._windows[number : number + 1].to(self._device)
            try:
                self._built.model(input_ids=ids, use_cache=False)
            except _Passed:
                continue
            except (KeyError, IndexError, TypeError, AttributeError) as error:
                raise EngineError(f"{self._cannot(index)} ({type(error).__name__}: {error})") from error
            raise EngineError(self._cannot(index))

    def _cannot(self, index: int) -> str:
        return (
            f"the inputs of layer {index} of a {self._built.family} model cannot be measured, since its layers are "
            "skipped or need more of each other than what one gives the next; leave 'calibrated' out"
        )

    def _standing_in(self, index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        """A layer that gives what the layers before the wanted one gave, runs where it is the one, and ends there."""

        def run(*args: Any, **kwargs: Any) -> Any:
            if index < self._at:
                return self._behind[self._window]
            result = forward(*args, **kwargs)
            if self._keeps:
                self._behind[self._window] = result
                first = result if isinstance(result, torch.Tensor) else result[0]
                if not bool(torch.isfinite(first).all()):
                    raise CheckpointError(
                        f"layer {index} gives infinities or not-a-numbers for the calibration text; the checkpoint is "
                        "damaged, or computing needs a wider type: give --dtype float32, or leave 'calibrated' out"
                    )
            raise _Passed

        return run


class _Sum:
    """The second moments of one input, as it comes."""

    def __init__(self, columns: int) -> None:
        self._spans = spans_of(columns)
        self._sums: list[torch.Tensor] = []
        self._count = 0

    def add(self, inputs: torch.Tensor) -> None:
        """Inputs of any shape with the columns last."""
        rows = inputs.detach().reshape(-1, inputs.shape[-1]).to(torch.float32)
        new = [rows[:, span].T @ rows[:, span] for span in self._spans]
        self._sums = [old.add_(more) for old, more in zip(self._sums, new, strict=True)] if self._sums else new
        self._count += len(rows)

    def feedback(self) -> Feedback:
        """Of everything added."""
        return tuple(feedback_of(each.div_(self._count)) for each in self._sums)


class _Inputs:
    """The inputs of some linear modules; modules that are given the same tensor share one sum."""

    def __init__(self) -> None:
        self._sums: dict[str, _Sum] = {}
        self._last: tuple[torch.Tensor, _Sum] | None = None

    def hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        """What the module of weight `name` is to call before it runs."""

        def add(module: nn.Module, args: tuple[Any, ...]) -> None:
            given: torch.Tensor = args[0]
            if self._last is not None and self._last[0] is given:
                self._sums[name] = self._last[1]
                return
            own = self._sums.setdefault(name, _Sum(given.shape[-1]))
            own.add(given)
            self._last = (given, own)

        return add

    def feedback(self) -> dict[str, Feedback]:
        """By name of the weight; each sum is turned into it once, and is of no more use."""
        self._last = None
        made: dict[int, Feedback] = {}
        return {name: made.get(id(sum)) or made.setdefault(id(sum), sum.feedback()) for name, sum in self._sums.items()}


@contextmanager
def _watched(layer: nn.Module, wanted: Iterable[str]) -> Iterator[_Inputs]:
    inputs = _Inputs()
    hooks = []
    for name in wanted:
        path, _, leaf = name.rpartition(".")
        module = layer.get_submodule(path)
        if leaf == "weight" and isinstance(module, nn.Linear):
            hooks.append(module.register_forward_pre_hook(inputs.hook(name)))
    try:
        yield inputs
    finally:
        for hook in hooks:
            hook.remove()


def _put(module: nn.Module, name: str, value: torch.Tensor, device: torch.device) -> None:
    """Make `value` a parameter or buffer of `module`, in the type that is there."""
    owner, leaf = _owner(module, name)
    if leaf in owner._parameters:
        kept = owner._parameters[leaf]
        dtype = value.dtype if kept is None or not value.is_floating_point() else kept.dtype
        owner._parameters[leaf] = nn.Parameter(value.to(device=device, dtype=dtype), requires_grad=False)
    else:
        owner._buffers[leaf] = value.to(device)


def _take(module: nn.Module, name: str) -> None:
    owner, leaf = _owner(module, name)
    if leaf in owner._parameters:
        kept = owner._parameters[leaf]
        assert kept is not None, "`_put` has put it there"
        owner._parameters[leaf] = nn.Parameter(torch.empty_like(kept, device="meta"), requires_grad=False)
    else:
        owner._buffers[leaf] = torch.empty_like(owner._buffers[leaf], device="meta")  # type: ignore[arg-type] # as above


def _owner(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return module.get_submodule(path), leaf
