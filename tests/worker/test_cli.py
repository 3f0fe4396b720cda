"""The command line: exit codes and messages, never a stack trace."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lamella.embedded import EmbeddedServer
from lamella_worker.cli import app

runner = CliRunner()


@pytest.fixture(autouse=True)
def quiet_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LAMELLA_REDIS_URL", raising=False)
    monkeypatch.delenv("LAMELLA_STORE", raising=False)


def test_without_a_model_the_worker_says_how_to_give_one() -> None:
    result = runner.invoke(app, [])

    assert result.exit_code == 2
    assert (
        result.stderr.strip()
        == 'error: settings: worker.model is not set; give --model NAME, or write model = "NAME" under [worker]'
    )


def test_an_unknown_key_in_the_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "w.toml"
    path.write_text("[worker]\nmodel = 'm'\n[engine]\nslot = 3\n")

    result = runner.invoke(app, ["--config", str(path)])

    assert result.exit_code == 2
    assert f"{path}: engine.slot is not a setting" in result.stderr


def test_an_unknown_option_is_a_usage_error() -> None:
    assert runner.invoke(app, ["--modle", "x"]).exit_code == 2


def test_health_without_a_worker_fails_in_one_line(embedded_server: EmbeddedServer) -> None:
    result = runner.invoke(app, ["health", "--redis-url", embedded_server.url, "--name", "nobody"])

    assert result.exit_code == 1
    assert result.stderr == "no heartbeat of worker nobody in the last 15 s\n"


def test_health_is_told_as_json(embedded_server: EmbeddedServer) -> None:
    result = runner.invoke(app, ["health", "--redis-url", embedded_server.url, "--name", "nobody", "--json"])

    assert result.exit_code == 1
    assert json.loads(result.stdout) == {
        "is_healthy": False,
        "reason": "no heartbeat of worker nobody in the last 15 s",
    }


def test_health_without_a_server_fails_in_one_line(tmp_path: Path) -> None:
    result = runner.invoke(app, ["health", "--redis-url", f"unix://{tmp_path}/none.sock"])

    assert result.exit_code == 1
    assert "Redis does not answer" in result.stderr
    assert result.stderr.count("\n") == 1


def test_health_takes_the_name_from_the_settings(embedded_server: EmbeddedServer, tmp_path: Path) -> None:
    path = tmp_path / "w.toml"
    path.write_text(f"[redis]\nurl = '{embedded_server.url}'\n[worker]\nname = 'from-file'\n")

    result = runner.invoke(app, ["health", "--config", str(path)])

    assert "worker from-file" in result.stderr


def test_help_shows_every_flag_that_errors_name() -> None:
    from lamella_worker.config import FLAGS

    result = runner.invoke(app, ["--help"], env={"COLUMNS": "200"})

    assert result.exit_code == 0
    assert all(flag in result.stdout for flag in FLAGS.values())
