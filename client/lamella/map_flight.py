"""One job among many that are followed together: what it has brought so far, and how it ended.

Owns the commands that look at a job and what their answers mean; does no I/O. A look costs two commands a job in a
transaction that many jobs share, where a stream of each would cost a connection. Neighbours: `map_run` (which jobs are
looked at), `stream_order` (events in order), `completion` (their text).
"""

from __future__ import annotations

from collections.abc import Sequence

from lamella.completion import Completion, CompletionBuilder, EmbeddingsBuilder
from lamella.embedding import Embeddings
from lamella.errors import JobError, LamellaError
from lamella.key_ring import KeyRing
from lamella.keys import Keys
from lamella.messages import Done, JobState, TokenEvent
from lamella.steps import Commands, Operation, answers
from lamella.stream_order import StreamOrder

Brought = Completion | Embeddings
Outcome = Brought | LamellaError


class Flight:
    """A job under way; changed only by `look`.

    Attributes:
        place: which of all jobs it is, counted from 0.
        job_id: the job.
        tokens: tokens it has brought.
        outcome: how it ended; None while it goes on.
        is_leftover: at the first look it was cancelled already, by someone before us.
        is_lost: its events are no longer stored.
    """

    def __init__(self, place: int, job_id: str, ring: KeyRing | None, *, brings_vectors: bool = False) -> None:
        self.place = place
        self.job_id = job_id
        self.tokens = 0
        self.outcome: Outcome | None = None
        self.is_leftover = False
        self.is_lost = False
        self._order = StreamOrder(job_id, 0, ring)
        self._builder = CompletionBuilder(job_id)
        self._vectors = EmbeddingsBuilder(job_id) if brings_vectors else None
        self._is_first_look = True

    def commands(self, keys: Keys) -> tuple[tuple[str | int, ...], ...]:
        """Return the commands whose answers `take` takes."""
        stored = self._order.stored_commands(keys).commands
        if not self._is_first_look:
            return stored
        return (*stored, ("HMGET", keys.job(self.job_id), "state", "cancel"))

    def take(self, raw: Sequence[object]) -> None:
        """Take the answers to `commands`."""
        if self._is_first_look:
            state, cancel = answers(raw[2])
            self._is_first_look = False
            self.is_leftover = state == JobState.CANCELLED.value or cancel is not None
        try:
            self._read(list(raw[:2]))
        except JobError as error:
            self.is_lost = type(error) is JobError  # not one of the kinds that say how a job ended
            self.outcome = error
        except LamellaError as error:  # a key that is missing, an event of another version: this job's alone
            self.outcome = error

    def _read(self, raw: list[object]) -> None:
        for item in self._order.stored(raw):
            if self._vectors is not None:
                self.outcome = self._vectors.add(item)
                continue
            self._builder.add(item)
            match item.event:
                case TokenEvent(token_ids=token_ids):
                    self.tokens += len(token_ids)
                case Done() as done:
                    self.outcome = self._builder.completion(done)
                case _:
                    pass


def look(keys: Keys, flights: Sequence[Flight]) -> Operation[None]:
    """Look at several jobs in one transaction."""
    asked = [flight.commands(keys) for flight in flights]
    raw = answers((yield Commands(tuple(command for each in asked for command in each))))
    start = 0
    for flight, each in zip(flights, asked, strict=True):
        flight.take(raw[start : start + len(each)])
        start += len(each)
