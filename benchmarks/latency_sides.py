"""The two sides that `latency` compares: an engine's process by itself, and the same behind client, queue and worker.

Owns what is started and ended: both have the same settings and the same number of threads, and stay open side by side,
so that turns can alternate. What is timed is in `latency`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import redis

from benchmarks.machine import process_busy_s
from lamella import Client
from lamella.embedded import EmbeddedServer
from lamella.messages import WorkerInfo
from lamella_engine.sequence_types import Sampling, SequenceFinished, SequenceRequest, SequenceTokens, SweepEvents
from lamella_worker.child_host import ChildHost
from lamella_worker.config import EngineTable
from lamella_worker.engine_port import ServedModel
from lamella_worker.supervisor import EngineSpec
from lamella_worker.worker_table import WorkerTable

ROOT = Path(__file__).resolve().parent.parent
START_S = 180.0
STOP_S = 30.0
PROMPT = "The river runs"


@dataclass(frozen=True)
class Terms:
    """What both sides serve, and how."""

    model: str
    store: Path
    slots: int
    ram: str
    vram: str = "auto"
    device: str = "cpu"


@dataclass(frozen=True)
class Pace:
    """Tokens between the moment when all sequences had begun and the one when the first had ended."""

    tokens: int
    seconds: float
    cpu_s: float

    @property
    def tokens_per_s(self) -> float:
        """The rate by the clock."""
        return self.tokens / self.seconds


class PaceMeter:
    """Counts tokens from when all of `streams` have begun until one ends; `note` is told of each as it comes."""

    def __init__(self, streams: int) -> None:
        self._streams = streams
        self._begun: set[object] = set()
        self._began_at: float | None = None
        self._last_at = 0.0
        self._tokens = 0
        self._has_ended = False

    @property
    def is_counting(self) -> bool:
        """All have begun, none has ended."""
        return self._began_at is not None and not self._has_ended

    def note(self, stream: object, tokens: int, at: float) -> None:
        """`tokens` of a stream came at a moment."""
        if self.is_counting:
            self._tokens += tokens
            self._last_at = at
        self._begun.add(stream)
        if self._began_at is None and len(self._begun) == self._streams:
            self._began_at = at

    def ended(self) -> None:
        """A stream has ended."""
        self._has_ended = True

    def pace(self, cpu_s: float) -> Pace:
        """What was counted; `cpu_s` is the processor time of everyone concerned, in the whole turn."""
        if self._began_at is None or self._last_at <= self._began_at:
            raise RuntimeError("the streams never ran side by side; give them more tokens")
        return Pace(self._tokens, self._last_at - self._began_at, cpu_s)


class EngineAlone:
    """An engine's process without a queue, spoken to as a worker does; a context manager."""

    def __init__(self, terms: Terms) -> None:
        table = EngineTable(store=terms.store, max_sequences=terms.slots, ram=terms.ram, vram=terms.vram, offline=True)
        spec = EngineSpec((ServedModel(terms.model, terms.model),), table, terms.device)
        self._host = ChildHost.open(spec, WorkerTable(model=terms.model))
        self._engine = self._host.engines[terms.model]
        self._events = self._engine.events(poll_s=0.5)
        self._made = 0

    def __enter__(self) -> EngineAlone:
        """Return it, open."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the process."""
        self._host.close()

    @property
    def preemptions(self) -> int:
        """How often a sequence was sent back to wait because the key-value cache ran short."""
        return self._engine.counters().preemptions

    def first_token_s(self, max_tokens: int) -> tuple[float, float]:
        """Seconds from handing a sequence over to its first token, and those of the sweep that made it."""
        began = time.perf_counter()
        self._submit(max_tokens)
        first_s = sweep_s = 0.0
        while True:
            batch = next(self._events)
            if not first_s and any(isinstance(event, SequenceTokens) for event in batch.events):
                first_s, sweep_s = time.perf_counter() - began, sum(batch.sweep_seconds)
            if self._ends(batch):
                return first_s, sweep_s

    def pace(self, streams: int, max_tokens: int) -> Pace:
        """Tokens a second of `streams` sequences side by side."""
        busy_s = self._busy_s()
        meter, left = PaceMeter(streams), streams
        for _ in range(streams):
            self._submit(max_tokens)
        while left:
            batch = next(self._events)
            now = time.perf_counter()
            for event in batch.events:
                if isinstance(event, SequenceTokens):
                    meter.note(event.sequence_id, len(event.token_ids), now)
            if ended := self._ends(batch):
                meter.ended()
                left -= ended
        return meter.pace(self._busy_s() - busy_s)

    def _submit(self, max_tokens: int) -> None:
        self._made += 1
        sampling = Sampling(max_tokens=max_tokens, ignore_eos=True)
        self._engine.submit(SequenceRequest(f"alone-{self._made}", sampling, prompt=PROMPT))

    def _ends(self, batch: SweepEvents) -> int:
        return sum(isinstance(event, SequenceFinished) for event in batch.events)

    def _busy_s(self) -> float:
        own = time.process_time()
        pid = self._host.state.pid
        return own + (process_busy_s(pid) if pid is not None else 0.0)


