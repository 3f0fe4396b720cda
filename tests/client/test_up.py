"""`lamella up` and a chat that brings its own service: real processes, a tiny model, nothing left running."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from lamella import Client
from lamella.cli.flower import Flower
from lamella.embedded import EmbeddedServer
from lamella.errors import NoWorkerError
from lamella_engine import ShardStore
from tests.fixtures.servers import require_embedded
from tests.processes import processes_naming
from tests.waiting import wait_until

MODEL = "tiny/llama"
READY_S = 90.0


@pytest.fixture
def environment(tiny_llama_dir: Path) -> Iterator[dict[str, str]]:
    """An environment with a store that holds the tiny model, and a state directory of its own."""
    require_embedded()
    with tempfile.TemporaryDirectory(prefix="lamella-") as directory:
        store = Path(directory) / "store"
        ShardStore(store).ensure(MODEL, source=tiny_llama_dir)
        mine = {"LAMELLA_STORE": str(store), "LAMELLA_STATE_DIR": f"{directory}/state", "TMPDIR": directory}
        kept = {key: value for key, value in os.environ.items() if key != "LAMELLA_REDIS_URL"}
        yield {**kept, **mine, "COLUMNS": "200"}


def lamella(environment: dict[str, str], *args: str, timeout_s: float = READY_S) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "lamella", *args],
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
        stdin=subprocess.DEVNULL,
    )


class Up:
    """`lamella up` as a child; its messages go to a file."""

    def __init__(self, environment: dict[str, str], *args: str) -> None:
        self.log = Path(environment["TMPDIR"]) / "up.log"
        self.url = f"unix://{environment['LAMELLA_STATE_DIR']}/server/server.sock?db=0"
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "lamella", "up", "--model", MODEL, "--device", "cpu", *args],
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
            )

    def wait_until_said(self, text: str) -> None:
        wait_until(lambda: text in self.log.read_text() or self.process.poll() is not None, READY_S, 0.1)
        assert text in self.log.read_text(), self.log.read_text()

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            return self.process.wait(timeout=60)
        finally:
            self.process.kill()
            self.process.wait(timeout=40)


def test_up_serves_restarts_its_worker_and_stops_cleanly(environment: dict[str, str]) -> None:
    up = Up(environment, "--slots", "2", "--ram", "50%")
    try:
        up.wait_until_said("ready   1 of 1")
        with Client(up.url, heal_s=READY_S) as client:
            worker = client.workers()[0]
            assert (worker.model.name, worker.slots) == (MODEL, 2)
            with pytest.raises(NoWorkerError, match=MODEL):
                client.submit("x", model="other/model")
            assert "already running" in lamella(environment, "up", "--model", MODEL).stderr
            assert lamella(environment, "chat", "hello", "--max-tokens", "4").returncode == 0

            os.kill(worker.pid, signal.SIGKILL)
            up.wait_until_said("started again")
            result = client.generate("hello", model=MODEL, max_tokens=4, require_worker=False, timeout_s=READY_S)
            assert result.usage.completion_tokens > 0
    finally:
        code = up.stop()

    assert code == 0, up.log.read_text()
    assert processes_naming(environment["LAMELLA_STATE_DIR"]) == []


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's signal at a parent's death is Linux only")
def test_a_killed_up_leaves_its_jobs_and_no_process(environment: dict[str, str]) -> None:
    up = Up(environment)
    up.wait_until_said("worker  ")
    with Client(up.url) as client:
        job = client.submit("x", model="later", require_worker=False)

    up.process.kill()
    up.process.wait(timeout=40)

    wait_until(lambda: processes_naming(environment["LAMELLA_STATE_DIR"]) == [], 40.0, 0.1)
    with EmbeddedServer(Path(environment["LAMELLA_STATE_DIR"]) / "server") as server, Client(server.url) as client:
        assert client.status(job.id).state == "queued"


@pytest.mark.slow  # so does the chat of tests/end_to_end/test_chat_from_hub.py, which has to fetch the model as well
def test_chat_brings_its_own_service_and_takes_it_away(environment: dict[str, str]) -> None:
    result = lamella(
        environment, "chat", "--model", MODEL, "--device", "cpu", "--max-tokens", "4", "--stats", "Hello", timeout_s=100
    )

    assert result.returncode == 0, result.stderr
    assert "tokens/s" in result.stderr
    assert "streamed per token" in result.stderr
    assert "peak memory" in result.stderr
    assert processes_naming(environment["LAMELLA_STATE_DIR"]) == []
    assert [path.name for path in Path(environment["TMPDIR"]).iterdir() if path.name.startswith("lamella-")] == []


def test_a_model_that_cannot_be_had_is_a_message(environment: dict[str, str]) -> None:
    environment["HF_HUB_OFFLINE"] = "1"

    result = lamella(environment, "chat", "--model", "nobody/nothing", "x")

    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert "nobody/nothing" in result.stderr


def test_flower_is_behind_a_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FLOWER_BASIC_AUTH", raising=False)
    first, second = Flower("unix:///x", 5555), Flower("unix:///x", 5555)

    assert first.login.startswith("lamella:")
    assert first.login != second.login
    assert first.url == "http://127.0.0.1:5555"
