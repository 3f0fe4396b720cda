"""A finished job's text, gathered from its events; does no I/O."""

from __future__ import annotations

from dataclasses import dataclass

from lamella.chat import ToolCall
from lamella.embedding import Embeddings, EmbeddingsEvent
from lamella.errors import JobCancelled, JobError, JobFailed
from lamella.messages import Cancelled, Done, Failed, Progress, TokenEvent, TokenLogprob, Usage
from lamella.stream_order import StreamItem
from lamella.tool_calls import AnswerDelta, ToolCallParser


@dataclass(frozen=True)
class Completion:
    """What a job brought.

    Attributes:
        job_id: the job.
        text: the generated text.
        token_ids: the generated tokens.
        finish_reason: ``stop`` (end token, stop string or stop id), ``length``, or ``tool_calls``.
        usage: what it cost.
        logprobs: one entry a token, if asked for.
        tool_calls: the calls of tools in the answer; they are not part of `text`.
    """

    job_id: str
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    usage: Usage
    logprobs: tuple[TokenLogprob, ...] | None = None
    tool_calls: tuple[ToolCall, ...] = ()


class CompletionBuilder:
    """Gathers a job's events, from the first to the terminal one."""

    def __init__(self, job_id: str) -> None:
        self._job_id = job_id
        self._last = 0
        self._texts: list[str] = []
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        self._parser: ToolCallParser | None = None

    def add(self, item: StreamItem) -> str:
        """Take the next event and return the text it adds; calls of tools are not text.

        Raises:
            As `delta`.
        """
        return self.delta(item).text

    def delta(self, item: StreamItem) -> AnswerDelta:
        """Take the next event and return what it adds, text and parts of calls.

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
            case TokenEvent() as event:
                self._token_ids.extend(event.token_ids)
                self._logprobs.extend(event.logprobs or ())
                if event.tool_format is not None:
                    self._parser = ToolCallParser(event.tool_format, self._job_id)
                return self._kept(AnswerDelta(event.text) if self._parser is None else self._parser.push(event.text))
            case Failed(code=code, message=message):
                raise JobFailed(self._job_id, code, message)
            case Cancelled():
                raise JobCancelled(self._job_id)
            case EmbeddingsEvent():
                raise JobError(
                    self._job_id, f"job {self._job_id} brings embeddings and no text; read them with Job.embeddings()"
                )
            case Done() if self._parser is not None:
                return self._kept(self._parser.end())
            case Done() | Progress():
                return AnswerDelta("")

    def _kept(self, delta: AnswerDelta) -> AnswerDelta:
        self._texts.append(delta.text)
        return delta

    def completion(self, done: Done) -> Completion:
        """Return the whole, given the event that ended it."""
        calls = () if self._parser is None else self._parser.calls
        return Completion(
            job_id=self._job_id,
            text="".join(self._texts),
            token_ids=tuple(self._token_ids),
            finish_reason="tool_calls" if calls and done.finish_reason == "stop" else done.finish_reason,
            usage=done.usage,
            logprobs=tuple(self._logprobs) if self._logprobs else None,
            tool_calls=calls,
        )


class EmbeddingsBuilder:
    """Gathers the events of a job of embeddings."""

    def __init__(self, job_id: str) -> None:
        self._job_id = job_id
        self._event: EmbeddingsEvent | None = None

    def add(self, item: StreamItem) -> Embeddings | None:
        """Take the next event; the whole with the last one.

        Raises:
            JobFailed: the job failed.
            JobCancelled: the job was cancelled.
            JobError: the job generates text, or its vectors are no longer stored.
        """
        match item.event:
            case EmbeddingsEvent() as event:
                self._event = event
            case Failed(code=code, message=message):
                raise JobFailed(self._job_id, code, message)
            case Cancelled():
                raise JobCancelled(self._job_id)
            case TokenEvent():
                raise JobError(self._job_id, f"job {self._job_id} generates text; read it with Job.result()")
            case Done(usage=usage):
                if self._event is None:
                    raise JobError(
                        self._job_id,
                        f"job {self._job_id} is done, but has no vectors: it generated text, or they were deleted on "
                        "the server",
                    )
                return Embeddings(self._job_id, self._event.vectors, usage)
            case Progress():
                pass
        return None
