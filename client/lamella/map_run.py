"""Many jobs, a bounded number of them at once, with their results in order; does no I/O.

Owns which job is sent next, how many are under way, what is sent again, and the order of the results. The drivers
(`map_sync`, `map_async`) carry its operations to the server and wait between two looks; `map_prompts` and `batch_run`
say what the jobs are.

Every job has an idempotency key, so an operation whose answer was lost is simply carried out again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from typing import NamedTuple, Protocol

from lamella import operations
from lamella.embed_draft import EmbedDraft
from lamella.errors import JobCancelled, JobNotFound, LamellaError, NoWorkerError, QueueFull, RequestError, ServerError
from lamella.key_ring import KeyRing
from lamella.keys import Keys
from lamella.map_closing import Closing, find_job, stop_job
from lamella.map_flight import Flight, Outcome, look
from lamella.messages import WorkerInfo
from lamella.request_draft import RequestDraft
from lamella.steps import Operation

SENT_AT_ONCE = 32  # jobs sent between two looks
LOOKED_AT_ONCE = 64  # jobs in one transaction
SLOTS_EVERY_S = 3.0  # how often the workers are counted
JOBS_A_SLOT = 2  # one that runs, one that waits, so that no slot stands empty
MOST_IN_FLIGHT = 1000
FEWEST_IN_FLIGHT = 2  # while no worker tells its slots
SHORTEST_PAUSE_S, LONGEST_PAUSE_S = 0.04, 0.4
LONGEST_RETRY_S = 2.0  # until a full queue is tried again
PARKED_S = 1.0  # between two tries of a model that nobody serves
ATTEMPTS = 50  # jobs tried for one task: each leftover of an interrupted run takes one


Draft = RequestDraft | EmbedDraft
Submit = Callable[[Keys, Draft, KeyRing | None], Operation[str]]


class Task(Protocol):
    """One job to be: `place` counts from 0 without gaps, though tasks may come in another order."""

    @property
    def place(self) -> int:
        """Which of all tasks it is."""

    def draft(self, attempt: int) -> Draft:
        """Return the request; its idempotency key differs from attempt to attempt. Raises RequestError."""


class MapResult(NamedTuple):
    """What came of one task: its completion, or the error it ended with."""

    place: int
    outcome: Outcome


class MapCounts(NamedTuple):
    """Tasks ended and of these failed, jobs under way, tokens brought."""

    ended: int = 0
    failed: int = 0
    in_flight: int = 0
    tokens: int = 0


class MapBounds(NamedTuple):
    """How many jobs may be under way (None: as the workers' slots ask for), and how long to be patient.

    `ahead` bounds the tasks taken whose result is not delivered yet (None: four times those under way); `silence_s`
    ends a run that hears nothing, `away_s` one whose server is away; a model that nobody serves is waited for
    `grace_s`. With `resumes` the idempotency keys may be those of an earlier run, so a job that was cancelled before
    it was looked at is taken for a leftover and replaced. With `leaves` the jobs under way go on when the run is left
    early: the same run, begun again, finds them.
    """

    in_flight: int | None = None
    ahead: int | None = None
    silence_s: float = 3600.0
    away_s: float = 60.0
    grace_s: float = 0.0
    resumes: bool = False
    leaves: bool = False


class MapRun:
    """The state of one run; changed only by its driver, which sends each job with `submit`."""

    def __init__(
        self,
        tasks: Iterator[Task],
        keys: Keys,
        ring: KeyRing | None,
        bounds: MapBounds,
        submit: Submit = operations.submit,
    ) -> None:
        self.bounds = bounds
        self._send_job = submit
        self._closing: Closing | None = None
        self._stopped: set[int] = set()  # places of jobs that are to end at once
        self._searched = 0  # tasks looked for of those that may have been sent
        self._unsure = 0
        self._tasks = tasks
        self._keys = keys
        self._ring = ring
        self._waiting: list[tuple[Task, int]] = []  # to be sent next, with the attempt
        self._parked: list[tuple[Task, int]] = []  # nobody serves their model; tried again now and then
        self._parked_until = 0.0
        self._sent: dict[int, tuple[Task, int]] = {}
        self._flights: dict[int, Flight] = {}
        self._results: dict[int, Outcome] = {}
        self._taken = 0
        self._delivered = 0
        self._ended = 0
        self._failed = 0
        self._is_exhausted = False
        self._slots = 0
        self._slots_at = float("-inf")
        self._models: set[str] = set()  # those a job was accepted for
        self._default_model: str | None = None
        self._missing_since: dict[str, float] = {}
        self._not_before = 0.0  # the queue is full until then
        self._tokens = 0
        self._heard_at = time.monotonic()
        self._pause_s = SHORTEST_PAUSE_S

    @property
    def is_finished(self) -> bool:
        """True once every task has a result and all of them were delivered."""
        return self._is_exhausted and self._delivered == self._taken

    @property
    def silent_s(self) -> float:
        """Seconds since a job last brought something."""
        return time.monotonic() - self._heard_at

    @property
    def pause_s(self) -> float:
        """How long to wait before the next look: the longer, the more jobs, and the less they bring."""
        return min(self._pause_s + len(self._flights) * 0.001, LONGEST_PAUSE_S)

    @property
    def counts(self) -> MapCounts:
        """How far it is."""
        return MapCounts(self._ended, self._failed, len(self._flights), self._tokens)

    def operations(self) -> Generator[Operation[None], None, None]:
        """Yield what one round asks of the server: count slots, send jobs, look at those under way."""
        if self._closing is not None:
            yield self._end_rest(self._closing)
        else:
            if self.bounds.in_flight is None and time.monotonic() - self._slots_at >= SLOTS_EVERY_S:
                yield self._count_slots()
            yield self._send()
        flights = list(self._flights.values())
        before = self._tokens, self._ended
        for start in range(0, len(flights), LOOKED_AT_ONCE):
            yield self._look(flights[start : start + LOOKED_AT_ONCE])
        if (self._tokens, self._ended) != before or not flights:
            self._heard_at = time.monotonic()
            self._pause_s = SHORTEST_PAUSE_S
        else:
            self._pause_s = min(self._pause_s * 1.5, LONGEST_PAUSE_S)

    def ready(self) -> Generator[MapResult, None, None]:
        """Yield the results that are next in order."""
        while self._delivered in self._results:
            place = self._delivered
            self._delivered += 1
            yield MapResult(place, self._results.pop(place))

    def close(self, closing: Closing) -> None:
        """Send nothing more: what has not begun ends with the closing's error, what runs is waited for if it says so.

        May be called again with a closing that is stricter.
        """
        if self._closing is None:
            self._unsure = len(self._waiting)  # of these one may have been sent, without an answer that said so
        self._closing = closing

    def cancel_rest(self) -> Generator[Operation[None], None, None]:
        """Yield what cancels the jobs that are under way, unless they are to go on."""
        if self.bounds.leaves:
            return
        for flight in list(self._flights.values()):
            yield self._cancel(flight.job_id)

    def _cancel(self, job_id: str) -> Operation[None]:
        try:
            yield from operations.cancel(self._keys, job_id)
        except JobNotFound:
            return  # there is nothing to cancel

    def _end_rest(self, closing: Closing) -> Operation[None]:
        """End every task that no job was sent for, and stop the jobs that are not waited for."""
        for task, _ in self._parked:
            self._end(task.place, closing.error)
        self._parked = []
        for flight in list(self._flights.values()):
            if flight.place not in self._stopped and (yield from stop_job(self._keys, flight.job_id, closing)):
                self._stopped.add(flight.place)
        for _ in range(self.bounds.ahead or LOOKED_AT_ONCE):
            if not self._waiting and not self._take(MOST_IN_FLIGHT):
                return
            task = self._waiting[0][0]
            found = None
            if self._searched < max(closing.searched, self._unsure):
                found = yield from find_job(self._keys, task, ATTEMPTS)
                self._searched += 1
            self._waiting.pop(0)
            if found is None:
                self._end(task.place, closing.error)
            else:
                self._follow(task, 0, found, task.draft(0))

    def _follow(self, task: Task, attempt: int, job_id: str, draft: Draft) -> None:
        self._flights[task.place] = Flight(task.place, job_id, self._ring, brings_vectors=isinstance(draft, EmbedDraft))
        self._sent[task.place] = (task, attempt)

    def _count_slots(self) -> Operation[None]:
        workers = yield from operations.workers(self._keys)
        self._slots = _slots(workers, self._models) or self._slots
        self._slots_at = time.monotonic()

    def _most_in_flight(self) -> int:
        if self.bounds.in_flight is not None:
            return self.bounds.in_flight
        return max(FEWEST_IN_FLIGHT, min(JOBS_A_SLOT * self._slots, MOST_IN_FLIGHT))

    def _send(self) -> Operation[None]:
        most = self._most_in_flight()
        if self._parked and time.monotonic() >= self._parked_until:
            self._waiting, self._parked = [*self._waiting, *self._parked], []
            self._parked_until = time.monotonic() + PARKED_S
        for _ in range(SENT_AT_ONCE):
            if len(self._flights) >= most or time.monotonic() < self._not_before:
                return
            if not self._waiting and not self._take(most):
                return
            yield from self._send_next()

    def _send_next(self) -> Operation[None]:
        """Send the first job that waits; what the server does not answer leaves it waiting, under the same key."""
        task, attempt = self._waiting[0]
        try:
            draft = task.draft(attempt)
            job_id = yield from self._submit(draft)
        except QueueFull as error:
            self._not_before = time.monotonic() + min(max(error.retry_after_s, 0.5), LONGEST_RETRY_S)
            return
        except NoWorkerError as error:
            if self._is_waited_for(error.model):
                self._parked.append((task, attempt))
            else:
                self._end(task.place, error)
        except ServerError:
            raise
        except LamellaError as error:
            self._end(task.place, error)
        else:
            self._follow(task, attempt, job_id, draft)
        self._waiting.pop(0)

    def _take(self, most: int) -> bool:
        ahead = self.bounds.ahead or 4 * most
        if self._is_exhausted or self._taken - self._delivered >= ahead:
            return False
        task = next(self._tasks, None)
        if task is None:
            self._is_exhausted = True
            return False
        self._taken += 1
        self._waiting.append((task, 0))
        return True

    def _submit(self, draft: Draft) -> Operation[str]:
        """Send one job; a model that served once is not asked for again, since its worker may just be coming back."""
        model = draft.model or self._default_model
        if model is None:
            model = yield from operations.choose_model(self._keys, draft)
            self._default_model = model
        must_be_served = draft.require_worker and model not in self._models
        draft = replace(draft, model=model, require_worker=must_be_served)
        job_id = yield from self._send_job(self._keys, draft, self._ring)
        self._models.add(model)
        self._missing_since.pop(model, None)
        return job_id

    def _is_waited_for(self, model: str) -> bool:
        since = self._missing_since.setdefault(model, time.monotonic())
        if time.monotonic() - since >= self.bounds.grace_s:
            return False
        self._heard_at = time.monotonic()
        return True

    def _look(self, flights: list[Flight]) -> Operation[None]:
        before = sum(flight.tokens for flight in flights)
        yield from look(self._keys, flights)
        self._tokens += sum(flight.tokens for flight in flights) - before
        for flight in flights:
            task, attempt = self._sent[flight.place]
            is_leftover = flight.is_leftover and self.bounds.resumes
            is_void = is_leftover or flight.is_lost or isinstance(flight.outcome, JobNotFound)
            if is_void and attempt + 1 < ATTEMPTS and self._closing is None:
                self._forget(flight.place)
                self._waiting.insert(0, (task, attempt + 1))
            elif flight.outcome is not None:
                self._forget(flight.place)
                self._end(flight.place, self._told(flight, is_void=is_void))

    def _told(self, flight: Flight, *, is_void: bool) -> Outcome:
        """Return how a job ended: one that ended because of the closing says so."""
        assert flight.outcome is not None  # noqa: S101  # looked at by the caller
        if self._closing is not None and (is_void or isinstance(flight.outcome, JobCancelled)):
            return self._closing.error
        return flight.outcome

    def _forget(self, place: int) -> None:
        del self._flights[place]
        del self._sent[place]

    def _end(self, place: int, outcome: Outcome) -> None:
        self._results[place] = outcome
        self._ended += 1
        self._failed += isinstance(outcome, LamellaError)


def _slots(workers: list[WorkerInfo], models: set[str]) -> int:
    """Count the slots of workers that serve one of the models; of all workers while no model is known."""
    served = [model for worker in workers if not worker.draining for model in worker.served]
    return sum(model.slots for model in served if not models or model.name in models)


def check_in_flight(in_flight: object) -> int | None:
    """Return `in_flight` if it can bound the jobs under way; None leaves it to the workers' slots.

    Raises:
        RequestError: it is no whole number from 1 to MOST_IN_FLIGHT.
    """
    if in_flight is None:
        return None
    if isinstance(in_flight, bool) or not isinstance(in_flight, int) or not 1 <= in_flight <= MOST_IN_FLIGHT:
        raise RequestError(f"in_flight is {in_flight!r}; use a whole number from 1 to {MOST_IN_FLIGHT}, or None")
    return in_flight
