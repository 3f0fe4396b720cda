"""Judges a soak: what was lost, doubled, missing, different or stuck, and how long recovery took.

Owns the figures and the verdict; asks nobody. Neighbours: `soak` gives it the answers, the kills and what is left on
the server.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from dataclasses import asdict, dataclass

from benchmarks.soak_plan import SoakAnswer

GRACE_S = 2.0  # what recovery may take beyond the lease


@dataclass(frozen=True)
class Kill:
    """One kill -9: whom, when (CLOCK_MONOTONIC), and the jobs it held with the number of their last stored event."""

    name: str
    at_s: float
    held: dict[str, int]


@dataclass(frozen=True)
class Record:
    """What the server holds of a job in the end."""

    state: str
    seq: int
    stored_events: int
    tokens: int
    attempts: int


@dataclass(frozen=True)
class Leftovers:
    """What the server holds besides: all of it is to be empty."""

    active: int
    flight: int
    queued_messages: int
    unacknowledged: int


@dataclass(frozen=True)
class Verdict:
    """Jobs by what is wrong with them (all of these are to be 0), and the seconds that recovery took.

    Attributes:
        lost: never accepted, or ended otherwise than done.
        stuck: not ended in time.
        misnumbered: events not numbered 1 to n, each once.
        different: tokens, text or usage not those of the undisturbed run.
        miscounted: the server's record and stream do not say the same as the client saw.
    """

    jobs: int
    lost: int
    stuck: int
    misnumbered: int
    different: int
    miscounted: int
    recovered: int
    recovery_p50_s: float
    recovery_p99_s: float
    recovery_max_s: float
    attempts: dict[str, int]

    @property
    def is_clean(self) -> bool:
        """Nothing is wrong with any job."""
        return not (self.lost or self.stuck or self.misnumbered or self.different or self.miscounted)

    def as_json(self) -> dict[str, object]:
        """The figures, for the result file."""
        return asdict(self)


def judge(answers: list[SoakAnswer], calm: list[SoakAnswer], kills: list[Kill], records: dict[str, Record]) -> Verdict:
    """Hold every answer against the undisturbed one of the same request, and against what the server holds."""
    expected = {answer.request: answer for answer in calm}
    seconds = sorted(recoveries(answers, kills))
    attempts = Counter(str(record.attempts) for record in records.values())
    return Verdict(
        jobs=len(answers),
        lost=sum(answer.ended != "done" and not _is_stuck(answer) for answer in answers),
        stuck=sum(map(_is_stuck, answers)),
        misnumbered=sum(list(answer.seqs) != list(range(1, len(answer.seqs) + 1)) for answer in answers),
        different=sum(not answer.is_same(expected[answer.request]) for answer in answers),
        miscounted=sum(not _fits(answer, records.get(answer.job_id)) for answer in answers),
        recovered=len(seconds),
        recovery_p50_s=_percentile(seconds, 0.50),
        recovery_p99_s=_percentile(seconds, 0.99),
        recovery_max_s=_percentile(seconds, 1.0),
        attempts=dict(sorted(attempts.items())),
    )


def recoveries(answers: list[SoakAnswer], kills: list[Kill]) -> list[float]:
    """Seconds from each kill to the next event of each job that the worker held.

    A job whose next worker was killed before it brought an event counts from the first of these kills.
    """
    found = []
    by_id = {answer.job_id: answer for answer in answers}
    for kill in kills:
        for job_id, seq in kill.held.items():
            answer = by_id.get(job_id)
            if answer is not None and (at := bisect_right(answer.seqs, seq)) < len(answer.at_s):
                found.append(answer.at_s[at] - kill.at_s)
    return found


def _is_stuck(answer: SoakAnswer) -> bool:
    return answer.ended.startswith("WaitTimeout")


def _fits(answer: SoakAnswer, record: Record | None) -> bool:
    seen = len(answer.seqs)
    return record is not None and (record.state, record.seq, record.stored_events, record.tokens) == (
        *("done", seen, seen),
        len(answer.token_ids),
    )


def _percentile(ordered: list[float], share: float) -> float:
    return round(ordered[max(0, math.ceil(share * len(ordered)) - 1)], 3) if ordered else 0.0
