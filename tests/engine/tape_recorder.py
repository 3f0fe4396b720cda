"""Records the operators of a CPU with the very tensors they were called with, as a CUDA graph records kernels.

Playing a tape runs no Python of the model: what a layer would have looked up anew, it would miss here as it would on a
GPU. What waits for a value of the device is refused while recording, as a GPU refuses it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

_WAITING = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)


class _Tape(TorchDispatchMode):
    """The operators of one recording, and what they overwrote that was there before."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[torch.Tensor]]] = []
        self._before: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if any(tag in func.tags for tag in _WAITING) and not _picks_by_number(func, args):
            raise RuntimeError(f"{func} waits for the device, which is being recorded")
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self._before.setdefault(id(value), (value, value.clone()))
        result = func(*args, **kwargs)
        made = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        given = {leaf.untyped_storage().data_ptr() for leaf in pytree.tree_leaves((args, kwargs)) if _is_tensor(leaf)}
        fresh = [tensor for tensor in made if tensor.untyped_storage().data_ptr() not in given]
        self.steps.append((func, args, kwargs, fresh))
        return result

    def restore(self) -> None:
        """Undo what was overwritten: recording does not compute."""
        for tensor, before in reversed(self._before.values()):
            tensor.copy_(before)
        self._before.clear()


class TapeRecorder:
    """A `Recorder` on a CPU.

    Attributes:
        prepared, forgotten, replays: how often it was asked to.
        is_closed: whether it was closed.
    """

    def __init__(self) -> None:
        self.prepared = self.forgotten = self.replays = 0
        self.is_closed = False

    def prepare(self) -> None:
        self.prepared += 1

    def record(self, launch: Callable[[], None]) -> Callable[[], None]:
        tape = _Tape()
        try:
            with tape:
                launch()
        finally:
            tape.restore()
        steps = tape.steps

        def replay() -> None:
            self.replays += 1
            for func, args, kwargs, fresh in steps:
                again = func(*args, **kwargs)
                made = [leaf for leaf in pytree.tree_leaves(again) if isinstance(leaf, torch.Tensor)]
                for target, tensor in zip(fresh, made, strict=len(fresh) > 0):
                    target.copy_(tensor)

        return replay

    def forget(self) -> None:
        self.forgotten += 1

    def close(self) -> None:
        self.is_closed = True


def _picks_by_number(func: Any, args: tuple[Any, ...]) -> bool:
    """An index of numbers has a result of known shape, one of truth values has not."""
    is_index = func in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default)
    return is_index and all(index is None or index.dtype != torch.bool for index in args[1])


def _is_tensor(leaf: object) -> bool:
    return isinstance(leaf, torch.Tensor)
