"""The commands about jobs and workers: submit, stream, status, cancel, jobs (and its dead and retry), workers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from lamella.cli import options
from lamella.cli.complete import complete_job
from lamella.cli.follow import echo_events, echo_figures, follow
from lamella.cli.output import age, ahead, echo_columns, echo_json, figures, size
from lamella.errors import RequestError
from lamella.keys import JOBS_LISTED
from lamella.messages import Done, Failed, JobState, JobStatus, Priority, WorkerInfo
from lamella.registry_calls import CancelStatus
from lamella.stream_clock import DEFAULT_WAIT_S

JobId = Annotated[str, typer.Argument(help="The job's id, as `lamella submit` prints it.", autocompletion=complete_job)]


def submit(  # noqa: PLR0913  one argument for each option
    prompt: Annotated[str | None, typer.Argument(help="The prompt; '-' or nothing reads it from stdin.")] = None,
    model: options.Model = None,
    chat: Annotated[bool, typer.Option("--chat/--raw", help="A chat message, or raw text for the model.")] = True,
    max_tokens: options.MaxTokens = None,
    temperature: options.Temperature = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = None,
    seed: options.Seed = None,
    stop: options.Stop = None,
    idempotency_key: Annotated[
        str | None, typer.Option("--idempotency-key", help="Repeating a submit with its key returns the same job.")
    ] = None,
    queue: Annotated[
        bool, typer.Option("--queue", help="Queue the job even if no worker serves the model yet.")
    ] = False,
    user: Annotated[str | None, typer.Option("--user", help="Whose job it is; users share the workers fairly.")] = None,
    priority: Annotated[Priority | None, typer.Option("--priority", help="Higher classes go first (normal).")] = None,
    deadline_s: Annotated[
        float | None, typer.Option("--deadline-s", help="Seconds after which the job is ended, with what it has.")
    ] = None,
    json_schema: Annotated[
        Path | None, typer.Option("--json-schema", help="File with a JSON schema that the answer must follow.")
    ] = None,
    as_json: options.AsJson = False,
    redis_url: options.RedisUrl = None,
    prefix: options.Prefix = options.DEFAULT,
) -> None:
    """Queue a job and print its id; `lamella stream ID` follows it."""
    text = read_prompt(prompt)
    request = options.sampling_options(
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=seed,
        stop=stop,
    )
    request["model"] = model
    request["idempotency_key"] = idempotency_key
    request["require_worker"] = not queue
    request["user"] = user
    request["deadline_s"] = deadline_s
    if priority is not None:
        request["priority"] = priority
    if json_schema is not None:
        request["response_format"] = {"type": "json_schema", "schema": _schema(json_schema)}
    if chat:
        request["messages"] = [{"role": "user", "content": text}]
    with options.open_client(redis_url, prefix) as client:
        job = client.submit(None if chat else text, **request)
    if as_json:
        echo_json({"job_id": job.id})
    else:
        typer.echo(job.id)


def _schema(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"--json-schema {path} cannot be read ({error}); give a file of JSON text") from error


def stream(
    job_id: JobId,
    after: Annotated[int, typer.Option("--after", help="Number of the last event already seen.")] = 0,
    timeout_s: options.TimeoutS = DEFAULT_WAIT_S,
    stats: options.WithStats = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print each event as a line of JSON.")] = False,
    redis_url: options.RedisUrl = None,
    prefix: options.Prefix = options.DEFAULT,
) -> None:
    """Follow a job's text, from its beginning or from an event on; Ctrl-C stops following, not the job."""
    with options.open_client(redis_url, prefix) as client:
        job = client.job(job_id)
        if as_json:
            echo_events(job, after=after, timeout_s=timeout_s)
            return
        done = follow(job, after=after, timeout_s=timeout_s, cancel_on_interrupt=False).done
        if stats and done is not None:
            echo_figures(client, job, done)


def status(
    job_id: JobId,
    as_json: options.AsJson = False,
    redis_url: options.RedisUrl = None,
    prefix: options.Prefix = options.DEFAULT,
) -> None:
    """Print where a job stands."""
    with options.open_client(redis_url, prefix) as client:
        found = client.status(job_id)
    if as_json:
        echo_json(found)
        return
    for name, value in _status_lines(found):
        typer.echo(f"{name:<10} {value}")


def cancel(
    job_id: JobId,
    as_json: options.AsJson = False,
    redis_url: options.RedisUrl = None,
    prefix: options.Prefix = options.DEFAULT,
) -> None:
    """Cancel a job: at once if it waits, at its next sweep if it runs."""
    with options.open_client(redis_url, prefix) as client:
        outcome = client.cancel(job_id)
    if as_json:
        echo_json({"job_id": job_id, "status": outcome.value})
        return
    match outcome:
        case CancelStatus.REQUESTED:
            typer.echo("requested; the worker cancels it at its next sweep")
        case CancelStatus.DONE | CancelStatus.FAILED:
            typer.echo(f"nothing to cancel: the job is already {outcome.value}")
        case _:
            typer.echo("cancelled")


jobs = typer.Typer(
    name="jobs", help="List jobs; those that are dead; and let one of these go on.", pretty_exceptions_enable=False
)

