"""The synchronous client: submit jobs, follow them, look at models and workers.

Owns the public calls; what they exchange with the server is in `operations`, how in `connection`. Parallel to
`async_client`.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Unpack, overload

from lamella import limits as limit_operations
from lamella import operations
from lamella.completion import Completion
from lamella.connection import Connection, Privacy, check_seconds
from lamella.embed_draft import EmbedOptions, draft_embed
from lamella.embedding import Embeddings
from lamella.errors import LamellaError
from lamella.job import Job
from lamella.keys import DEFAULT_PREFIX
from lamella.limits import LimitChanges, Limits, UserLimitChanges, UserLimits
from lamella.map_bar import shown_progress
from lamella.map_flight import Outcome
from lamella.map_meter import MapMeter
from lamella.map_prompts import MapOptions, MapPrompt, PromptMap, prompt_map
from lamella.map_run import MapRun
from lamella.map_sync import drive
from lamella.messages import JobStatus, ModelInfo, WorkerInfo
from lamella.registry_calls import CancelStatus
from lamella.request_draft import SubmitOptions, draft_request
from lamella.stream_clock import DEFAULT_HEAL_S, DEFAULT_WAIT_S
from lamella.stream_order import StreamItem


class Client:
    """Speaks to one Lamella service; safe to share between threads; a context manager.

    `url` is redis://, rediss:// or unix://; None means LAMELLA_REDIS_URL, else a running `lamella up`, else
    redis://127.0.0.1:6379/0. `timeout_s` bounds each call; `heal_s` is how long a stream looks for a lost server.
    With `encryption_keys_file` (else LAMELLA_ENCRYPTION_KEYS_FILE) prompts and answers lie encrypted in Redis. `keep_s`
    (else LAMELLA_KEEP_S, else six hours) is how long a job is kept that this client cancels while it waits.

    Raises:
        ConfigError: the URL is not of a known form, or a setting or file of the environment cannot be used.
        RequestError: a time span is not a number above 0.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        prefix: str = DEFAULT_PREFIX,
        timeout_s: float = 10.0,
        heal_s: float = DEFAULT_HEAL_S,
        encryption_keys_file: str | Path | None = None,
        keep_s: int | None = None,
    ) -> None:
        self._heal_s = check_seconds("heal_s", heal_s)
        self._connection = Connection(url, prefix, timeout_s, Privacy(encryption_keys_file, keep_s))

    def __enter__(self) -> Client:
        """Return the client."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the client."""
        self.close()

    def close(self) -> None:
        """Close the connections; harmless when repeated. Jobs go on."""
        self._connection.close()

    @property
    def connection(self) -> Connection:
        """What the client sends through; for parts of this package that do so by themselves, such as `batch_run`."""
        return self._connection

    def submit(self, prompt: str | None = None, **options: Unpack[SubmitOptions]) -> Job:
        """Queue a generation job for a prompt (raw text) or ``messages=`` (a chat), and return its handle.

        Options are those of `SubmitOptions`, among them every sampling key: ``submit("Hi", max_tokens=20)``.

        Raises:
            RequestError: an argument is unknown or unusable; NoWorkerError and IdempotencyConflict are of this kind.
            ServerError: the server did not accept it; nothing was half-done.
        """
        draft = draft_request(prompt, options)
        return self.job(self._connection.run(operations.submit(self._connection.keys, draft, self._connection.ring)))

    def generate(
        self, prompt: str | None = None, *, timeout_s: float = DEFAULT_WAIT_S, **options: Unpack[SubmitOptions]
    ) -> Completion:
        """Submit and wait for the whole text; arguments as in `submit`.

        Raises:
            JobFailed: the job failed.
            WaitTimeout: it has not ended within `timeout_s`; it goes on.
        """
        check_seconds("timeout_s", timeout_s)
        return self.submit(prompt, **options).result(timeout_s)

    def stream(
        self, prompt: str | None = None, *, timeout_s: float = DEFAULT_WAIT_S, **options: Unpack[SubmitOptions]
    ) -> Generator[StreamItem, None, None]:
        """Submit now, and yield ``(seq, event)`` as they come; arguments as in `submit`."""
        check_seconds("timeout_s", timeout_s)
        return self.submit(prompt, **options).stream(timeout_s=timeout_s)

    def submit_embed(self, model: str | None, texts: Sequence[str], **options: Unpack[EmbedOptions]) -> Job:
        """Queue a job for the vectors of texts and return its handle; options are those of `EmbedOptions`.

        `model` None is the only one that is served. The texts of one job ride the same sweeps, with whatever else runs.

        Raises:
            RequestError: an argument is unknown or unusable; NoWorkerError and IdempotencyConflict are of this kind.
            ServerError: the server did not accept it; nothing was half-done.
        """
        draft = draft_embed(model, texts, options)
        return self.job(self._connection.run(operations.submit(self._connection.keys, draft, self._connection.ring)))

    def embed(
        self,
        model: str | None,
        texts: Sequence[str],
        *,
        timeout_s: float = DEFAULT_WAIT_S,
        **options: Unpack[EmbedOptions],
    ) -> Embeddings:
        """Return the vectors of texts; options are those of `EmbedOptions`.

        `model` None is the only one that is served. The texts of one job ride the same sweeps, with whatever else runs.

        Raises:
            RequestError: an argument is unknown or unusable; NoWorkerError and IdempotencyConflict are of this kind.
            ServerError: the server did not accept it; nothing was half-done.
            JobFailed: the job failed.
            WaitTimeout: it has not ended within `timeout_s`; it goes on.
        """
        check_seconds("timeout_s", timeout_s)
        job = self.submit_embed(model, texts, **options)
        return job.embeddings(timeout_s)

    @overload
    def map(
        self, prompts: Iterable[MapPrompt], *, errors: Literal["raise"] = "raise", **options: Unpack[MapOptions]
    ) -> Generator[Completion, None, None]: ...

    @overload
    def map(
        self, prompts: Iterable[MapPrompt], *, errors: Literal["return"], **options: Unpack[MapOptions]
    ) -> Generator[Completion | LamellaError, None, None]: ...

    def map(
        self, prompts: Iterable[MapPrompt], *, errors: str = "raise", **options: Unpack[MapOptions]
    ) -> Generator[Any, None, None]:
        """Run a job for every prompt, a bounded number at a time, and yield their completions in order.

        A prompt is text, a chat (list of messages) or a mapping of submit arguments; options hold for all, see
        `MapOptions`. With an idempotency key a repeated map returns the first one's jobs. Closing the generator cancels
        what is under way.

        Raises:
            RequestError: a setting is unusable, or (with ``errors="raise"``) a prompt.
            JobError: a job did not end in Done, the rest is cancelled; with ``errors="return"`` it is yielded instead.
            WaitTimeout: no job has brought anything for ``timeout_s``.
        """
        return self._map(prompt_map(prompts, errors, options, self._heal_s))

    def _map(self, given: PromptMap) -> Generator[Outcome, None, None]:
        run = MapRun(given.tasks, self._connection.keys, self._connection.ring, given.bounds)
        meter = MapMeter(given.total)
        with (
            shown_progress(given.progress) as show,
            closing(drive(self._connection, run, lambda: show(meter.read(run.counts)))) as results,
        ):
            for result in results:
                if given.raises and isinstance(result.outcome, LamellaError):
                    raise result.outcome
                yield result.outcome

    def job(self, job_id: str) -> Job:
        """Return a handle on a job by its id; nothing is asked of the server."""
        return Job(self._connection, job_id, self._heal_s)

    def status(self, job_id: str) -> JobStatus:
        """Return where a job stands; raises JobNotFound."""
        return self.job(job_id).status()

    def cancel(self, job_id: str) -> CancelStatus:
        """Cancel a job; raises JobNotFound."""
        return self.job(job_id).cancel()

    def retry(self, job_id: str) -> Job:
        """Let a job whose attempts were used up go on as a new job, after its last token; again: the same new job.

        Raises:
            JobNotFound: there is no record of it.
            RequestError: it is not such a job.
        """
        return self.job(self._connection.run(operations.retry(self._connection.keys, job_id)))

    def models(self) -> list[ModelInfo]:
        """Return the models that live workers serve now."""
        return self._connection.run(operations.models(self._connection.keys))

    def workers(self) -> list[WorkerInfo]:
        """Return the live workers."""
        return self._connection.run(operations.workers(self._connection.keys))

    def jobs(self, limit: int = 20) -> list[JobStatus]:
        """Return the newest jobs, newest first."""
        return self._connection.run(operations.jobs(self._connection.keys, limit))

    def dead_jobs(self, limit: int = 20) -> list[JobStatus]:
        """Return the newest jobs whose attempts were used up, newest first; `retry` goes on with one."""
        return self._connection.run(operations.dead_jobs(self._connection.keys, limit))

    def limits(self) -> Limits:
        """Return the limits that hold for all models and users."""
        return self._connection.run(limit_operations.limits(self._connection.keys))

    def set_limits(self, **changes: Unpack[LimitChanges]) -> Limits:
        """Change the limits given (None: take away) and return all; raises RequestError for an unusable one."""
        return self._connection.run(limit_operations.set_limits(self._connection.keys, changes))

    def user_limits(self, user: str) -> UserLimits:
        """Return what one user may do, where it differs from others, and the weight of their share."""
        return self._connection.run(limit_operations.user_limits(self._connection.keys, user))

    def set_user_limits(self, user: str, **changes: Unpack[UserLimitChanges]) -> UserLimits:
        """Change a user's limits or weight (None: as for everybody); raises RequestError for an unusable one."""
        return self._connection.run(limit_operations.set_user_limits(self._connection.keys, user, changes))
