"""A handle on one job, synchronous; it holds nothing but the id, so it can be made anew at any time."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing

from lamella import operations
from lamella.completion import Completion, CompletionBuilder, EmbeddingsBuilder
from lamella.connection import Connection
from lamella.embedding import Embeddings
from lamella.errors import JobError
from lamella.messages import Done, JobStatus
from lamella.registry_calls import CancelStatus
from lamella.stream import read_stream
from lamella.stream_clock import DEFAULT_WAIT_S
from lamella.stream_order import StreamItem


class Job:
    """One job; made by `Client.submit` and `Client.job`.

    Attributes:
        id: the job's id; ``client.job(id)`` gives this handle again, also in another process.
    """

    def __init__(self, connection: Connection, job_id: str, heal_s: float) -> None:
        self.id = operations.check_job_id(job_id)
        self._connection = connection
        self._heal_s = heal_s

    def __repr__(self) -> str:
        """Show the id."""
        return f"Job({self.id!r})"

    def stream(self, after: int = 0, timeout_s: float = DEFAULT_WAIT_S) -> Generator[StreamItem, None, None]:
        """Yield ``(seq, event)`` for every event numbered above `after`, live, ending after the terminal event.

        Progress comes with seq None. Nothing is lost or repeated when the connection breaks.

        Raises:
            JobNotFound: there is no record of the job.
            WaitTimeout: the job has not ended within `timeout_s`; it goes on.
            ServerUnreachable: the server was away for longer than the client heals.
        """
        return read_stream(self._connection, self.id, after, timeout_s, self._heal_s)

    def text_stream(self, timeout_s: float = DEFAULT_WAIT_S) -> Generator[str, None, None]:
        """Yield the text from its beginning, piece by piece.

        Raises:
            JobFailed: the job failed.
            JobCancelled: the job was cancelled.
            WaitTimeout: the job has not ended within `timeout_s`; it goes on.
        """
        builder = CompletionBuilder(self.id)
        with closing(self.stream(timeout_s=timeout_s)) as items:
            for item in items:
                if text := builder.add(item):
                    yield text

    def result(self, timeout_s: float = DEFAULT_WAIT_S) -> Completion:
        """Wait for the end and return the whole.

        Raises:
            JobFailed: the job failed.
            JobCancelled: the job was cancelled.
            WaitTimeout: the job has not ended within `timeout_s`; it goes on.
        """
        builder = CompletionBuilder(self.id)
        with closing(self.stream(timeout_s=timeout_s)) as items:
            for item in items:
                builder.add(item)
                if isinstance(item.event, Done):
                    return builder.completion(item.event)
        raise JobError(self.id, f"the events of job {self.id} ended without a terminal one")

    def embeddings(self, timeout_s: float = DEFAULT_WAIT_S) -> Embeddings:
        """Wait for the end of a job of embeddings and return the vectors.

        Raises:
            JobFailed: the job failed.
            JobCancelled: the job was cancelled.
            JobError: the job generates text.
            WaitTimeout: the job has not ended within `timeout_s`; it goes on.
        """
        builder = EmbeddingsBuilder(self.id)
        with closing(self.stream(timeout_s=timeout_s)) as items:
            for item in items:
                if (found := builder.add(item)) is not None:
                    return found
        raise JobError(self.id, f"the events of job {self.id} ended without a terminal one")

    def status(self) -> JobStatus:
        """Return where the job stands.

        Raises:
            JobNotFound: there is no record of the job.
        """
        return self._connection.run(operations.status(self._connection.keys, self.id))

    def cancel(self) -> CancelStatus:
        """Cancel the job: at once if it waits, at its next sweep boundary if it runs.

        Raises:
            JobNotFound: there is no record of the job.
        """
        return self._connection.run(operations.cancel(self._connection.keys, self.id))
