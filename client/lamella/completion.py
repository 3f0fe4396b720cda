"""A finished job's text, gathered from its events; does no I/O."""

from __future__ import annotations

from dataclasses import dataclass

from lamella.errors import JobCancelled, JobError, JobFailed
from lamella.messages import Cancelled, Done, Failed, Progress, TokenEvent, TokenLogprob, Usage
from lamella.stream_order import StreamItem


@dataclass(frozen=True)
class Completion:
    """What a job brought.

    Attributes:
        job_id: the job.
        text: the generated text.
        token_ids: the generated tokens.
        finish_reason: ``stop`` (end token, stop string or stop id) or ``length``.
        usage: what it cost.
        logprobs: one entry a token, if asked for.
    """

    job_id: str
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    usage: Usage
    logprobs: tuple[TokenLogprob, ...] | None = None


class CompletionBuilder:
    """Gathers a job's events, from the first to the terminal one."""

    def __init__(self, job_id: str) -> None:
        self._job_id = job_id
        self._last = 0
        self._texts: list[str] = []
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprob] = []

    def add(self, item: StreamItem) -> str:
        """Take the next event and return the text it adds.

        Raises:
            JobFailed: the job failed.
            JobCancelled: the job was cancelled.
            JobError: the job is done, but its tokens are no longer stored.
        """
        if item.seq is not None:
            if item.seq != self._last + 1 and isinstance(item.event, Done):
                raise JobError(
                    self._job_id,
                    f"job {self._job_id} is done, but its tokens are no longer stored: they were deleted on the "
                    "server. Submit the request again.",
                )
            self._last = item.seq
        match item.event:
            case TokenEvent(token_ids=token_ids, text=text, logprobs=logprobs):
                self._texts.append(text)
                self._token_ids.extend(token_ids)
                self._logprobs.extend(logprobs or ())
                return text
            case Failed(code=code, message=message):
                raise JobFailed(self._job_id, code, message)
            case Cancelled():
                raise JobCancelled(self._job_id)
            case Done() | Progress():
                return ""

    def completion(self, done: Done) -> Completion:
        """Return the whole, given the event that ended it."""
        return Completion(
            job_id=self._job_id,
            text="".join(self._texts),
            token_ids=tuple(self._token_ids),
            finish_reason=done.finish_reason,
            usage=done.usage,
            logprobs=tuple(self._logprobs) if self._logprobs else None,
        )
