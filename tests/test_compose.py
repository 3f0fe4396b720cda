"""docker-compose.yml, Dockerfile and .env.example fit together and fit the code, as far as shows without Docker."""

from __future__ import annotations

import ipaddress
import os
import re
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from lamella_gateway.app import make_app
from lamella_gateway.settings import Settings
from lamella_worker.cli import app as worker_app
from lamella_worker.config import load_config
from tests.shown_commands import parse

ROOT = Path(__file__).resolve().parent.parent
COMPOSE_TEXT = (ROOT / "docker-compose.yml").read_text()
DOCKERFILE = (ROOT / "Dockerfile").read_text()
COMPOSE = yaml.safe_load(COMPOSE_TEXT)
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
WORKERS = {name: service for name, service in SERVICES.items() if name.startswith("worker-")}
VARIABLE = re.compile(r"(?<!\$)\$\{(?P<name>\w+)(?P<rest>[^}]*)\}")
SECRETS = {"VALKEY_PASSWORD", "FLOWER_PASSWORD"}
UNITS_S = {"s": 1, "m": 60, "h": 3600}


def _env_example() -> dict[str, str]:
    lines = (ROOT / ".env.example").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def _interpolated(text: str, values: dict[str, str]) -> str:
    """Resolve ${NAME}, ${NAME:-default} and ${NAME:?message} as Compose does."""

    def resolve(match: re.Match[str]) -> str:
        name, rest = match["name"], match["rest"]
        if value := values.get(name):
            return value
        if rest.startswith(":?"):
            raise KeyError(name)
        assert rest.startswith(":-") or not rest, f"unknown form ${{{name}{rest}}}"
        return rest.removeprefix(":-")

    return VARIABLE.sub(resolve, text).replace("$$", "$")


def _seconds(duration: str) -> float:
    return sum(float(count) * UNITS_S[unit] for count, unit in re.findall(r"([\d.]+)([smh])", duration))


def _filled_in() -> dict[str, Any]:
    values = _env_example() | dict.fromkeys(SECRETS, "secret") | {"LAMELLA_MODEL": "Qwen/Qwen3-0.6B"}
    return yaml.safe_load(_interpolated(COMPOSE_TEXT, values))


@pytest.mark.parametrize("name", ["VALKEY_PASSWORD", "FLOWER_PASSWORD", "LAMELLA_MODEL"])
def test_required_variable_stops_compose_when_unset(name: str) -> None:
    values = {"VALKEY_PASSWORD": "a", "FLOWER_PASSWORD": "b", "LAMELLA_MODEL": "m"} | {name: ""}

    with pytest.raises(KeyError, match=name):
        _interpolated(COMPOSE_TEXT, values)


def test_required_variables_say_what_to_do() -> None:
    required = [match for match in VARIABLE.finditer(COMPOSE_TEXT) if match["rest"].startswith(":?")]

    assert {match["name"] for match in required} == SECRETS | {"LAMELLA_MODEL"}
    assert all(f"set {match['name']} in .env, see .env.example" in match["rest"] for match in required)


def test_secrets_are_always_required_and_have_no_value_in_the_example() -> None:
    uses = [match for match in VARIABLE.finditer(COMPOSE_TEXT) if match["name"] in SECRETS]

    assert uses
    assert all(match["rest"].startswith(":?") for match in uses)
    assert {_env_example()[name] for name in (*SECRETS, "GRAFANA_PASSWORD")} == {""}


def test_example_names_every_setting_without_a_fallback_in_compose() -> None:
    used = {match["name"] for match in VARIABLE.finditer(COMPOSE_TEXT)}
    optional = {"LAMELLA_VERSION"} | {name for name in used if name.endswith(("_IMAGE", "_PORT"))}
    assert all(match["rest"].startswith(":-") for match in VARIABLE.finditer(COMPOSE_TEXT) if match["name"] in optional)

    assert set(_env_example()) - {"COMPOSE_PROFILES"} == used - optional


def test_env_file_is_ignored_by_git() -> None:
    assert ".env" in (ROOT / ".gitignore").read_text().splitlines()


