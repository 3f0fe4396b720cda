"""Follows one job on the terminal: its text to stdout, progress to stderr, Ctrl-C cancels it."""

from __future__ import annotations

import sys
from contextlib import closing

import typer

from lamella.cli.output import figures, write_text
from lamella.client import Client
from lamella.embedding import EmbeddingsEvent
from lamella.errors import JobCancelled, JobError, JobFailed
from lamella.job import Job
from lamella.messages import Cancelled, Done, Failed, Progress, TokenEvent
from lamella.stream_order import StreamItem


def follow(job: Job, *, after: int, timeout_s: float, cancel_on_interrupt: bool) -> tuple[str, Done | None]:
    """Write the job's text as it comes; return it with the terminal event (None if that was seen before `after`).

    Raises:
        JobFailed: the job failed.
        JobCancelled: it was cancelled, here by Ctrl-C or elsewhere.
    """
    texts: list[str] = []
    done: Done | None = None
    try:
        with closing(job.stream(after=after, timeout_s=timeout_s)) as items:
            for item in items:
                done = _show(job, item, texts)
    except KeyboardInterrupt:
        if not cancel_on_interrupt:
            raise JobError(job.id, f"interrupted; the job goes on: `lamella stream {job.id}`") from None
        job.cancel()
        raise JobCancelled(job.id) from None
    finally:
        if texts and not texts[-1].endswith("\n"):
            write_text("\n")
    return "".join(texts), done


def _show(job: Job, item: StreamItem, texts: list[str]) -> Done | None:
    match item.event:
        case TokenEvent(text=text):
            texts.append(text)
            write_text(text)
        case EmbeddingsEvent(count=count, width=width):
            write_text(f"{count} vectors of {width} numbers")
        case Progress(prefilled_tokens=read, prompt_tokens=total):
            _show_progress(read, total)
        case Failed(code=code, message=message):
            raise JobFailed(job.id, code, message)
        case Cancelled():
            raise JobCancelled(job.id)
        case Done() as done:
            return done
    return None


def echo_figures(client: Client, job: Job, done: Done) -> None:
    """Print the job's figures on stderr."""
    name = job.status().worker
    worker = next((worker for worker in client.workers() if worker.name == name), None)
    typer.echo(f"[{figures(done.usage, worker)}]", err=True)


def _show_progress(read: int, total: int) -> None:
    if sys.stderr.isatty():
        typer.echo(f"\rreading the prompt: {read} of {total} tokens\r", err=True, nl=False)
        if read >= total:
            typer.echo("\r\033[K", err=True, nl=False)
