"""Secrets come from the environment or from files, and show up nowhere: not in logs, errors, ps, Celery or Flower."""

from __future__ import annotations

import base64
import json
import os
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import quote

import pytest
from typer.testing import CliRunner

from lamella.acl import Role
from lamella.cli.app import app
from lamella.client import Client
from lamella.errors import ConfigError
from lamella.secret_sources import has_password, only_url, read_secret, secret_from, with_password, without_password
from lamella_worker.config import load_config
from tests.security.secured_server import PASSWORDS, SecuredServer
from tests.security.secured_worker import MODEL, PREFIX, SecuredWorker
from tests.waiting import wait_until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="other users' view of processes is read from /proc")
SHOWN = [form for password in PASSWORDS.values() for form in (password, quote(password, safe=""), quote(password))]


def test_a_worker_shows_its_password_nowhere(
    client: Client, secured: SecuredServer, guarded_worker: SecuredWorker
) -> None:
    client.submit("My unmistakable prompt", model=MODEL, max_tokens=2).result(40)
    with secured.admin() as admin:
        beats = repr([admin.get(name) for name in admin.scan_iter(f"{PREFIX}worker:*")])
    everywhere = guarded_worker.log() + command_lines(guarded_worker.pid) + beats

    assert [form for form in SHOWN if form in everywhere] == []
    assert "unmistakable" not in everywhere
    assert "unmistakable" not in command_lines(guarded_worker.pid)


def command_lines(pid: int) -> str:
    """The command lines of a process and its children, as every user of the machine reads them."""
    return "".join(Path(f"/proc/{each}/cmdline").read_text() for each in (str(pid), *children_of(pid)))


def children_of(pid: int) -> list[str]:
    """Process ids of a process's children, whichever of its threads started them."""
    return [child for path in Path(f"/proc/{pid}/task").glob("*/children") for child in path.read_text().split()]


def test_the_engines_process_is_not_given_the_servers_password(guarded_worker: SecuredWorker) -> None:
    environments = [Path(f"/proc/{child}/environ").read_text() for child in children_of(guarded_worker.pid)]

    assert environments
    assert not [text for text in environments if "LAMELLA_REDIS" in text]


def test_flower_shows_jobs_and_workers_and_neither_passwords_nor_prompts(
    client: Client, secured: SecuredServer, guarded_worker: SecuredWorker, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    secret = tmp_path / "monitor.password"
    secret.write_text(PASSWORDS[Role.MONITOR])
    environment = {
        **only_url(secured.bare_url(Role.MONITOR)),
        "LAMELLA_REDIS_PASSWORD_FILE": str(secret),
        "LAMELLA_PREFIX": PREFIX,
        "FLOWER_BASIC_AUTH": "op:pw",
    }
    command = [sys.executable, "-m", "celery", "-A", "lamella_worker.monitor", "flower", "--address=127.0.0.1"]
    with (tmp_path / "flower.log").open("wb") as log:
        process = subprocess.Popen(
            [*command, f"--port={port}", "--read_only=True"],
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
        )
    try:
        workers = wait_until(lambda: page(port, "/api/workers?refresh=1").strip("{} \n") and page(port, "/api/workers"))
        job = client.submit("My unmistakable prompt", model=MODEL, max_tokens=2)
        job.result(40)
        tasks = wait_until(lambda: job.id in (text := page(port, "/api/tasks")) and text)
        name = next(iter(json.loads(workers)))
        pages = [workers, tasks, *(page(port, path) for path in (f"/worker/{name}", f"/task/{job.id}", "/broker"))]
        shown = "".join(pages) + Path(f"/proc/{process.pid}/cmdline").read_text()
    finally:
        process.terminate()
        process.wait(40)

    shown += (tmp_path / "flower.log").read_text(errors="replace")
    assert all(pages)
    assert [form for form in SHOWN if form in shown] == []
    assert "unmistakable" not in shown


def page(port: int, path: str) -> str:
    login = base64.b64encode(b"op:pw").decode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers={"Authorization": f"Basic {login}"})
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return str(answer.read().decode())
    except (urllib.error.URLError, ConnectionError):
        return ""


