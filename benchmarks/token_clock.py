"""The clock in a peer's `generate`: when each token came, and what was read from disk for it.

Rides in transformers' stopping criteria, which every peer calls once a token, after the token is chosen. Owns the
stamps, and drops the file cache before the tokens that are to be cold. Neighbour: `peers`.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import StoppingCriteria

from benchmarks.coldness import DiskWitness, ReadCount, cached_share, drop_file_cache, prove
from benchmarks.stage import say


@dataclass(frozen=True)
class _Stamp:
    ended: float
    next_began: float
    read_at_end: ReadCount
    read_at_next: ReadCount


class TokenClock(StoppingCriteria):  # type: ignore[misc] # transformers leaves its classes untyped
    """Stamps every token of one `generate`; the first ends the prefill and is not timed.

    After `warm` timed tokens the file cache is dropped before each of the rest. `deadline` (monotonic seconds) ends
    the generation early.
    """

    def __init__(self, device: torch.device, files: list[Path], warm: int, deadline: float) -> None:
        self._device = device
        self._files = files
        self._warm = warm
        self._deadline = deadline
        self._witness = DiskWitness(files[0].parent)
        self._stamps: list[_Stamp] = []
        self._cached: list[float | None] = []

    def __call__(self, input_ids: torch.Tensor, scores: object, **kwargs: object) -> torch.Tensor:
        """Stamp the token just chosen; true for all sequences once the deadline has passed."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        ended, read_at_end = time.perf_counter(), self._witness.count()
        if len(self._stamps) >= self._warm:  # the next token is cold
            drop_file_cache(self._files)
            self._cached.append(cached_share(self._files))
        if self._stamps:
            say(f"token {len(self._stamps)}: {ended - self._stamps[-1].next_began:.3f} s")
        read_at_next = self._witness.count()
        self._stamps.append(_Stamp(ended, time.perf_counter(), read_at_end, read_at_next))
        is_late = time.monotonic() > self._deadline
        return torch.full((input_ids.shape[0],), is_late, dtype=torch.bool, device=input_ids.device)

    def report(self, batch: int, streamed_bytes: int) -> dict[str, Any]:
        """Seconds a token with the file cache ``kept`` and with it ``dropped``, each labelled by what was proven.

        `streamed_bytes` is what one token reads where nothing is cached.
        """
        steps = list(zip(self._stamps, self._stamps[1:], strict=False))
        report: dict[str, Any] = {"tokens_timed": len(steps)}
        for key, part in (("kept", steps[: self._warm]), ("dropped", steps[self._warm :])):
            if not part:
                continue
            seconds = [after.ended - before.next_began for before, after in part]
            proof = prove(part[0][0].read_at_next, part[-1][1].read_at_end, streamed_bytes * len(part))
            median = statistics.median(seconds)
            report[key] = {
                "label": proof.label,
                "s_per_token": median,
                "best_s_per_token": min(seconds),
                "tokens_per_s": batch / median,
                "samples": len(seconds),
                "seconds": [round(second, 5) for second in seconds],
                "proof": asdict(proof),
            }
            if key == "dropped":
                shares = [share for share in self._cached[: len(part)] if share is not None]
                report[key]["file_cache_share_before"] = max(shares) if shares else None
        return report
