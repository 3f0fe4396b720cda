"""Which server is spoken to, and that no password is ever spoken of."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import redis.exceptions as rx

from lamella.errors import ConfigError, ServerRefused, ServerUnreachable
from lamella.server_errors import is_passing, translated
from lamella.server_url import DEFAULT_URL, check_url, public_url, resolve_url, without_secrets
from lamella.service_state import announce_service, running_service, withdraw_service


@pytest.fixture(autouse=True)
def own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAMELLA_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.delenv("LAMELLA_REDIS_URL", raising=False)


def test_the_argument_beats_the_environment_beats_the_service(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_url(None) == DEFAULT_URL
    announce_service("unix:///run/x.sock?db=0")
    assert resolve_url(None) == "unix:///run/x.sock?db=0"
    monkeypatch.setenv("LAMELLA_REDIS_URL", "redis://env:6379/0")
    assert resolve_url(None) == "redis://env:6379/0"
    assert resolve_url("redis://arg:6379/0") == "redis://arg:6379/0"


def test_a_note_is_withdrawn_only_by_its_writer() -> None:
    first = announce_service("unix:///a.sock")
    second = announce_service("unix:///b.sock")

    withdraw_service(first)
    assert running_service() == second
    withdraw_service(second)
    assert running_service() is None


def test_a_note_of_a_dead_process_is_none(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait(timeout=30)
    (tmp_path / "state").mkdir()
    note = {"url": "unix:///x", "pid": process.pid, "started_at": 1.0}
    (tmp_path / "state" / "service.json").write_text(json.dumps(note))

    assert running_service() is None


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"url": 1}', '{"url": "u", "pid": "x", "started_at": 1}', "\udc80"])
def test_a_broken_note_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "service.json").write_bytes(os.fsencode(text))

    assert running_service() is None


@pytest.mark.parametrize(
    "url",
    [
        "redis://h",
        "redis://h:1/2",
        "rediss://u:p%40@h:1/0?ssl_cert_reqs=none",
        "unix:///x.sock?db=1",
        "redis://[::1]:6379/0",
    ],
)
def test_urls(url: str) -> None:
    assert check_url(url, "x") == url


@pytest.mark.parametrize(
    "url",
    [
        "",
        "h:6379",
        "http://h",
        "redis://",
        "unix://",
        "redis://h:x",
        "redis://u:ge#heim@h:1",
        "redis://h/db",
        "redis://h:0",
    ],
)
def test_what_is_no_url_is_refused_without_repeating_it(url: str) -> None:
    with pytest.raises(ConfigError, match="LAMELLA_REDIS_URL is not a server URL") as caught:
        check_url(url, "LAMELLA_REDIS_URL")

    assert "heim" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_unknown_options_are_named() -> None:
    with pytest.raises(ConfigError, match="'retries'"):
        check_url("redis://h?retries=5", "x")


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://user:geheim@h:1/2?db=3", "redis://h:1/2"),
        ("rediss://:geheim@h", "rediss://h:6379"),
        ("unix:///x.sock?db=1&password=geheim", "unix:///x.sock"),
        ("redis://[::1]:1/0", "redis://[::1]:1/0"),
    ],
)
def test_the_public_form_has_no_secrets(url: str, shown: str) -> None:
    assert public_url(url) == shown


def test_a_password_in_an_answer_is_blotted_out() -> None:
    url = "redis://user:ge%40heim@h:1/0"

    assert without_secrets("unknown command, args: 'ge@heim' ge%40heim", url) == "unknown command, args: '***' ***"
    assert "geheim" not in without_secrets("got geheim", "unix:///x?password=geheim")


@pytest.mark.parametrize(
    ("error", "kind", "says"),
    [
        (rx.ConnectionError("Error 111"), ServerUnreachable, "lamella up"),
        (rx.TimeoutError(""), ServerUnreachable, "TimeoutError"),
        (rx.BusyLoadingError("Redis is loading"), ServerUnreachable, "loading"),
        (TimeoutError(), ServerUnreachable, "no answer"),
        (rx.OutOfMemoryError("command not allowed"), ServerRefused, "memory is full"),
        (rx.ReadOnlyError("x"), ServerRefused, "primary"),
        (rx.NoPermissionError("x"), ServerRefused, "rights"),
        (rx.AuthenticationError("Authentication required."), ServerRefused, "asks for a password"),
        (rx.AuthenticationError("invalid username-password pair"), ServerRefused, "is wrong"),
        (rx.AuthenticationError("else"), ServerRefused, "login"),
        (rx.ResponseError("MISCONF Redis is configured"), ServerRefused, "disk"),
        (rx.ResponseError("WRONGTYPE"), ServerRefused, "WRONGTYPE"),
    ],
)
def test_errors_say_what_to_do(error: Exception, kind: type[Exception], says: str) -> None:
    ours = translated(error, "redis://u:geheim@h:1/0")

    assert isinstance(ours, kind)
    assert says in str(ours)
    assert "redis://h:1/0" in str(ours)


def test_only_what_may_pass_is_tried_again() -> None:
    assert is_passing(rx.ConnectionError())
    assert is_passing(ConnectionResetError())
    assert not is_passing(rx.AuthenticationError())
    assert not is_passing(rx.OutOfMemoryError())
