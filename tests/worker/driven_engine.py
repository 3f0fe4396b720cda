"""A scripted engine in a child process, opened and driven by a test; a fixture that closes what it opened."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from lamella_engine.errors import EngineError
from lamella_engine.sequence_types import (
    Sampling,
    SequenceEvent,
    SequenceFinished,
    SequenceRequest,
    SequenceTokens,
)
from lamella_worker.child_host import ChildHost
from lamella_worker.config import load_config
from lamella_worker.engine_port import ServedModel
from lamella_worker.failpoints import VARIABLE
from lamella_worker.supervisor import EngineSpec
from tests.waiting import wait_until
from tests.worker.scripted_child import scripted_command

Opener = Callable[..., "Driven"]


class Driven:
    """A child engine, and a thread that takes its events."""

    def __init__(self, host: ChildHost, *, takes: bool = True) -> None:
        self.host = host
        (self.engine,) = host.engines.values()
        self.events: list[SequenceEvent] = []
        self.failure: EngineError | None = None
        self._thread = threading.Thread(target=self._take)
        if takes:
            self._thread.start()

    def submit(self, name: str, prompt: str = "hello", max_tokens: int = 5, generated: Sequence[int] = ()) -> None:
        self.engine.submit(
            SequenceRequest(name, Sampling(max_tokens=max_tokens), prompt=prompt, generated_ids=tuple(generated))
        )

    def text(self, name: str) -> str:
        return "".join(e.text for e in list(self.events) if isinstance(e, SequenceTokens) and e.sequence_id == name)

    def finished(self, name: str) -> SequenceFinished | None:
        found = [e for e in list(self.events) if isinstance(e, SequenceFinished) and e.sequence_id == name]
        assert len(found) <= 1, "a sequence ends once"
        return found[0] if found else None

    def run(self, name: str, prompt: str = "hello", max_tokens: int = 5) -> str:
        self.pid()
        self.submit(name, prompt, max_tokens)
        wait_until(lambda: self.finished(name))
        return self.text(name)

    def pid(self) -> int:
        """The process whose engine is open."""
        wait_until(lambda: self.host.wait_ready(1.0))
        pid = self.host.state.pid
        assert pid is not None
        return pid

    def close(self) -> None:
        self.host.close()
        if self._thread.ident is not None:
            self._thread.join(40)

    def _take(self) -> None:
        try:
            for batch in self.engine.events(poll_s=0.1):
                self.events.extend(batch.events)
        except EngineError as error:
            self.failure = error


class Standing:
    """Whether a figure has stood still for three times the deadline of a hang."""

    def __init__(self, figure: Callable[[], int]) -> None:
        self._figure = figure
        self._last, self._since = -1, 0.0

    def value(self) -> int | None:
        now = self._figure()
        if now != self._last:
            self._last, self._since = now, time.monotonic()
        return now if time.monotonic() - self._since > 1.5 else None


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Iterator[Opener]:
    """Open a scripted engine in a child process, with failpoints and settings of the table [worker]."""
    driven: list[Driven] = []

    def make(
        failpoints: str = "",
        *,
        command: Sequence[str] | None = None,
        slots: int = 8,
        sweep_s: float = 0.002,
        takes: bool = True,
        **settings: object,
    ) -> Driven:
        monkeypatch.setenv(VARIABLE, failpoints)
        flags: dict[str, object] = {"worker.model": "tiny", "engine.max_sequences": slots}
        config = load_config(None, flags | {f"worker.{key}": value for key, value in settings.items()}, environ={})
        spec = EngineSpec((ServedModel("tiny", "tiny"),), config.engine, "cpu", command or scripted_command(sweep_s))
        driven.append(Driven(ChildHost.open(spec, config.worker), takes=takes))
        return driven[-1]

    yield make
    for each in driven:
        each.close()
    assert not any(is_alive(each.host.state.pid) for each in driven)


def is_alive(pid: int | None) -> bool:
    if pid is None:
        return False
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False