def test_file_resolves_with_the_example_filled_in() -> None:
    services = _filled_in()["services"]

    assert services["worker-gpu0"]["command"][-2:] == ["--model", "Qwen/Qwen3-0.6B"]
    assert services["worker-cpu"]["environment"]["LAMELLA_REDIS_URL"] == "redis://:secret@valkey:6379/0"
    assert services["flower"]["environment"]["FLOWER_BASIC_AUTH"] == "lamella:secret"


@pytest.mark.parametrize("name", SERVICES)
def test_service_is_supervised(name: str) -> None:
    service = SERVICES[name]

    assert service["restart"] == "unless-stopped"
    assert service["healthcheck"]["test"]
    assert {"interval", "timeout", "retries", "start_period"} <= set(service["healthcheck"])


@pytest.mark.parametrize("name", SERVICES)
def test_ports_are_published_on_loopback_only(name: str) -> None:
    for port in _filled_in()["services"][name].get("ports", []):
        host = str(port).split(":")[0]
        assert ipaddress.ip_address(host).is_loopback, port


def test_named_volumes_are_declared_and_files_exist() -> None:
    services = _filled_in()["services"]
    mounts = [mount.split(":") for service in services.values() for mount in service.get("volumes", [])]

    named = {source for source, *_ in mounts if not source.startswith(".")}
    files = {source for source, *_ in mounts if source.startswith(".")}

    assert named == set(COMPOSE["volumes"])
    assert all((ROOT / source).is_file() for source in files)
    assert all(mode == ["ro"] for source, _, *mode in mounts if source.startswith("."))


def test_gpu_workers_have_one_card_each() -> None:
    gpu_workers = [service for service in WORKERS.values() if "gpu" in service["profiles"]]
    reserved = [service["deploy"]["resources"]["reservations"]["devices"] for service in gpu_workers]

    assert len(gpu_workers) >= 2
    assert all(len(devices) == 1 and devices[0]["capabilities"] == ["gpu"] for devices in reserved)
    cards = [devices[0]["device_ids"] for devices in reserved]
    assert sorted(cards) == [[str(number)] for number in range(len(cards))]
    assert "deploy" not in WORKERS["worker-cpu"]


def test_profiles_of_the_example_exist() -> None:
    profiles = {profile for service in SERVICES.values() for profile in service.get("profiles", [])}

    assert profiles == {"gpu", "cpu", "gateway", "monitoring"}
    assert _env_example()["COMPOSE_PROFILES"] in profiles


def test_workers_have_host_names_of_their_own() -> None:
    assert len({service["hostname"] for service in WORKERS.values()}) == len(WORKERS)


@pytest.mark.parametrize("name", WORKERS)
def test_worker_has_more_time_to_stop_than_it_takes_to_drain(name: str) -> None:
    mounts = [mount.split(":") for mount in _filled_in()["services"][name]["volumes"]]
    config_path = next(ROOT / source for source, target, *_ in mounts if target == "/etc/lamella/worker.toml")

    config = load_config(config_path, {}, environ={})

    assert _seconds(WORKERS[name]["stop_grace_period"]) >= config.worker.drain_s + 10


@pytest.mark.parametrize("name", WORKERS)
def test_worker_shares_the_store_named_in_its_config(name: str) -> None:
    config = load_config(ROOT / "configs" / "container.toml", {}, environ={})

    assert f"shards:{config.engine.store}" in WORKERS[name]["volumes"]
    assert f"LAMELLA_STORE={config.engine.store}" in DOCKERFILE
    assert f"VOLUME {config.engine.store}" in DOCKERFILE


@pytest.mark.parametrize("name", WORKERS)
def test_workers_share_the_memory_named_in_their_config(name: str) -> None:
    config = load_config(ROOT / "configs" / "container.toml", {}, environ={})
    assert config.engine.shared_memory is not None

    # The engine makes a directory of its user's own in the volume, whose root belongs to nobody.
    assert f"ram:{config.engine.shared_memory.parent}" in WORKERS[name]["volumes"]
    assert COMPOSE["volumes"]["ram"]["driver_opts"]["type"] == "tmpfs"
    assert "mode=1777" in COMPOSE["volumes"]["ram"]["driver_opts"]["o"]


