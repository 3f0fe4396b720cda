"""`lamella top`: figures between two looks, what fits 80 columns, and a server that goes away."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import signal
import subprocess
import sys

import pytest
import redis
from rich.console import Console
from typer.testing import CliRunner

from lamella import Client
from lamella.cli import app
from lamella.cli.top_data import Frame, JobRow, QueueRow, Watcher, WorkerRow
from lamella.cli.top_view import draw
from lamella.embedded import EmbeddedServer
from lamella.messages import WorkerInfo
from tests.client.acting_worker import MODEL, ActingWorker
from tests.waiting import wait_until


def beat(worker: ActingWorker, info: WorkerInfo, **changes: object) -> None:
    """Write a later heartbeat."""
    worker.redis.set(worker.keys.worker(worker.name), info.model_copy(update=changes).model_dump_json(), ex=600)


def shown(frame: Frame, width: int = 80, height: int | None = None) -> list[str]:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    with console.capture() as capture:
        console.print(draw(frame, height))
    return capture.get().splitlines()


def test_rates_are_of_the_time_between_two_heartbeats(client: Client, worker: ActingWorker) -> None:
    watcher = Watcher(client.connection, "server", 5)
    info = worker.announce()
    first = watcher.look().workers[0]
    beat(
        worker,
        info.model_copy(update={"tier_bytes": (0, 0, 0)}),
        heartbeat_at=info.heartbeat_at + 1,
    )
    watcher.look()
    beat(worker, info, heartbeat_at=info.heartbeat_at + 5, tokens=20, sweeps=8, tier_bytes=(4000, 400, 0), running=1)

    row = watcher.look().workers[0]
    again = watcher.look().workers[0]

    assert first.tokens_per_s is None
    assert (row.tokens_per_s, row.sweep_s, row.state) == (5.0, 0.5, "busy")
    assert (row.disk_bytes_per_s, row.ram_bytes_per_s, row.vram_bytes_per_s) == (1000.0, 100.0, 0.0)
    assert again == row


def test_a_worker_that_started_anew_has_no_rates_yet(client: Client, worker: ActingWorker) -> None:
    watcher = Watcher(client.connection, "server", 5)
    info = worker.announce()
    beat(worker, info, tokens=1000)
    watcher.look()
    beat(worker, info, heartbeat_at=info.heartbeat_at + 5, started_at=info.started_at + 4, tokens=3)

    row = watcher.look().workers[0]

    assert row.tokens_per_s is None


def test_queues_tell_what_waits_and_since_when(client: Client, worker: ActingWorker) -> None:
    client.submit("a")
    client.submit("b", model="other", require_worker=False)
    waiting = client.submit("c")
    for job in (waiting,):
        worker.redis.hset(worker.keys.job(job.id), "created_at", 1_000_000)

    queues = {queue.model: queue for queue in Watcher(client.connection, "server", 5).look().queues}

    assert (queues[MODEL].workers, queues[MODEL].slots) == (1, 4)
    assert queues[MODEL].waiting + queues[MODEL].in_flight == 2
    assert (queues["other"].workers, queues["other"].waiting) == (0, 1)
    assert queues["other"].oldest_s is not None


def test_once_prints_one_frame_and_json_an_object(
    client: Client, worker: ActingWorker, embedded_server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAMELLA_REDIS_URL", embedded_server.url)
    monkeypatch.setenv("COLUMNS", "80")
    job = client.submit("a")

    table = CliRunner().invoke(app, ["top", "--once"])
    whole = CliRunner().invoke(app, ["top", "--once", "--json"])

    assert table.exit_code == whole.exit_code == 0
    assert job.id in table.stdout
    assert json.loads(whole.stdout)["jobs"][0]["job_id"] == job.id
    assert len(whole.stdout.splitlines()) == 1


def test_without_a_server_it_is_an_error() -> None:
    result = CliRunner().invoke(app, ["top", "--once", "--redis-url", "redis://127.0.0.1:1/0"])

    assert result.exit_code == 1
    assert result.stderr.startswith("error: no answer")


def big_frame() -> Frame:
    name = "a-host-with-a-very-long-name.example-cuda:0-123456"
    worker = WorkerRow(
        name=name, host="h", device="cuda:0", models=["owner/" + "m" * 60], state="busy", running=64, slots=64,
        tokens_per_s=12345.6, sweep_s=12.5, disk_bytes_per_s=2.1e9, ram_bytes_per_s=5.5e10, vram_bytes_per_s=3e12,
    )  # fmt: skip
    queue = QueueRow(model="m" * 70, workers=8, slots=512, waiting=10000, in_flight=513, oldest_s=90000, tokens_per_s=1)
    job = JobRow(job_id="0" * 32, state="cancelled", model="m" * 40, user="u" * 99, worker=name, events=9999, age_s=1e5)
    return Frame(at=0, server="unix:///x", workers=[worker] * 8, queues=[queue] * 3, jobs=[job] * 40)


@pytest.mark.parametrize("width", [60, 80, 200])
def test_a_frame_fits_the_screen(width: int) -> None:
    lines = shown(big_frame(), width, height=40)

    assert max(map(len, lines)) <= width
    assert len(lines) <= 40


def test_eighty_columns_show_whole_ids_states_and_figures() -> None:
    text = "\n".join(shown(big_frame()))

    for part in ("0" * 32, "cancelled", "64/64", "12345.6", "12.5s", "2.1G", "55.0G", "3.0T", "513/512", "25h 00m"):
        assert part in text, part


def test_control_characters_of_names_do_not_reach_the_terminal() -> None:
    frame = big_frame()
    frame.workers[0].name = "evil\x1b]0;title\x07"
    frame.queues[0].model = "[bold]x[/bold]"

    text = "\n".join(shown(frame, 200))

    assert "\x1b" not in text
    assert "\x07" not in text
    assert "[bold]x[/bold]" in text


def test_a_server_that_goes_away_is_told_and_the_screen_stays(own_server: EmbeddedServer) -> None:
    with redis.Redis.from_url(own_server.url, protocol=2, decode_responses=True) as raw:
        ActingWorker(raw).announce()
    command = [sys.executable, "-m", "lamella", "top", "--json", "--interval", "0.2", "--redis-url", own_server.url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        before = json.loads(process.stdout.readline())
        own_server.stop()
        lost = wait_until(lambda: next_error(process))
        own_server.start()
        wait_until(lambda: next_error(process) is None)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=40)

    assert process.returncode == 0
    assert before["error"] is None
    assert "no answer" in lost["error"]
    assert lost["workers"] == before["workers"]


def next_error(process: subprocess.Popen[str]) -> dict[str, str] | None:
    assert process.stdout is not None
    frame = json.loads(process.stdout.readline())
    return frame if frame["error"] is not None else None


def test_q_quits_and_leaves_the_terminal_as_it_was(
    worker: ActingWorker, embedded_server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "lamella", "top", "--interval", "60", "--redis-url", embedded_server.url]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs)
    try:
        screen = b""
        while b"acting" not in screen:
            screen += os.read(ours, 65536)
        os.write(ours, b"\x1b[A")
        os.write(ours, b"xq")

        def drained() -> bool:
            os.set_blocking(ours, False)
            with contextlib.suppress(OSError):
                os.read(ours, 65536)
            return process.poll() is not None

        wait_until(drained)
    finally:
        process.kill()
        process.wait(40)
        os.close(ours)
        os.close(theirs)

    assert process.returncode == 0
