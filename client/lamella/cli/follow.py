"""Follows one job on the terminal: its text to stdout, progress under it, Ctrl-C cancels it."""

from __future__ import annotations

import json
import time
from contextlib import closing
from typing import NamedTuple

import typer

from lamella.cli.output import figures, write_text
from lamella.cli.status_line import StatusLine
from lamella.client import Client
from lamella.embedding import EmbeddingsEvent
from lamella.errors import JobCancelled, JobError, JobFailed
from lamella.job import Job
from lamella.messages import Cancelled, Done, Failed, Progress, TokenEvent
from lamella.stream_order import StreamItem


class Answer(NamedTuple):
    """What came: the text, the terminal event (None if that was seen before), the client's seconds and tokens."""

    text: str
    done: Done | None
    tokens: int
    first_s: float | None
    seconds: float


def follow(job: Job, *, after: int, timeout_s: float, cancel_on_interrupt: bool) -> Answer:
    """Write the job's text as it comes, and return what came.

    Raises:
        JobFailed: the job failed.
        JobCancelled: it was cancelled, here by Ctrl-C or elsewhere.
    """
    view = _AnswerView(job)
    try:
        view.begin()
        with closing(job.stream(after=after, timeout_s=timeout_s)) as items:
            for item in items:
                view.show(item)
    except KeyboardInterrupt:
        if not cancel_on_interrupt:
            raise JobError(job.id, f"interrupted; the job goes on: `lamella stream {job.id}`") from None
        view.end()
        job.cancel()
        raise JobCancelled(job.id) from None
    finally:
        view.end()
    return view.answer()


class _AnswerView:
    """Writes one answer, and how fast it comes."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._line = StatusLine()
        self._texts: list[str] = []
        self._ends_line = True
        self._tokens = 0
        self._first_tokens = 0
        self._done: Done | None = None
        self._started = time.monotonic()
        self._first_at: float | None = None

    def begin(self) -> None:
        """Say that nothing came yet."""
        self._line.draw("waiting for the first token; Ctrl-C cancels", at_once=True)

    def show(self, item: StreamItem) -> None:
        """Show an event; raises for those that end the job without an answer."""
        match item.event:
            case TokenEvent(token_ids=token_ids, text=text):
                self._add(len(token_ids), text)
            case EmbeddingsEvent(count=count, width=width):
                write_text(f"{count} vectors of {width} numbers\n")
            case Progress(prefilled_tokens=read, prompt_tokens=total):
                self._line.draw(f"reading the prompt: {read} of {total} tokens", at_once=True)
            case Failed(code=code, message=message):
                raise JobFailed(self._job.id, code, message)
            case Cancelled():
                raise JobCancelled(self._job.id)
            case Done() as done:
                self._done = done

    def end(self) -> None:
        """End the text with a line of its own; harmless when repeated."""
        self._line.wipe()
        if not self._ends_line:
            write_text("\n")
            self._ends_line = True

    def answer(self) -> Answer:
        """Return what came."""
        now = time.monotonic()
        first_s = None if self._first_at is None else self._first_at - self._started
        return Answer("".join(self._texts), self._done, self._tokens, first_s, now - self._started)

    def _add(self, count: int, text: str) -> None:
        now = time.monotonic()
        self._tokens += count
        if self._first_at is None:
            self._first_at, self._first_tokens = now, self._tokens
        self._texts.append(text)
        if text:
            self._line.wipe()
            write_text(text)
            self._ends_line = text.endswith("\n")
        told = f"{self._tokens} tokens"
        if now > self._first_at and self._tokens > self._first_tokens:
            told += f", {(self._tokens - self._first_tokens) / (now - self._first_at):.1f} tokens/s"
        self._line.draw(told)


def echo_figures(client: Client, job: Job, done: Done) -> None:
    """Print the job's figures on stderr."""
    name = job.status().worker
    worker = next((worker for worker in client.workers() if worker.name == name), None)
    typer.echo(f"[{figures(done.usage, worker)}]", err=True)


def echo_events(job: Job, *, after: int, timeout_s: float) -> None:
    """Print each event as one line of JSON, with its number, and raise at the end for a job that brought no answer."""
    with closing(job.stream(after=after, timeout_s=timeout_s)) as items:
        for item in items:
            typer.echo(json.dumps({"seq": item.seq, **item.event.model_dump(mode="json", exclude_none=True)}))
            match item.event:
                case Failed(code=code, message=message):
                    raise JobFailed(job.id, code, message)
                case Cancelled():
                    raise JobCancelled(job.id)
                case _:
                    pass
