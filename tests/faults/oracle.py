"""What has to be true of a job after any fault.

Exactly one terminal event, and the job's state says the same; events numbered 1, 2, 3, ... each once; the text and the
tokens of the undisturbed run; the usage counted once.
"""

from __future__ import annotations

from dataclasses import dataclass

from lamella.client import Client
from lamella.job import Job
from lamella.messages import Done, JobState, TokenEvent
from lamella.stream_order import StreamItem

READ_S = 60.0


@dataclass(frozen=True)
class Undisturbed:
    """A request and what becomes of it where nothing goes wrong."""

    prompt: str
    options: dict[str, object]
    token_ids: tuple[int, ...]
    text: str
    prompt_tokens: int

    def submit(self, client: Client) -> Job:
        """Ask for the same again."""
        return client.submit(self.prompt, **self.options)  # type: ignore[arg-type]  # options of `submit`


def undisturbed(client: Client, model: str, prompt: str, **options: object) -> Undisturbed:
    """Run a request to its end, and remember what it brought."""
    asked = {"model": model, "ignore_eos": True, "require_worker": False, **options}
    job = client.submit(prompt, **asked)  # type: ignore[arg-type]  # as above
    result = job.result(timeout_s=READ_S)
    return Undisturbed(prompt, asked, tuple(result.token_ids), result.text, result.usage.prompt_tokens)


def assert_as_if_nothing_was(job: Job, expected: Undisturbed, *, attempts: int | None = None) -> list[StreamItem]:
    """Read the job's stream to its end and hold it against the undisturbed run; returns the numbered events."""
    items = [item for item in job.stream(timeout_s=READ_S) if item.seq is not None]
    assert [item.seq for item in items] == list(range(1, len(items) + 1)), "numbered 1 to n, each once"
    tokens = [item.event for item in items if isinstance(item.event, TokenEvent)]
    assert len(tokens) == len(items) - 1, "one terminal event, the last one"
    last = items[-1].event
    assert isinstance(last, Done), f"it ended in {last}"
    assert tuple(token_id for event in tokens for token_id in event.token_ids) == expected.token_ids
    assert "".join(event.text for event in tokens) == expected.text
    assert last.usage.completion_tokens == len(expected.token_ids), "what a resumed job had before is counted once"
    assert last.usage.prompt_tokens == expected.prompt_tokens
    status = job.status()
    assert (status.state, status.events, status.outcome) == (JobState.DONE, len(items), last)
    if attempts is not None:
        assert status.attempts == attempts, f"{status.attempts} attempts of {job.id}"
    return items