class Service:
    """A server and a worker in a process of its own, which making it starts; a context manager that ends them."""

    def __init__(self, command: list[str], name: str, directory: Path) -> None:
        self._server = EmbeddedServer(directory / f"server-{name}")
        self._server.__enter__()
        self.url = self._server.url
        self._log = directory / f"{name}.log"
        with self._log.open("wb") as log:
            self._worker = subprocess.Popen(
                [*command[:3], *(part.replace("{url}", self.url) for part in command[3:])],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env=dict(os.environ),
            )

    def __enter__(self) -> Service:
        """Return it; the worker may still be starting."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End worker and server."""
        if self._worker.poll() is None:
            self._worker.terminate()
            try:
                self._worker.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self._worker.kill()
                self._worker.wait(STOP_S)
        self._server.__exit__(kind, error, trace)

    def busy_s(self) -> Counter[str]:
        """Processor seconds so far: of this process (the client), the worker, its engine, the server."""
        with redis.Redis.from_url(self.url, protocol=2, decode_responses=True, socket_timeout=30) as client:
            server = client.info("cpu")
        info = self._info()
        engine = info.engine_process.pid if info is not None and info.engine_process is not None else None
        return Counter(
            {
                "client": time.process_time(),
                "worker": process_busy_s(self._worker.pid),
                "engine": process_busy_s(engine) if engine is not None else 0.0,
                "server": server["used_cpu_user"] + server["used_cpu_sys"],
            }
        )

    def _info(self) -> WorkerInfo | None:
        with Client(self.url) as client:
            return next(iter(client.workers()), None)

    def wait_listed(self) -> Service:
        """Wait until the worker has told that it lives.

        Raises:
            RuntimeError: it has not within START_S.
        """
        deadline = time.monotonic() + START_S
        while self._info() is None:
            code = self._worker.poll()
            if code is not None or time.monotonic() > deadline:
                text = self._log.read_text(errors="replace")[-2000:]
                raise RuntimeError(f"the worker does not come up (exit code {code}):\n{text}")
            time.sleep(0.1)
        return self


def worker_command(terms: Terms, name: str) -> list[str]:
    """The command of a worker with the same settings as the engine alone; ``{url}`` is the server's address."""
    return [
        *(sys.executable, "-m", "lamella_worker", "--model", terms.model, "--name", name),
        *("--device", terms.device, "--redis-url", "{url}", "--store", str(terms.store), "--offline"),
        *("--ram", terms.ram, "--vram", terms.vram, "--slots", str(terms.slots)),
    ]


def stamped_command(name: str, slots: int, sweep_s: float) -> list[str]:
    """The command of a worker whose tokens say when they were made."""
    return [
        *(sys.executable, "-m", "benchmarks.stamped_worker", "worker", "{url}", name),
        *(str(slots), str(sweep_s)),
    ]
