"""The private server: its settings, its data, its end, and what an earlier run may have left."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from lamella.embedded import SOCKET_PATH_BYTES, EmbeddedServer, ask, server_program, socket_path_for
from lamella.errors import ConfigError, LamellaError
from tests.fixtures.servers import require_embedded
from tests.waiting import wait_until


@pytest.fixture
def data_dir() -> Iterator[Path]:
    require_embedded()
    with tempfile.TemporaryDirectory(prefix="lamella-") as directory:
        yield Path(directory) / "data"


def link(server: EmbeddedServer) -> redis.Redis:
    return redis.Redis.from_url(server.url, protocol=2, decode_responses=True)


def test_settings_are_safe_against_loss(data_dir: Path) -> None:
    with EmbeddedServer(data_dir) as server, link(server) as client:
        settings = client.config_get("append*") | client.config_get("maxmemory-policy") | client.config_get("port")

        assert settings["appendonly"] == "yes"
        assert settings["appendfsync"] == "everysec"
        assert settings["maxmemory-policy"] == "noeviction"
        assert settings["port"] == "0"


def test_only_this_user_can_reach_it(data_dir: Path) -> None:
    with EmbeddedServer(data_dir) as server:
        assert stat.S_IMODE(data_dir.stat().st_mode) == 0o700
        assert stat.S_IMODE(server.socket_path.stat().st_mode) == 0o700


def test_data_outlive_the_server(data_dir: Path) -> None:
    with EmbeddedServer(data_dir) as server, link(server) as client:
        client.set("key", "value")

    with EmbeddedServer(data_dir) as server, link(server) as client:
        assert client.get("key") == "value"


def test_stop_leaves_nothing_running(data_dir: Path) -> None:
    server = EmbeddedServer(data_dir).start()
    pid = server.pid
    assert pid is not None

    server.stop()
    server.stop()

    assert not server.socket_path.exists()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_second_server_on_the_same_data_is_refused(data_dir: Path) -> None:
    with EmbeddedServer(data_dir), pytest.raises(LamellaError, match=f"already running.*process {os.getpid()}"):
        EmbeddedServer(data_dir).start()


def test_starting_twice_is_refused(data_dir: Path) -> None:
    with EmbeddedServer(data_dir) as server, pytest.raises(LamellaError, match="already started"):
        server.start()


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's signal at a parent's death is Linux only")
def test_it_dies_with_its_parent_and_starts_again(data_dir: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from lamella.embedded import EmbeddedServer\n"
        "server = EmbeddedServer(Path(sys.argv[1])).start(); print(server.pid, flush=True); sys.stdin.read()"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", program, str(data_dir)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdin is not None
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())

    parent.kill()
    parent.wait(timeout=40)
    parent.stdin.close()
    parent.stdout.close()

    wait_until(lambda: not Path(f"/proc/{pid}").exists() or "State:\tZ" in Path(f"/proc/{pid}/status").read_text())
    with EmbeddedServer(data_dir) as server:
        assert ask(server.socket_path, "PING", 5.0) == "+PONG"


def test_an_orphan_is_ended_before_a_new_start(data_dir: Path) -> None:
    EmbeddedServer(data_dir).start().stop()  # leaves its configuration
    orphan = subprocess.Popen(
        [str(server_program()), str(data_dir / "server.conf")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        wait_until(lambda: ask(socket_path_for(data_dir), "PING", 1.0) == "+PONG")

        with EmbeddedServer(data_dir) as server:
            assert server.pid != orphan.pid
            assert orphan.wait(timeout=40) == 0
    finally:
        orphan.kill()
        orphan.wait(timeout=40)


def test_a_dead_socket_is_no_obstacle(data_dir: Path) -> None:
    server = EmbeddedServer(data_dir).start()
    assert server.pid is not None
    os.kill(server.pid, signal.SIGKILL)
    wait_until(lambda: not server.is_running)
    assert server.socket_path.exists()
    left = server.socket_path.stat().st_ino
    server._process = None  # as if this process had died with it
    server.stop()

    with EmbeddedServer(data_dir) as again:
        assert again.socket_path.stat().st_ino != left or again.is_running


def test_a_deep_directory_gets_a_short_socket(data_dir: Path) -> None:
    deep = data_dir / ("d" * 120)

    with EmbeddedServer(deep) as server:
        assert len(os.fsencode(server.socket_path)) <= SOCKET_PATH_BYTES
        assert not server.socket_path.is_relative_to(deep)
        assert stat.S_IMODE(server.socket_path.parent.stat().st_mode) == 0o700
        assert ask(server.socket_path, "PING", 5.0) == "+PONG"
    assert not server.socket_path.exists()


@pytest.mark.parametrize("name", ["with space", 'quo"te', "per%cent", "ha#sh", "qu?estion", "ünï"])
def test_odd_directory_names_work(data_dir: Path, name: str) -> None:
    with EmbeddedServer(data_dir / name) as server, link(server) as client:
        assert client.ping()


def test_an_open_directory_with_other_files_is_refused(data_dir: Path) -> None:
    data_dir.mkdir(mode=0o755)
    (data_dir / "thesis.txt").write_text("mine")

    with pytest.raises(ConfigError, match="--data-dir"):
        EmbeddedServer(data_dir).start()

    assert stat.S_IMODE(data_dir.stat().st_mode) == 0o755


def test_a_directory_that_cannot_be_made_is_a_config_error(data_dir: Path) -> None:
    data_dir.write_text("a file")

    with pytest.raises(ConfigError, match="cannot be used"):
        EmbeddedServer(data_dir / "below").start()


def test_a_server_that_cannot_start_says_why(data_dir: Path) -> None:
    data_dir.mkdir(mode=0o700)
    (data_dir / "appendonlydir").write_text("in the way")

    with pytest.raises(LamellaError, match="its log ends with") as caught:
        EmbeddedServer(data_dir).start()

    assert "appendonlydir" in str(caught.value)
    (data_dir / "appendonlydir").unlink()
    with EmbeddedServer(data_dir) as server:
        assert server.is_running


def test_only_the_main_thread_may_start_it(data_dir: Path) -> None:
    errors: list[Exception] = []

    def start() -> None:
        try:
            EmbeddedServer(data_dir).start()
        except LamellaError as error:
            errors.append(error)

    thread = threading.Thread(target=start, name="starter")
    thread.start()
    thread.join(40)

    if sys.platform == "linux":
        assert "main thread" in str(errors[0])