def _options(command: list[str]) -> set[str]:
    return {word for word in command if word.startswith("--")}


def _known_options(name: str | None) -> set[str]:
    command: Any = typer.main.get_command(worker_app)
    if name is not None:
        command = command.commands[name]
    return {option for parameter in command.params for option in parameter.opts}


@pytest.mark.parametrize("name", WORKERS)
def test_worker_command_has_only_options_that_exist(name: str) -> None:
    first, *rest = WORKERS[name]["command"]

    assert first == "worker"
    assert {"--config", "--model"} <= _options(rest) <= _known_options(None)


@pytest.mark.parametrize("name", WORKERS)
def test_worker_is_judged_by_its_own_health_command(name: str) -> None:
    kind, *command = WORKERS[name]["healthcheck"]["test"]

    assert kind == "CMD"
    assert command[:4] == ["python", "-m", "lamella_worker", "health"]
    assert _options(command) <= _known_options("health")


def test_flower_is_read_only_and_behind_a_password() -> None:
    flower = SERVICES["flower"]

    from flower import options  # noqa: F401 - defines the options
    from tornado.options import options as known

    words = dict(word.removeprefix("--").split("=") for word in flower["command"])
    assert words["read_only"] == "True"
    assert set(words) <= set(known._options.keys()) | {name.replace("-", "_") for name in known.as_dict()}
    assert flower["entrypoint"] == ["celery", "-A", "lamella_worker.monitor", "flower"]
    assert "FLOWER_BASIC_AUTH" in flower["environment"]


def test_valkey_is_told_its_password_on_standard_input() -> None:
    command = SERVICES["valkey"]["command"]

    assert command[:2] == ["sh", "-ec"]
    assert "exec valkey-server /etc/lamella/valkey.conf - <<SETTINGS" in command[2]
    assert 'requirepass "$$VALKEY_PASSWORD"' in command[2]
    assert "./configs/valkey.conf:/etc/lamella/valkey.conf:ro" in SERVICES["valkey"]["volumes"]


def test_shell_of_the_valkey_command_is_well_formed() -> None:
    script = SERVICES["valkey"]["command"][2].replace("$$", "$")

    outcome = subprocess.run(["sh", "-n", "-c", script], capture_output=True, text=True, timeout=40, check=False)

    assert outcome.returncode == 0, outcome.stderr


def test_health_command_starts_and_fails_without_a_server(tmp_path: Path) -> None:
    command = WORKERS["worker-cpu"]["healthcheck"]["test"]
    config = str(ROOT / "configs" / "container.toml")
    words = [config if word == "/etc/lamella/worker.toml" else word for word in command[2:]]

    outcome = subprocess.run(
        [sys.executable, *words, "--redis-url", f"unix://{tmp_path}/none"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert outcome.returncode == 1
    assert "Redis does not answer" in outcome.stderr
    assert "Traceback" not in outcome.stderr


def test_image_runs_as_a_user_without_rights() -> None:
    last_stage = DOCKERFILE[DOCKERFILE.rindex("\nFROM ") :]

    users = re.findall(r"^USER (\S+)", last_stage, re.MULTILINE)

    assert users == ["lamella"]
    assert f"useradd --uid 10001 --create-home --shell /usr/sbin/nologin {users[0]}" in last_stage


def test_image_copies_only_what_the_builder_is_sent() -> None:
    copies = re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.MULTILINE)
    sources = [source for line in copies for source in line.split()]
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]

    assert rules[0] == "*"
    assert sources
    for source in sources:
        assert (ROOT / source).exists(), source
        assert any(fnmatch(source, rule[1:]) for rule in rules if rule.startswith("!")), source


def test_build_arguments_of_compose_are_those_of_the_image() -> None:
    arguments = COMPOSE["x-image"]["build"]["args"]

    assert set(arguments) <= set(re.findall(r"^ARG (\w+)", DOCKERFILE, re.MULTILINE))


def test_image_starts_the_command_line() -> None:
    assert 'ENTRYPOINT ["lamella"]' in DOCKERFILE


