"""Batches whose gateway dies, stops, or has a twin: every line is answered once, whoever goes on with it."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import openai
import pytest

from lamella.connection import Connection
from lamella.embedded import EmbeddedServer
from lamella_gateway.api_keys import make_key, read_use, shown_key, store_key
from lamella_gateway.batch_store import BatchStore
from tests.client.acting_worker import ActingWorker, done, token
from tests.client.answering_worker import AnsweringWorker as Patient
from tests.gateway.batch_lines import all_running, begin, chat_line, ended, records, texts
from tests.gateway.running_gateway import RunningGateway
from tests.waiting import wait_until


class Process:
    """A gateway as it is installed."""

    def __init__(self, server: EmbeddedServer, files: Path, *options: str) -> None:
        code = "from lamella_gateway.cli import app; app()"
        command = [sys.executable, "-c", code, "--redis-url", server.url, "--port", "0", "--files-dir", str(files)]
        self.process = subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        self.url = self.process.stderr.readline().split()[-1]

    def client(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url, api_key=key, max_retries=0, timeout=40)

    def end(self, number: signal.Signals) -> int:
        self.process.send_signal(number)
        self.process.communicate(timeout=40)
        return self.process.returncode


@pytest.fixture
def start(embedded_server: EmbeddedServer, tmp_path: Path) -> Iterator[Callable[..., Process]]:
    """Starts gateways on one directory."""
    started: list[Process] = []

    def make(*options: str) -> Process:
        started.append(Process(embedded_server, tmp_path / "files", *(options or ("--no-auth",))))
        return started[-1]

    yield make
    for each in started:
        each.process.kill()
        each.process.communicate(timeout=40)


def lines(count: int) -> list[dict[str, object]]:
    return [chat_line(number, f"{number}{'x' * (number * 7 % 13)}") for number in range(count)]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "stopped"])
def test_a_gateway_that_ends_leaves_its_batch_to_the_next(
    start: Callable[..., Process], worker: ActingWorker, embedded_server: EmbeddedServer, number: signal.Signals
) -> None:
    key, secret = make_key("ada", "ada")
    connection = Connection(embedded_server.url, "lamella:", 10.0)
    connection.run(store_key(connection.keys, key, secret))
    asked = lines(60)
    held = str(asked[20]["body"]["messages"][0]["content"])  # type: ignore[index]  # it is JSON

    with Patient(worker, holds=[held]) as patient:
        first = start("--host", "127.0.0.1")
        with first.client(shown_key(key, secret)) as sdk:
            batch = begin(sdk, asked)
            wait_until(lambda: len(patient.asked) >= 30)
        code = first.end(number)
        wait_until(lambda: worker.redis.zcard(worker.keys.active) == 1)  # what was under way goes on without it
        (job_id,) = all_running(worker)
        with start("--host", "127.0.0.1").client(shown_key(key, secret)) as sdk:
            worker.emit(job_id, token("late"), done())
            batch = ended(sdk, batch)
            outputs = records(sdk, batch.output_file_id)

    def use() -> tuple[int, int, int]:
        found = connection.run(read_use(connection.keys, [key.key_id]))[0]
        return found.prompt_tokens, found.completion_tokens, found.tokens_today

    expected = {str(each["custom_id"]): f"<{each['body']['messages'][0]['content']}>" for each in asked}  # type: ignore[index]  # as above
    assert code == (-signal.SIGKILL if number is signal.SIGKILL else 0)
    assert (batch.status, batch.error_file_id) == ("completed", None)
    assert [each["custom_id"] for each in outputs] == [each["custom_id"] for each in asked]
    assert texts(outputs) == {**expected, "c20": "late"}
    assert set(Counter(patient.asked).values()) == {1}
    wait_until(lambda: use() == (180, 60, 240))
    connection.close()


def test_a_batch_that_is_being_cancelled_is_ended_by_the_next_gateway(
    start: Callable[..., Process], worker: ActingWorker
) -> None:
    with Patient(worker, holds=["held"]) as patient:
        first = start()
        with first.client() as sdk:
            batch = begin(sdk, [chat_line(0, "a"), *(chat_line(number, "held") for number in range(1, 20))])
            wait_until(lambda: len(patient.asked) >= 4)
            first.process.send_signal(signal.SIGSTOP)  # so that it cannot see the mark
        first.end(signal.SIGKILL)
        second = start()
        with second.client() as sdk:
            sdk.batches.cancel(batch.id)
            wait_until(lambda: sdk.batches.retrieve(batch.id).cancelling_at)
        second.end(signal.SIGKILL)
        with start().client() as sdk:
            running = wait_until(lambda: all_running(worker))
            for job_id in running:
                worker.emit(job_id, token("late"), done())
            batch = ended(sdk, batch)
            outputs, errors = records(sdk, batch.output_file_id), records(sdk, batch.error_file_id)

    assert batch.status == "cancelled"
    assert sorted(texts(outputs).values()) == ["<a>", *["late"] * len(running)]
    assert len(outputs) + len(errors) == 20


def test_jobs_of_a_batch_that_is_cancelled_before_the_next_gateway_looks_are_not_left_behind(
    start: Callable[..., Process], worker: ActingWorker, tmp_path: Path
) -> None:
    asked = [chat_line(0, "a"), *(chat_line(number, "held") for number in range(1, 20))]
    with Patient(worker, holds=["held"]) as patient:
        first = start()
        with first.client() as sdk:
            batch = begin(sdk, asked)
            wait_until(lambda: len(patient.asked) >= 5)  # all slots are taken, and more jobs wait
        first.end(signal.SIGKILL)
        store = BatchStore(tmp_path / "files")
        ((owner, batch_id),) = store.active()
        store.cancel(owner, batch_id)  # as a gateway does that dies at once
        with start().client() as sdk:
            running = wait_until(lambda: all_running(worker))
            for job_id in running:
                worker.emit(job_id, token("late"), done())
            batch = ended(sdk, batch)
            outputs = records(sdk, batch.output_file_id)

    assert batch.status == "cancelled"
    assert sorted(texts(outputs).values()) == ["<a>", *["late"] * len(running)]
    assert worker.redis.zcard(worker.keys.active) == 0


def test_two_gateways_on_one_directory_run_a_batch_once(
    embedded_server: EmbeddedServer, worker: ActingWorker, tmp_path: Path
) -> None:
    with (
        RunningGateway(embedded_server.url, files_dir=tmp_path / "files") as one,
        RunningGateway(embedded_server.url, files_dir=tmp_path / "files") as two,
        one.client() as first,
        two.client() as second,
        Patient(worker) as patient,
    ):
        batches = [
            begin(sdk, [chat_line(number, f"{place} {number}") for number in range(20)])
            for place, sdk in enumerate((first, second) * 2)
        ]
        found = [ended(second, batch) for batch in batches]
        outputs = [texts(records(first, batch.output_file_id)) for batch in found]

    assert outputs == [{f"c{n}": f"<{place} {n}>" for n in range(20)} for place in range(4)]
    assert len(patient.asked) == 80
    assert list((tmp_path / "files" / "active").iterdir()) == []
