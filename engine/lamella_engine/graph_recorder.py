"""Records what a piece of code launches on a device, to launch it again in one call: the interface, and CUDA's form.

Owns the stream that is recorded on and the memory pool that all graphs share. `layer_graphs` decides what is recorded
and keeps it; tests record the operators of a CPU in the same way.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Protocol

import torch

from lamella_engine.device import release_library_memory

Replay = Callable[[], None]


class Recorder(Protocol):
    """Records launches; used by one thread. Tensors made while recording are gone once it ends."""

    def prepare(self) -> None:
        """Make room for what is recorded next: a recording cannot free what an allocator merely keeps."""

    def record(self, launch: Callable[[], None]) -> Replay:
        """Run `launch`, whose kernels are recorded instead of started; returns what starts them all.

        Raises:
            Exception: whatever `launch` raises, or what the device finds that cannot be recorded in it.
        """

    def forget(self) -> None:
        """All recordings so far have been dropped."""

    def close(self) -> None:
        """Give back what recording took; idempotent."""


class CudaRecorder:
    """CUDA graphs on a stream of their own, all in one pool: none leaves a tensor there, so any order is safe."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call] # torch leaves it without types
        self._pool = torch.cuda.graph_pool_handle()
        self._failed: list[torch.cuda.CUDAGraph] = []

    def prepare(self) -> None:
        """See `Recorder`."""
        torch.cuda.empty_cache()

    def record(self, launch: Callable[[], None]) -> Replay:
        """See `Recorder`."""
        graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            # Other threads copy and wait for copies meanwhile, which the stricter modes forbid.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                try:
                    launch()
                finally:
                    self._end(graph)
            except BaseException:
                self.forget()
                raise
        current.wait_stream(self._stream)
        return graph.replay

    def forget(self) -> None:
        """See `Recorder`; a pool without graphs may not be recorded to again."""
        self._pool = torch.cuda.graph_pool_handle()

    def close(self) -> None:
        """See `Recorder`; the stream had a workspace of the matrix library."""
        release_library_memory()

    def _end(self, graph: torch.cuda.CUDAGraph) -> None:
        try:
            graph.capture_end()
        except BaseException:
            # Some versions of torch leave here without telling the allocator, which would then never free a block
            # again; and it keeps asking the graph which stream is recorded, so the graph must live.
            self._failed.append(graph)
            with contextlib.suppress(RuntimeError, AttributeError):
                torch._C._cuda_endAllocateToPool(self._stream.device.index, self._pool)
            raise
