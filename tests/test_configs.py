"""Every file in configs/ works: worker settings load and are complete, the server's settings start a server."""

from __future__ import annotations

import subprocess
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import redis

from lamella.embedded import server_program
from lamella_engine.options import EngineOptions
from lamella_worker.config import WorkerConfig, known_keys, load_config
from tests.fixtures.servers import require_embedded
from tests.waiting import wait_until

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
WORKER_CONFIGS = sorted(CONFIGS.glob("*.toml"))


@pytest.mark.parametrize("path", WORKER_CONFIGS, ids=lambda path: path.stem)
def test_worker_config_loads(path: Path) -> None:
    config = load_config(path, {}, environ={})

    assert isinstance(config, WorkerConfig)
    assert config.worker.drain_s > 0


@pytest.mark.parametrize("path", WORKER_CONFIGS, ids=lambda path: path.stem)
def test_worker_config_makes_engine_options(path: Path) -> None:
    engine = load_config(path, {}, environ={}).engine

    options = EngineOptions(**engine.model_dump())

    assert options.max_sequences == engine.max_sequences


@pytest.mark.parametrize("path", WORKER_CONFIGS, ids=lambda path: path.stem)
def test_worker_config_starts_with_what_it_is_for(path: Path) -> None:
    assert path.read_text().startswith("# ")


def test_every_kind_of_host_has_its_config() -> None:
    names = {path.name for path in CONFIGS.iterdir()}

    assert {
        "local-cpu.toml",
        "small-gpu.toml",
        "pascal.toml",
        "four-gpu-host.toml",
        "container.toml",
        "many-models.toml",
    } <= names


def test_no_file_in_configs_is_left_unchecked() -> None:
    assert {path.suffix for path in CONFIGS.iterdir() if path.is_file()} == {".toml", ".conf", ".acl"}
    # tests/security/test_acl.py reads these.
    assert {path.stem for path in CONFIGS.glob("*.acl")} == {"client", "gateway", "worker", "monitor", "metrics"}
    assert [path.name for path in CONFIGS.glob("*.conf")] == ["valkey.conf"]


def test_reference_config_shows_every_setting() -> None:
    shown = tomllib.loads((CONFIGS / "local-cpu.toml").read_text())

    keys = {f"{table}.{key}" for table, values in shown.items() for key in values}

    # A name must differ between workers, so a file that several may share cannot show one. What is off unless it is
    # set can be shown as a comment only.
    off = {
        "worker.models",
        "worker.shares",
        "telemetry.metrics_port",
        "telemetry.traces",
        "security.encryption_keys_file",
    }
    assert keys == set(known_keys()) - {"worker.name"} - off
    assert all(f"\n# {key.partition('.')[2]} = " in (CONFIGS / "local-cpu.toml").read_text() for key in off)


def test_reference_config_shows_defaults_unless_it_says_otherwise() -> None:
    config = load_config(CONFIGS / "local-cpu.toml", {}, environ={})
    bare = load_config(None, {"worker.model": config.worker.model}, environ={})

    said_otherwise = {
        "dtype": "float32", "kv_tokens": 8192, "sweep_tokens": 256, "shared_memory": Path("/dev/shm/lamella")
    }  # fmt: skip
    assert config.redis == bare.redis
    assert config.security == bare.security
    assert config.worker == bare.worker.model_copy(update={"device": "cpu"})
    assert config.telemetry == bare.telemetry
    assert config.engine == bare.engine.model_copy(update=said_otherwise)


def test_pascal_config_leaves_the_compute_type_to_the_card() -> None:
    assert load_config(CONFIGS / "pascal.toml", {}, environ={}).engine.dtype in (None, "float16", "float32")


@contextmanager
def _server(directory: Path, *settings: str) -> Iterator[redis.Redis]:
    socket = directory / "s"
    command = [str(server_program()), str(CONFIGS / "valkey.conf"), "--port", "0", "--unixsocket", str(socket)]
    process = subprocess.Popen(
        [*command, "--dir", str(directory), *settings], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        wait_until(lambda: socket.exists() or process.poll() is not None)
        assert process.poll() is None, process.communicate(timeout=40)[0]
        client = redis.Redis(unix_socket_path=str(socket), protocol=2, decode_responses=True)
        yield client
        client.close()
    finally:
        process.terminate()
        process.communicate(timeout=40)


def test_server_config_keeps_everything(tmp_path: Path) -> None:
    require_embedded()

    with _server(tmp_path) as client:
        client.set("key", "value")
        settings = client.config_get("*")
    with _server(tmp_path) as client:
        kept = client.get("key")

    assert settings["appendonly"] == "yes"
    assert settings["maxmemory-policy"] == "noeviction"
    assert kept == "value"


def test_server_config_refuses_writes_when_full(tmp_path: Path) -> None:
    require_embedded()

    def fill(client: redis.Redis) -> None:
        for index in range(200):
            client.set(f"key{index}", "x" * 100_000)

    with _server(tmp_path, "--maxmemory", "8mb") as client:
        with pytest.raises(redis.exceptions.OutOfMemoryError):
            fill(client)
        kept = client.get("key0")

    assert kept == "x" * 100_000