def test_a_password_comes_from_a_variable_or_a_file(tmp_path: Path) -> None:
    (tmp_path / "pw").write_text("p@ss/word\n")
    from_file = {"LAMELLA_REDIS_PASSWORD_FILE": str(tmp_path / "pw")}

    assert with_password("redis://u@host:1/2", from_file) == "redis://u:p%40ss%2Fword@host:1/2"
    assert with_password("redis://host", {"LAMELLA_REDIS_PASSWORD": "x"}) == "redis://:x@host"
    assert with_password("redis://u:own@host", from_file) == "redis://u:own@host"
    assert with_password("redis://host?password=own", from_file) == "redis://host?password=own"
    assert with_password("unix://u@/run/s?db=1", {"LAMELLA_REDIS_PASSWORD": "x"}) == "unix://u:x@/run/s?db=1"
    assert with_password("unix:///run/s?username=u&db=1", {"LAMELLA_REDIS_PASSWORD": "x"}) == "unix://u:x@/run/s?db=1"
    assert with_password("unix:///run/s", from_file) == "unix:///run/s"
    assert with_password("redis://host", {}) == "redis://host"


def test_two_sources_of_one_secret_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="both set"):
        secret_from({"X": "a", "X_FILE": str(tmp_path / "x")}, "X")


@pytest.mark.parametrize("content", [b"", b"\n", b"one\ntwo\n", b"\xff\xfe", b"a\0b", b"x" * 70_000])
def test_a_file_that_holds_no_secret_is_refused_without_its_content(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "secret").write_bytes(content)

    with pytest.raises(ConfigError) as caught:
        read_secret(tmp_path / "secret", "X_FILE")

    assert "X_FILE names" in str(caught.value)
    assert "one" not in str(caught.value).replace("one line", "")


def test_a_missing_file_is_told_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        read_secret(tmp_path / "none", "X_FILE")


@pytest.mark.parametrize(
    "arguments", [("jobs",), ("status", "x"), ("worker", "--model", "m"), ("worker", "health"), ("doctor",)]
)
@pytest.mark.parametrize("url", ["redis://u:geheim@h/0", "rediss://:geheim@h", "unix:///s?password=geheim"])
def test_a_password_on_a_command_line_is_refused(arguments: tuple[str, ...], url: str) -> None:
    result = CliRunner().invoke(app, [*arguments, "--redis-url", url])

    assert result.exit_code == 2
    assert "LAMELLA_REDIS_PASSWORD" in result.output
    assert "geheim" not in result.output


def test_what_is_no_url_is_searched_for_passwords_as_well() -> None:
    assert has_password("redis://[::1:geheim@h")
    with pytest.raises(ConfigError):
        without_password("redis://[::1:geheim@h", "--redis-url")
    assert without_password(None, "--redis-url") is None


def test_settings_hide_the_url(tmp_path: Path) -> None:
    secret = tmp_path / "url"
    secret.write_text("redis://u:geheim@host:1/0\n")

    config = load_config(None, {"worker.model": "m"}, {"LAMELLA_REDIS_URL_FILE": str(secret)})

    assert config.redis.url.get_secret_value() == "redis://u:geheim@host:1/0"
    assert "geheim" not in repr(config) + str(config) + config.model_dump_json()


def test_settings_complete_the_url_of_the_file_with_the_password_of_the_environment(tmp_path: Path) -> None:
    path = tmp_path / "w.toml"
    path.write_text('[redis]\nurl = "rediss://lamella-worker@host/0"\n[worker]\nmodel = "m"\n')

    config = load_config(path, {}, {"LAMELLA_REDIS_PASSWORD": "geheim"})

    assert config.redis.url.get_secret_value() == "rediss://lamella-worker:geheim@host/0"


def test_a_bad_url_with_a_password_is_told_without_it() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, {"worker.model": "m"}, {"LAMELLA_REDIS_URL": "http://u:geheim@host"})

    assert "geheim" not in str(caught.value) + repr(caught.value.__cause__)


def test_requests_and_tokens_keep_their_text_out_of_reprs_and_errors() -> None:
    from pydantic import ValidationError

    from lamella.messages import ChatMessage, GenerateRequest, TokenEvent

    chat = GenerateRequest(model="m", messages=(ChatMessage(role="user", content="unmistakable"),))
    shown = repr(
        (chat, GenerateRequest(model="m", prompt="unmistakable"), TokenEvent(token_ids=(1,), text="unmistakable"))
    )
    with pytest.raises(ValidationError) as caught:
        GenerateRequest.model_validate({"model": "m", "prompt": ["unmistakable"]})

    assert "unmistakable" not in shown + str(caught.value)
