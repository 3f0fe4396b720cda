"""What a soak asks for: a handful of different requests, and which job asks for which; all from one seed.

Owns the requests and the files between the soak and its client processes. Neighbours: `soak` writes plans,
`soak_client` carries them out and writes what came, `soak_report` judges it.
"""

from __future__ import annotations

import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path

MODEL = "tiny"
NUM_REQUESTS = 32
WORDS = ("river", "lamp", "stone", "quiet", "seven", "maple", "harbour", "thin", "glass", "north")


@dataclass(frozen=True)
class SoakRequest:
    """One request; a temperature above 0 samples under `seed`."""

    prompt: str
    max_tokens: int
    temperature: float
    seed: int


@dataclass(frozen=True)
class SoakPlan:
    """What one client process does.

    Attributes:
        url: the server.
        requests: what is asked for.
        jobs: for each job its number and which request it is.
        concurrency: jobs that are asked for and not ended at most.
        timeout_s: a job that takes longer is stuck.
    """

    url: str
    requests: tuple[SoakRequest, ...]
    jobs: tuple[tuple[int, int], ...]
    concurrency: int
    timeout_s: float

    def write(self, path: Path) -> None:
        """Write the plan to a file."""
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> SoakPlan:
        """Read a plan from a file."""
        raw = json.loads(path.read_text(encoding="utf-8"))
        return cls(
            str(raw["url"]),
            tuple(SoakRequest(**request) for request in raw["requests"]),
            tuple((int(number), int(request)) for number, request in raw["jobs"]),
            int(raw["concurrency"]),
            float(raw["timeout_s"]),
        )


@dataclass(frozen=True)
class SoakAnswer:
    """What came of one job.

    Attributes:
        number: the job's, in the plan.
        request: which request it was.
        job_id: its id; empty if it was never accepted.
        seqs: the numbers of its events, as they came.
        at_s: when each came, on the clock that all processes of a host share (CLOCK_MONOTONIC).
        token_ids: its tokens.
        text: its text.
        ended: how it ended: done, failed, cancelled, or what kept it from it.
        usage: prompt and completion tokens, as counted at its end.
    """

    number: int
    request: int
    job_id: str
    seqs: tuple[int, ...]
    at_s: tuple[float, ...]
    token_ids: tuple[int, ...]
    text: str
    ended: str
    usage: tuple[int, int]

    def is_same(self, other: SoakAnswer) -> bool:
        """Whether both brought the same: tokens, text, numbers, end and usage."""
        mine = (self.seqs, self.token_ids, self.text, self.ended, self.usage)
        return mine == (other.seqs, other.token_ids, other.text, other.ended, other.usage)


def write_answers(path: Path, answers: list[SoakAnswer]) -> None:
    """Write what came."""
    path.write_text(json.dumps([asdict(answer) for answer in answers]), encoding="utf-8")


def read_answers(path: Path) -> list[SoakAnswer]:
    """Read what came."""
    return [
        SoakAnswer(
            int(raw["number"]),
            int(raw["request"]),
            str(raw["job_id"]),
            tuple(raw["seqs"]),
            tuple(raw["at_s"]),
            tuple(raw["token_ids"]),
            str(raw["text"]),
            str(raw["ended"]),
            (int(raw["usage"][0]), int(raw["usage"][1])),
        )
        for raw in json.loads(path.read_text(encoding="utf-8"))
    ]


def draw_requests(seed: int, longest: int) -> tuple[SoakRequest, ...]:
    """Different requests of up to `longest` tokens, half of them sampled."""
    draw = random.Random(seed)
    return tuple(
        SoakRequest(
            " ".join(draw.choice(WORDS) for _ in range(2 + number)),
            draw.randint(max(1, longest // 4), longest),
            0.8 if number % 2 else 0.0,
            draw.randrange(2**31),
        )
        for number in range(NUM_REQUESTS)
    )
