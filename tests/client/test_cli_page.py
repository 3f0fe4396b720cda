"""The page about the command line is what the commands say, and the shell completes what the registry knows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import redis
from typer.testing import CliRunner

from lamella import Client
from lamella.cli import app
from lamella.embedded import EmbeddedServer
from tests.client.acting_worker import MODEL, ActingWorker
from tools.cli_page import PAGE, all_commands, brought_commands, page


def test_the_page_is_what_the_commands_say() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run `python -m tools.cli_page`"


def test_help_shows_every_option_of_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERMINAL_WIDTH", "200")
    brought = brought_commands()
    own = [(name.split()[1:], command) for name, command in all_commands() if name.split()[1] not in brought]

    for words, command in own:
        shown = CliRunner().invoke(app, [*words, "--help"]).stdout

        options = [param for param in command.params if param.param_type_name == "option"]
        assert [name for option in options for name in option.opts if name not in shown] == [], words

    assert len(own) > 12


def completions(line: str, url: str) -> str:
    environment = {
        **os.environ,
        "LAMELLA_REDIS_URL": url,
        "_LAMELLA_COMPLETE": "complete_bash",
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(line.split(" ")) - 1),
    }
    command = [sys.executable, "-c", "from lamella.cli import main; main()"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=40, check=False)
    assert done.stderr == ""
    return done.stdout


def test_the_shell_completes_jobs_and_models(embedded_server: EmbeddedServer, embedded_redis: redis.Redis) -> None:
    ActingWorker(embedded_redis).announce()
    with Client(embedded_server.url) as client:
        job_id = client.submit("x").id

    assert job_id in completions("lamella status ", embedded_server.url)
    assert job_id in completions(f"lamella cancel {job_id[:5]}", embedded_server.url)
    assert MODEL in completions("lamella submit x --model ", embedded_server.url)
    assert "other" not in completions("lamella submit x --model oth", embedded_server.url)


def test_the_shell_completes_nothing_where_no_server_answers() -> None:
    assert completions("lamella status ", "redis://127.0.0.1:1/0").strip() == ""


def test_data_is_json_where_that_is_asked_for(
    embedded_server: EmbeddedServer, embedded_redis: redis.Redis, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LAMELLA_REDIS_URL", embedded_server.url)
    worker = ActingWorker(embedded_redis)
    worker.announce()

    def run(*args: str) -> str:
        return CliRunner().invoke(app, list(args)).stdout

    done = json.loads(run("submit", "x", "--json"))["job_id"]
    worker.run(done, "Par", "is")
    waiting = json.loads(run("submit", "y", "--json"))["job_id"]
    events = [json.loads(line) for line in run("stream", done, "--json").splitlines()]

    assert [(event["seq"], event["type"]) for event in events] == [(1, "token"), (2, "token"), (3, "done")]
    assert json.loads(run("cancel", waiting, "--json")) == {"job_id": waiting, "status": "cancelled"}
    findings = json.loads(run("doctor", "--json", "--disk-mib", "4", "--store", str(tmp_path)))
    assert {"level", "what", "fix"} == set(findings[0])
    for command in ("jobs", "workers", "limits", "status"):
        assert json.loads(run(command, *([done] if command == "status" else []), "--json"))


def test_chat_answers_a_pipe_as_json(
    embedded_server: EmbeddedServer, embedded_redis: redis.Redis, monkeypatch: pytest.MonkeyPatch, serving: object
) -> None:
    monkeypatch.setenv("LAMELLA_REDIS_URL", embedded_server.url)
    worker = ActingWorker(embedded_redis)
    worker.announce()
    assert callable(serving)
    serving(worker, "Par", "is")

    result = CliRunner().invoke(app, ["chat", "--json"], input="capital of France?")

    assert json.loads(result.stdout)["text"] == "Paris"
