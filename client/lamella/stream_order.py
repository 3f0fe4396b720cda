"""The order of a job's events: each once, none missed, and an end; does no I/O.

Owns sequence numbers, gaps and duplicates, and the choice of what to deliver when the stored events are gone. The
readers (`stream`, `async_stream`) feed it with what was published and with what is stored, and read the stored events
whenever it is `behind`.
"""

from __future__ import annotations

from typing import NamedTuple

from lamella.errors import DecodeError, JobError, JobNotFound
from lamella.job_seal import JobSeal
from lamella.key_ring import KeyRing
from lamella.keys import Keys
from lamella.messages import Cancelled, Done, Failed, JobState, Progress, StreamEvent, decode_event
from lamella.records import decode_outcome
from lamella.steps import Commands, answers, commands

PAGE = 1000  # stored events read at once


class StreamItem(NamedTuple):
    """One event and its number; progress has none, because it is not stored."""

    seq: int | None
    event: StreamEvent


class StreamOrder:
    """Puts one job's events in order; changed only by its reader.

    Attributes:
        last: number of the last event delivered.
        behind: True while stored events must be read before published ones make sense.
        ended: True once nothing more will come.
    """

    def __init__(self, job_id: str, after: int, ring: KeyRing | None = None) -> None:
        self.job_id = job_id
        self._seal = JobSeal(ring)
        self.last = after
        self.behind = True
        self.ended = False

    def stored_commands(self, keys: Keys) -> Commands:
        """Return the transaction whose answers `stored` takes: the record's end and the next page of events."""
        return commands(
            ("HMGET", keys.job(self.job_id), "state", "seq", "outcome"),
            ("XRANGE", keys.stream(self.job_id), f"({self.last}-0", "+", "COUNT", PAGE),
        )

    def live(self, published: str) -> list[StreamItem]:
        """Take one published message; an event that leaves a gap is left to the stored ones."""
        head, _, body = published.partition(" ")
        if head == "-":
            return [StreamItem(None, decode_event(body))]
        if not head.isdecimal():
            raise DecodeError(f"a message on the channel of job {self.job_id} has no event number")
        seq = self._number(head)
        if seq <= self.last:
            return []
        if seq > self.last + 1:
            self.behind = True
            return []
        return [self._next(seq, body)]

    def stored(self, raw: object) -> list[StreamItem]:
        """Take the answers to `stored_commands`.

        Raises:
            JobNotFound: there is no record of the job.
            JobError: events are missing from what is stored.
        """
        record, entries = answers(raw)
        state, seq, outcome = answers(record)
        if state is None:
            raise JobNotFound(self.job_id)
        page = answers(entries)
        items = [self._next(*self._entry(entry)) for entry in page]
        self.behind = len(page) == PAGE
        if self.behind or self.ended:
            return items
        highest = self._number(seq)
        if self._state(state).is_final:
            self.ended = True
            if highest > self.last and outcome is not None:
                self.last = highest
                items.append(StreamItem(highest, decode_outcome(str(outcome))))
        elif highest > self.last:
            raise self._lost(highest)
        return items

    def _entry(self, entry: object) -> tuple[int, str]:
        if not isinstance(entry, list | tuple) or len(entry) != 2 or not isinstance(entry[1], dict):
            raise DecodeError(f"a stored event of job {self.job_id} is not of a form this version reads")
        seq = self._number(str(entry[0]).partition("-")[0])
        if seq != self.last + 1:
            raise self._lost(seq - 1)
        return seq, str(entry[1].get("e"))

    def _number(self, raw: object) -> int:
        text = str(raw)
        if not (text.isascii() and text.isdecimal() and len(text) <= 19):
            raise DecodeError(f"the record of job {self.job_id} has an event number that is none: {text[:40]!r}")
        return int(text)

    def _state(self, raw: object) -> JobState:
        try:
            return JobState(str(raw))
        except ValueError as error:
            raise DecodeError(
                f"job {self.job_id} is in a state this version does not know: {str(raw)[:40]!r}"
            ) from error

    def _next(self, seq: int, body: str) -> StreamItem:
        event = decode_event(self._seal.open_event(seq, body))
        self.last = seq
        self.ended = isinstance(event, Done | Failed | Cancelled | Progress)
        return StreamItem(seq, event)

    def _lost(self, to: int) -> JobError:
        return JobError(
            self.job_id,
            f"events {self.last + 1} to {to} of job {self.job_id} are no longer stored, so its text cannot be "
            "completed: they were deleted on the server. Submit the request again.",
        )
