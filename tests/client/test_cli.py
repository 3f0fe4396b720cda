"""The command line: what is printed where, exit codes, and never a stack trace."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from lamella import Client
from lamella.cli import app
from lamella.cli.plugins import _forwarder
from lamella.embedded import EmbeddedServer
from lamella.keys import Keys
from lamella.messages import decode_request
from tests.client.acting_worker import MODEL, ActingWorker, done, failed, token
from tests.waiting import wait_until

Run = Callable[..., Result]


@pytest.fixture
def run(embedded_server: EmbeddedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a command against the embedded server and checks what holds for every command."""
    monkeypatch.setenv("LAMELLA_REDIS_URL", embedded_server.url)
    monkeypatch.setenv("LAMELLA_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("COLUMNS", "200")

    def run(*args: str, stdin: str | bytes | None = None) -> Result:
        result = CliRunner().invoke(app, list(args), input=stdin)
        assert "Traceback" not in result.output
        assert result.exit_code in (0, 1, 2)
        assert isinstance(result.exception, SystemExit | None)
        return result

    return run


def error_of(result: Result, exit_code: int) -> str:
    assert result.exit_code == exit_code, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    return result.stderr


def test_submit_prints_the_id_and_stream_the_text(run: Run, worker: ActingWorker) -> None:
    job_id = run("submit", "hello", "--max-tokens", "3", "--stop", "end").stdout.strip()
    request = decode_request(worker.claim(job_id).request_json)
    worker.emit(job_id, token("Par"), token("is"))
    worker.redis.hset(Keys().job(job_id), "lease_until", 1)
    worker.run(job_id, ".")

    result = run("stream", job_id, "--stats")

    assert (request.sampling.max_tokens, request.sampling.stop) == (3, ("end",))
    assert request.messages is not None
    assert request.messages[0].content == "hello"
    assert result.stdout == "Paris.\n"
    assert "1 tokens" in result.stderr
    assert "peak memory of the worker 123.0 MB" in result.stderr
    assert run("stream", job_id, "--after", "2").stdout == ".\n"


def test_submit_raw_from_stdin_with_json(run: Run, worker: ActingWorker) -> None:
    result = run("submit", "--raw", "--json", stdin="raw text")

    job_id = json.loads(result.stdout)["job_id"]
    assert decode_request(worker.claim(job_id).request_json).prompt == "raw text"


def test_submit_with_a_key_twice_is_one_job(run: Run, worker: ActingWorker) -> None:
    first = run("submit", "x", "--idempotency-key", "k").stdout

    assert run("submit", "x", "--idempotency-key", "k").stdout == first
    assert "another request" in error_of(run("submit", "y", "--idempotency-key", "k"), 1)


def test_status_jobs_and_workers(run: Run, worker: ActingWorker) -> None:
    job_id = run("submit", "x").stdout.strip()
    worker.claim(job_id)
    worker.emit(job_id, failed())

    assert "prompt_too_long" in run("status", job_id).stdout
    assert json.loads(run("status", job_id, "--json").stdout)["outcome"]["code"] == "prompt_too_long"
    assert [job["job_id"] for job in json.loads(run("jobs", "--json").stdout)] == [job_id]
    assert job_id in run("jobs").stdout
    assert json.loads(run("workers", "--json").stdout)[0]["model"]["name"] == MODEL
    assert MODEL in run("workers").stdout


def test_cancel_says_what_became_of_it(run: Run, worker: ActingWorker) -> None:
    waiting, running, ended = (run("submit", text).stdout.strip() for text in "abc")
    worker.claim(running)
    worker.run(ended, "x")

    assert run("cancel", waiting).stdout == "cancelled\n"
    assert "requested" in run("cancel", running).stdout
    assert "already done" in run("cancel", ended).stdout
    assert "cancelled" in error_of(run("stream", waiting), 1)


def test_a_failed_job_fails_the_command(run: Run, worker: ActingWorker) -> None:
    job_id = run("submit", "x").stdout.strip()
    worker.claim(job_id)
    worker.emit(job_id, failed())

    assert "shorten it" in error_of(run("stream", job_id), 1)


@pytest.mark.parametrize(
    ("args", "exit_code", "says"),
    [
        (("submit", ""), 2, "no text"),
        (("submit", "--raw", ""), 2, "prompt is empty"),
        (("submit", "x", "--max-tokens", "0"), 2, "max_tokens is 0"),
        (("submit", "x", "--max-tokens", "-1"), 2, "max_tokens is -1"),
        (("submit", "x", "--temperature", "nan"), 2, "temperature is nan"),
        (("submit", "x", "--model", "../x"), 2, "not a model name"),
        (("submit", "x", "--model", "/etc/passwd"), 2, "not a model name"),
        (("submit", "x", "--model", "other"), 1, MODEL),
        (("chat", "x", "--model", "other"), 1, MODEL),
        (("chat", ""), 2, "prompt is empty"),
        (("chat", "x", "--max-tokens", "0"), 2, "max_tokens is 0"),
        (("status", "nobody"), 1, "lamella jobs"),
        (("stream", "nobody"), 1, "no job"),
        (("stream", "nobody", "--after", "-1"), 2, "after is -1"),
        (("stream", "nobody", "--timeout", "0"), 2, "timeout_s is 0"),
        (("cancel", "nobody"), 1, "no job"),
        (("jobs", "--redis-url", "http://x"), 2, "redis://"),
        (("jobs", "--redis-url", "redis://127.0.0.1:1/0"), 1, "no answer"),
        (("up", "--model", "a/../b"), 2, "not a model name"),
    ],
)
def test_a_mistake_is_one_message(
    run: Run, worker: ActingWorker, args: tuple[str, ...], exit_code: int, says: str
) -> None:
    message = error_of(run(*args), exit_code)

    assert says in message
    assert "geheim" not in message


@pytest.mark.parametrize(
    "args",
    [
        ("nonsense",),
        ("submit", "--nonsense"),
        ("submit", "x", "--max-tokens", "many"),
        ("jobs", "--limit", "0"),
        ("up",),
    ],
)
def test_wrong_usage_exits_with_2(run: Run, args: tuple[str, ...]) -> None:
    assert run(*args).exit_code == 2


def test_stdin_that_is_no_text_is_a_message(run: Run, worker: ActingWorker) -> None:
    assert "UTF-8" in error_of(run("submit", "-", stdin=b"\xff\xfe"), 2)


def test_chat_streams_the_answer(
    run: Run, worker: ActingWorker, embedded_server: EmbeddedServer, serving: Callable[..., None]
) -> None:
    serving(worker, "Par", "is")

    result = run("chat", "capital of France?", "--stats", "--system", "Be short.")

    assert result.stdout == "Paris\n"
    assert "2 tokens" in result.stderr
    with Client(embedded_server.url) as client:
        request = decode_request(worker.redis.hget(Keys().job(client.jobs()[0].job_id), "request") or "")
    assert [message.role for message in request.messages or ()] == ["system", "user"]


def test_chat_without_a_service_needs_a_model(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LAMELLA_REDIS_URL")

    assert "--model" in error_of(run("chat", "x"), 2)


def test_help_and_version(run: Run) -> None:
    assert "lamella 0.1.0" in run("--version").stdout
    listing = run("--help").stdout
    for command in (
        "up",
        "chat",
        "submit",
        "stream",
        "status",
        "cancel",
        "jobs",
        "workers",
        "doctor",
        "worker",
        "models",
    ):
        assert f" {command} " in listing


def test_commands_of_other_packages_are_forwarded(run: Run) -> None:
    result = run("worker", "--no-such-option")

    assert result.exit_code == 2
    assert "no-such-option" in result.output


def test_a_command_whose_packages_are_missing_says_what_to_install() -> None:
    other = typer.Typer()
    other.callback()(lambda: None)
    point = EntryPoint("extra", "no_such_package.cli:app", "lamella.commands")
    other.command("extra")(_forwarder(point))

    result = CliRunner().invoke(other, ["extra"])

    assert result.exit_code == 1
    assert 'pip install "lamella[worker]"' in result.stderr


def start_chat(stdin: int, *args: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "lamella", "chat", *args],
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def next_job(worker: ActingWorker) -> str:
    """Take the next job as a worker does."""
    assert wait_until(lambda: worker.redis.rpop(worker.keys.queue_list(MODEL)))
    waiting = worker.redis.zrange(worker.keys.active, 0, -1)
    assert len(waiting) == 1
    assert worker.claim(waiting[0]).status == "ok"
    return waiting[0]


def test_ctrl_c_cancels_the_answer(run: Run, worker: ActingWorker) -> None:
    chat = start_chat(subprocess.DEVNULL, "tell me everything")
    try:
        job_id = next_job(worker)
        worker.emit(job_id, token("Once"))
        assert chat.stdout is not None
        assert chat.stdout.read(4) == "Once"

        chat.send_signal(signal.SIGINT)
        _, message = chat.communicate(timeout=40)
    finally:
        chat.kill()
        chat.communicate(timeout=40)

    assert chat.returncode == 1
    assert message == f"error: job {job_id} was cancelled\n"
    assert worker.emit(job_id, token(" upon")).cancel_requested


def test_a_dialogue_remembers_its_turns(run: Run, worker: ActingWorker) -> None:
    ours, theirs = pty.openpty()
    chat = start_chat(theirs)
    try:
        os.write(ours, b"hello\n")
        first = next_job(worker)
        worker.emit(first, token("hi"), done())
        os.write(ours, b"and now?\n")
        second = next_job(worker)
        request = decode_request(worker.redis.hget(Keys().job(second), "request") or "")
        worker.emit(second, token("bye"), done())
        wait_until(lambda: worker.redis.zcard(worker.keys.active) == 0)
        os.write(ours, b"\x04")
        answers, _ = chat.communicate(timeout=40)
    finally:
        chat.kill()
        chat.communicate(timeout=40)
        os.close(ours)
        os.close(theirs)

    assert chat.returncode == 0
    assert [(turn.role, turn.content) for turn in request.messages or ()] == [
        ("user", "hello"),
        ("assistant", "hi"),
        ("user", "and now?"),
    ]
    assert "hi" in answers
    assert "bye" in answers
