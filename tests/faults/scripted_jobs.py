"""Requests to scripted workers, and what becomes of each where nothing goes wrong."""

from __future__ import annotations

from collections.abc import Sequence

from lamella.client import Client
from lamella.job import Job
from tests.faults.oracle import Undisturbed, assert_as_if_nothing_was
from tests.waiting import wait_until
from tests.worker.scripted_engine import scripted_text


def expected(prompt: str, num_tokens: int = 150) -> Undisturbed:
    """A request for `num_tokens` tokens, and its undisturbed answer."""
    token_ids = tuple(int(word) for word in scripted_text(prompt, num_tokens).split())
    options: dict[str, object] = {"model": "tiny", "max_tokens": num_tokens, "require_worker": False}
    return Undisturbed(prompt, options, token_ids, scripted_text(prompt, num_tokens), len(prompt))


CALM = [expected(prompt) for prompt in ("hello", "hello again", "good day", "good night")]


def submit_and_wait(client: Client, calm: Sequence[Undisturbed] = CALM, num_events: int = 20) -> list[Job]:
    """Submit all, and wait until each has so many events."""
    jobs = [each.submit(client) for each in calm]
    wait_until(lambda: all(job.status().events >= num_events for job in jobs))
    return jobs


def assert_all_as_if_nothing_was(
    jobs: Sequence[Job], calm: Sequence[Undisturbed] = CALM, *, attempts: int | None = None
) -> None:
    """Hold every job against its undisturbed run."""
    for job, each in zip(jobs, calm, strict=True):
        assert_as_if_nothing_was(job, each, attempts=attempts)
