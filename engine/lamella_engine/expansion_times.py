"""How long bringing packed weights to the compute type takes, layer by layer.

In a sweep a layer is expanded and computed in one go, on a GPU in one recorded graph, so expanding is measured on its
own: the same steps on the same bytes, by the device's events, or by the clock where the host computes. `sweep` knows
what is expanded; `bench` has it measured and reports it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from lamella_engine.graph_recorder import Recorder, Replay

_REPEATS = 5
_ENOUGH_S = 0.2  # spent on one piece: what takes so long is timed once


@dataclass(frozen=True)
class ExpansionTimes:
    """Seconds of expanding in a sweep; 0 for what stays ready to be computed with.

    Attributes:
        layers_s: of each layer, with all experts.
        head_s: of the head, where it passes in blocks or stays packed.
        sweep_s: of all together. The few rows of an embedding table are not in it.
        experts_s: the part of it that is for experts which a sweep of few tokens expands only if they are visited.
        num_expert_layers: layers that have such experts.
    """

    layers_s: tuple[float, ...]
    head_s: float
    sweep_s: float
    experts_s: float = 0.0
    num_expert_layers: int = 0

    def of_sweep(self, visited: float, experts_in_layer: int) -> float:
        """Seconds of a sweep that visited so many of those experts, 0 where it had all of them at hand."""
        there_are = self.num_expert_layers * experts_in_layer
        if not visited or not there_are:
            return self.sweep_s
        return self.sweep_s - self.experts_s * max(0.0, 1.0 - visited / there_are)


class ExpansionClock:
    """Times what is run on `device`, and on request as a recording is replayed."""

    def __init__(self, device: torch.device, recorder: Recorder | None) -> None:
        self._recorder = recorder
        self._seconds = partial(_event_seconds, device) if device.type == "cuda" else _clock_seconds

    def seconds(self, run: Callable[[], None], *, is_recorded: bool) -> float:
        """Of one run, the median of some; `is_recorded` where a sweep replays it from a recording."""
        began_s = time.perf_counter()
        run()  # what is made once is made now
        timed: Replay = run
        if is_recorded and self._recorder is not None:
            self._recorder.prepare()
            timed = self._recorder.record(run)
            self._recorder.forget()  # the recording ends here, and what is recorded later must not be among its own
        measured = [self._seconds(timed)]
        while len(measured) < _REPEATS and time.perf_counter() - began_s < _ENOUGH_S:
            measured.append(self._seconds(timed))
        return statistics.median(measured)


def _clock_seconds(run: Callable[[], None]) -> float:
    began_s = time.perf_counter()
    run()
    return time.perf_counter() - began_s


def _event_seconds(device: torch.device, run: Callable[[], None]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call] # torch's
    stream = torch.cuda.current_stream(device)
    begin.record(stream)
    run()
    end.record(stream)
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3
