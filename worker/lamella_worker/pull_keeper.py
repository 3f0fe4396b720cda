"""Brings models into this host's store when somebody asks for it through the registry, one after the other.

Owns the requests of this worker, their order and what is told of them. A pull runs in a process of its own
(`pull_process`), so that this one never loads torch; jobs go on meanwhile. Whoever asks for what is under way already
is told of that. Neighbours: `lamella.pulls` asks, `security_table` says what may be asked for.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import redis
from redis.exceptions import RedisError

from lamella.errors import ConfigError, DecodeError
from lamella.keys import PULL_LIVE_TTL_S, PULL_TOLD_TTL_S, Keys
from lamella.pull_messages import MAX_ASKERS, PullRequest, PullState, PullStatus, decode_pull_request
from lamella_worker.config import EngineTable
from lamella_worker.engine_messages import Progress
from lamella_worker.pull_process import PullProcess
from lamella_worker.stoppable_thread import StoppableThread

log = logging.getLogger(__name__)

LOOK_S = 1.0
MOST_WAITING = 8
_MOST_TAKEN = 16  # requests in one look
_MOST_TEXT = 4000
_NOTHING = Progress("", 0, 0)
_LANDING = Progress("open", 0, 0)

Start = Callable[[str, EngineTable], PullProcess]
Land = Callable[[str], str]


def tell_how_to_serve(model: str) -> str:
    """What comes next where the worker itself does not serve the model."""
    return f"start a worker on this host with `lamella worker --model {model}`"


@dataclass
class _Pull:
    """A model that was asked for."""

    model: str
    opened_as: str
    asks: list[str]
    serve: bool
    process: PullProcess | None = None
    landing: Future[str] | None = None
    told: tuple[PullState, Progress, int] | None = field(default=None)
    told_at: float = float("-inf")


class PullKeeper:
    """A thread that takes requests and tells of them until it is stopped.

    Args:
        client: a connection of its own or shared; used by this thread only while it runs.
        keys: the names.
        name: the worker's.
        engine: the store, the peers, and whether the hub may be asked.
        admitted: the name under which a model may be opened; raises ConfigError where it may not.
        land: called with the model once its shards are there and it is to be served; returns what to tell.
        start: starts the process.
    """

    def __init__(
        self,
        client: redis.Redis,
        keys: Keys,
        name: str,
        engine: EngineTable,
        admitted: Callable[[str], str],
        land: Land = tell_how_to_serve,
        start: Start = PullProcess,
    ) -> None:
        self._client = client
        self._keys = keys
        self._name = name
        self._engine = engine
        self._admitted = admitted
        self._land = land
        self._start = start
        self._pulls: list[_Pull] = []  # the first one runs
        self._lander = ThreadPoolExecutor(1, thread_name_prefix="pull-landing")
        self._thread = StoppableThread("pulls", self._run)
        self._is_away = False

    def start(self) -> None:
        """Start taking requests."""
        self._thread.start()

    def stop(self, timeout_s: float) -> None:
        """Stop, and end what runs; waits at most `timeout_s` seconds."""
        self._thread.stop(timeout_s)

    def _run(self, stop: threading.Event) -> None:
        try:
            while not stop.wait(LOOK_S):
                self._look()
        finally:
            for pull in self._pulls:
                if pull.process is not None:
                    pull.process.close()
            self._lander.shutdown(wait=False, cancel_futures=True)
            for pull in self._pulls:
                self._end(pull, PullState.FAILED, "the worker was stopped; what was fetched is kept, so ask again")

    def _look(self) -> None:
        try:
            self._take()
            self._go_on()
            self._is_away = False
        except RedisError as error:
            if not self._is_away:
                log.warning("pulls cannot be asked for or told of: %s", error)
            self._is_away = True

    def _take(self) -> None:
        taken = self._client.lpop(self._keys.pulls(self._name), _MOST_TAKEN)
        for raw in taken if isinstance(taken, list) else []:
            try:
                request = decode_pull_request(str(raw))
            except DecodeError as error:
                log.warning("a request to pull cannot be read: %s", error)
                continue
            self._accept(request)

    def _accept(self, request: PullRequest) -> None:
        same = next((pull for pull in self._pulls if pull.model == request.model), None)
        if same is not None:
            same.asks = [*same.asks, request.ask_id][-MAX_ASKERS:]
            same.serve = same.serve or request.serve
            return
        pull = _Pull(request.model, request.model, [request.ask_id], request.serve)
        try:
            pull.opened_as = self._admitted(request.model)
        except ConfigError as error:
            self._end(pull, PullState.FAILED, f"worker {self._name} may not have it: {error}")
            return
        if len(self._pulls) > MOST_WAITING:
            why = f"{MOST_WAITING} other models wait to be pulled by worker {self._name}; try again later"
            self._end(pull, PullState.FAILED, why)
            return
        log.info("asked to pull %s", request.model)
        self._pulls.append(pull)

    def _go_on(self) -> None:
        if self._pulls and self._pulls[0].process is None:
            pull = self._pulls[0]
            try:
                pull.process = self._start(pull.opened_as, self._engine)
            except OSError as error:
                self._pulls.remove(pull)
                self._end(pull, PullState.FAILED, f"no process can be started: {error}")
        if self._pulls and (process := self._pulls[0].process) is not None:
            outcome = process.outcome()
            if outcome is None:
                self._tell(self._pulls[0], PullState.RUNNING, process.progress)
            elif self._has_ended(self._pulls[0], process, outcome):
                self._pulls.pop(0)
        for pull in self._pulls[1:]:
            message = f"waits for {self._pulls[0].model}, which is pulled there now"
            self._tell(pull, PullState.WAITING, _NOTHING, message)

    def _has_ended(self, pull: _Pull, process: PullProcess, outcome: str) -> bool:
        """Whether nothing more is to be done about a pull whose process has ended."""
        process.close()
        here = f"the shards of {pull.model} are on the host of worker {self._name}"
        if outcome:
            self._end(pull, PullState.FAILED, outcome)
        elif not pull.serve:
            self._end(pull, PullState.DONE, here)
        else:
            if pull.landing is None:  # in a thread of its own: engines take their time to open
                pull.landing = self._lander.submit(self._land, pull.model)
            if not pull.landing.done():
                self._tell(pull, PullState.RUNNING, _LANDING)
                return False
            self._end(pull, PullState.DONE, f"{here}; {pull.landing.result(0)}")
        return True

    def _tell(self, pull: _Pull, state: PullState, progress: Progress, message: str = "") -> None:
        now, news = time.monotonic(), (state, progress, len(pull.asks))
        if news != pull.told or now - pull.told_at >= PULL_LIVE_TTL_S / 4:
            pull.told, pull.told_at = news, now
            self._write(pull, state, progress, message, PULL_LIVE_TTL_S)

    def _end(self, pull: _Pull, state: PullState, message: str) -> None:
        log.log(logging.INFO if state is PullState.DONE else logging.WARNING, "pull of %s: %s", pull.model, message)
        progress = pull.process.progress if pull.process is not None else _NOTHING
        try:
            self._write(pull, state, progress, message, PULL_TOLD_TTL_S)
        except RedisError as error:
            log.warning("the end of the pull of %s cannot be told: %s", pull.model, error)

    def _write(self, pull: _Pull, state: PullState, progress: Progress, message: str, ttl_s: int) -> None:
        status = PullStatus(
            asks=tuple(pull.asks),
            state=state,
            phase=progress.phase[:100],
            done_bytes=progress.done_bytes,
            total_bytes=progress.total_bytes,
            message=message[:_MOST_TEXT],
            updated_at=time.time(),
        )
        self._client.set(self._keys.pull(self._name, pull.model), status.model_dump_json(), ex=ttl_s)