def test_server_and_flower_run_whatever_profile_is_chosen() -> None:
    assert {name for name, service in SERVICES.items() if "profiles" not in service} == {"valkey", "flower"}


@pytest.mark.parametrize("name", ["gateway", "metrics"])
def test_command_of_the_service_is_understood_and_its_port_is_the_one_asked_for_health(name: str) -> None:
    service = SERVICES[name]

    told = parse(service["command"])

    assert told["host"] == "0.0.0.0", "other containers could not reach it"
    assert f"http://127.0.0.1:{told['port']}/" in service["healthcheck"]["test"][-1]


def test_gateway_is_healthy_by_a_route_it_has_and_stops_after_its_grace() -> None:
    gateway = SERVICES["gateway"]
    routes = {getattr(route, "path", None) for route in make_app(Settings()).routes}

    assert "/health/live" in routes
    assert ":8080/health/live" in gateway["healthcheck"]["test"][-1]
    assert _seconds(gateway["stop_grace_period"]) >= parse(gateway["command"])["grace_s"] + 10


def test_image_has_what_its_services_need() -> None:
    (extras,) = re.findall(r"lamella-\*\.whl\)\[([\w,]+)\]", DOCKERFILE)

    assert {"worker", "server", "flower"} <= set(extras.split(","))


def test_prometheus_scrapes_services_that_are_there_on_ports_they_have() -> None:
    scrapes = yaml.safe_load((ROOT / "configs" / "prometheus" / "compose.yml").read_text())
    of_host = yaml.safe_load((ROOT / "configs" / "prometheus" / "prometheus.yml").read_text())
    jobs = {job["job_name"]: job for job in scrapes["scrape_configs"]}

    port = parse(SERVICES["metrics"]["command"])["port"]

    assert jobs["lamella"]["static_configs"] == [{"targets": [f"metrics:{port}"]}]
    assert jobs["lamella-workers"]["http_sd_configs"][0]["url"] == f"http://metrics:{port}/targets"
    assert jobs["lamella-gateway"]["dns_sd_configs"][0]["port"] == parse(SERVICES["gateway"]["command"])["port"]
    assert scrapes["rule_files"] == of_host["rule_files"]
    assert {job["job_name"] for job in of_host["scrape_configs"]} <= set(jobs)


def test_workers_tell_their_metrics_where_prometheus_reaches_them() -> None:
    telemetry = load_config(ROOT / "configs" / "container.toml", {}, environ={}).telemetry

    assert telemetry.metrics_port is not None
    assert telemetry.metrics_host == "0.0.0.0"
    assert all("ports" not in worker for worker in WORKERS.values())


def test_grafana_finds_the_source_and_the_board() -> None:
    grafana = SERVICES["grafana"]
    mounts = dict(mount.split(":")[:2] for mount in grafana["volumes"])
    source, boards = (
        yaml.safe_load((ROOT / path).read_text())
        for path, target in mounts.items()
        if target.startswith("/etc/grafana/provisioning")
    )

    assert source["datasources"][0]["url"] == "http://prometheus:9090"
    folder = boards["providers"][0]["options"]["path"]
    assert mounts["./configs/grafana/lamella.json"].startswith(f"{folder}/")


@pytest.mark.parametrize(("password", "code"), [("", 1), ("secret", 0)])
def test_grafana_does_not_start_without_a_password_of_ones_own(tmp_path: Path, password: str, code: int) -> None:
    started = tmp_path / "run.sh"
    started.write_text("#!/bin/sh\n")
    started.chmod(0o755)
    grafana = SERVICES["grafana"]
    (script,) = grafana["command"]

    outcome = subprocess.run(
        [*grafana["entrypoint"], script.replace("$$", "$").replace("/run.sh", str(started))],
        env={"PATH": os.environ["PATH"], "GF_SECURITY_ADMIN_PASSWORD": password},
        capture_output=True,
        text=True,
        timeout=40,
        check=False,
    )

    assert outcome.returncode == code
    assert ("set GRAFANA_PASSWORD in .env" in outcome.stderr) is bool(code)