Limit = Annotated[int, typer.Option("--limit", "-n", min=1, max=JOBS_LISTED, help="How many to list.")]


@jobs.callback(invoke_without_command=True)
def list_jobs(
    context: typer.Context,
    limit: Limit = 20,
    as_json: options.AsJson = False,
    redis_url: options.RedisUrl = None,
    prefix: options.Prefix = options.DEFAULT,
) -> None:
    """List the newest jobs, newest first."""
    if context.invoked_subcommand is not None:
        return
    with options.open_client(redis_url, prefix) as client:
        found = client.jobs(limit)
    if as_json:
        echo_json(found)
        return
    rows = [(job.job_id, job.state.value, job.model, str(job.events), age(job.created_at)) for job in found]
    echo_columns(("JOB", "STATE", "MODEL", "EVENTS", "AGE"), rows)


@jobs.command()
def dead(
    limit: Limit = 20,
    as_json: options.AsJson = False,
    redis_url: options.RedisUrl = None,
    prefix: options.Prefix = options.DEFAULT,
) -> None:
    """List the newest jobs whose attempts were used up; `lamella jobs retry JOB` goes on with one."""
    with options.open_client(redis_url, prefix) as client:
        found = client.dead_jobs(limit)
    if as_json:
        echo_json(found)
        return
    rows = [
        (job.job_id, job.model, str(job.attempts), str(job.events), job.worker or "-", age(job.created_at))
        for job in found
    ]
    echo_columns(("JOB", "MODEL", "ATTEMPTS", "EVENTS", "LAST WORKER", "AGE"), rows)


@jobs.command()
def retry(
    job_id: JobId,
    as_json: options.AsJson = False,
    redis_url: options.RedisUrl = None,
    prefix: options.Prefix = options.DEFAULT,
) -> None:
    """Let a dead job go on after its last token, as a new job whose id is printed; repeated, the same one."""
    with options.open_client(redis_url, prefix) as client:
        job = client.retry(job_id)
    if as_json:
        echo_json({"job_id": job.id})
    else:
        typer.echo(job.id)


def workers(
    as_json: options.AsJson = False, redis_url: options.RedisUrl = None, prefix: options.Prefix = options.DEFAULT
) -> None:
    """List the live workers."""
    with options.open_client(redis_url, prefix) as client:
        found = client.workers()
    if as_json:
        echo_json(found)
        return
    rows = [
        (
            worker.name,
            models_of(worker),
            worker.device,
            "draining" if worker.draining else f"{worker.running}/{worker.slots}",
            str(worker.sweeps),
            str(worker.tokens),
            size(worker.peak_rss_bytes),
            age(worker.started_at),
        )
        for worker in found
    ]
    echo_columns(("WORKER", "MODEL", "DEVICE", "RUNNING", "SWEEPS", "TOKENS", "PEAK MEMORY", "UP"), rows)


def models_of(worker: WorkerInfo) -> str:
    """What a worker serves; of several models each with its busy slots."""
    if len(worker.served) == 1:
        return worker.model.name
    return ", ".join(f"{model.name} {model.running}/{model.slots}" for model in worker.served)


def read_prompt(prompt: str | None) -> str:
    """Return the prompt given, or the whole of stdin for '-' or nothing.

    Raises:
        RequestError: stdin is a terminal, or not text.
    """
    if prompt is not None and prompt != "-":
        return prompt
    if prompt is None and sys.stdin.isatty():
        raise RequestError("there is no prompt; give it as an argument, or through a pipe")
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise RequestError(f"stdin is not text ({error.reason} at byte {error.start}); pass UTF-8") from error


def _queue_lines(job: JobStatus) -> list[tuple[str, str]]:
    lines = []
    if job.user is not None:
        lines.append(("user", job.user))
    lines.append(("priority", job.priority.value))
    if job.deadline_at is not None and not job.state.is_final:
        lines.append(("deadline", ahead(job.deadline_at)))
    if job.position is not None and job.state is JobState.QUEUED:
        lines.append(("position", f"{job.position} jobs before it"))
        if job.estimated_start_at is not None:
            lines.append(("start", f"{ahead(job.estimated_start_at)}, about"))
    if job.estimated_end_at is not None:
        lines.append(("end", f"{ahead(job.estimated_end_at)}, about"))
    if job.estimate is not None:
        lines.append(("estimate", job.estimate))
    return lines


def _status_lines(job: JobStatus) -> list[tuple[str, str]]:
    lines = [
        ("job", job.job_id),
        ("state", job.state.value),
        ("model", job.model),
        ("created", f"{age(job.created_at)} ago"),
    ]
    if job.worker is not None:
        lines.append(("worker", job.worker))
    lines += [("attempts", str(job.attempts)), ("events", str(job.events))]
    lines += _queue_lines(job)
    if job.cancel_requested and not job.state.is_final:
        lines.append(("cancel", "requested"))
    match job.outcome:
        case Done(usage=usage):
            lines.append(("figures", figures(usage, None)))
        case Failed(code=code, message=message):
            lines.append(("error", f"{code}: {message}"))
        case _:
            pass
    return lines
