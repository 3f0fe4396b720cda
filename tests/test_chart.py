"""configs/helm: rendered by Helm's own engine, judged by Kubernetes' schemas; what it starts is parsed or run."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis
import yaml

from lamella.acl import Role, admin_lines, user_line
from lamella.embedded import server_program
from lamella.keys import Keys
from lamella_gateway.app import make_app
from lamella_gateway.settings import Settings
from lamella_worker.config import load_config
from lamella_worker.metrics_fleet import FleetReader
from tests.fixtures.servers import require_embedded
from tests.shown_commands import parse
from tests.waiting import wait_until

ROOT = Path(__file__).resolve().parent.parent
CHART = ROOT / "configs" / "helm" / "lamella"
OF_KUBERNETES = ("1.28", "1.31", "1.34")
POOL = {"name": "pascal", "models": ["a", "b/c"], "gpus": 1, "store": {"size": "9Gi"}}
EXTERNAL = {"valkey": {"enabled": False}, "redis": {"urlSecret": "urls", "caSecret": "authority"}}


def _helm() -> Any:
    """Helm's own engine as a library; there is no wheel of it for every platform, but one for where CI runs."""
    try:
        import helm_python
    except ImportError:
        if os.environ.get("CI") == "true" and os.uname().sysname == "Linux" and os.uname().machine == "x86_64":
            raise
        pytest.skip("helm-python-sdk is not installed")
    return helm_python


def _render(values: dict[str, Any], name: str = "demo") -> list[dict[str, Any]]:
    with _helm().Chart.load(str(CHART)) as chart:
        files: dict[str, str] = chart.render(values, name=name, namespace="here")
    texts = [text for path, text in files.items() if path.endswith(".yaml")]
    return [document for text in texts for document in yaml.safe_load_all(text) if document]


def _of_kind(documents: list[dict[str, Any]], kind: str) -> dict[str, dict[str, Any]]:
    return {document["metadata"]["name"]: document for document in documents if document["kind"] == kind}


def _pods(documents: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The pod of each workload, by the workload's name."""
    return {
        document["metadata"]["name"]: document["spec"]["template"]["spec"]
        for document in documents
        if document["kind"] in ("StatefulSet", "Deployment")
    }


VALUES: dict[str, dict[str, Any]] = {
    "as they are": {},
    "an external server": EXTERNAL,
    "two pools": {"workers": {"pools": [POOL, {**POOL, "name": "ampere", "store": {"hostPath": "/srv/shards"}}]}},
    "workers alone": {
        "gateway": {"enabled": False},
        "metrics": {"enabled": False},
        "networkPolicy": {"enabled": False},
    },
    "narrow network": {"networkPolicy": {"gatewayFrom": [{"namespaceSelector": {"matchLabels": {"team": "a"}}}]}},
}


@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES.keys())
@pytest.mark.parametrize("version", OF_KUBERNETES)
def test_chart_renders_what_kubernetes_takes(values: dict[str, Any], version: str) -> None:
    documents = _render(values)
    kubernetes_validate = pytest.importorskip("kubernetes_validate")

    assert documents
    for document in documents:
        kubernetes_validate.validate(document, version, strict=True)


@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES.keys())
def test_pods_are_unprivileged_and_see_their_own_password_only(values: dict[str, Any]) -> None:
    pods = _pods(_render(values))

    assert pods
    for name, pod in pods.items():
        (container,) = pod["containers"]
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert container["securityContext"]["readOnlyRootFilesystem"] is True
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        (users,) = (volume["secret"] for volume in pod["volumes"] if volume["name"] == "users")
        passwords = [item["key"] for item in users["items"] if item["key"].endswith(".password")]
        assert len(passwords) == 1, name
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        declared = {volume["name"] for volume in pod["volumes"]}
        assert mounted - declared <= {"store", "data"}, "those come from volumeClaimTemplates"
        assert declared <= mounted


@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES.keys())
def test_containers_start_commands_that_are_understood(values: dict[str, Any]) -> None:
    pods = _pods(_render(values))

    for pod in pods.values():
        (container,) = pod["containers"]
        if "args" in container:
            assert parse(container["args"])
        for probe in ("readinessProbe", "livenessProbe"):
            command = container.get(probe, {}).get("exec", {}).get("command", [])
            assert "$(" not in " ".join(command).replace("$(cat", ""), "a probe's command knows no variables of the pod"
            if "lamella_worker" in command:
                assert parse(["worker", *command[3:]])


def test_probes_of_the_gateway_are_routes_that_it_has() -> None:
    (container,) = _pods(_render({}))["demo-lamella-gateway"]["containers"]
    routes = {getattr(route, "path", None) for route in make_app(Settings()).routes}

    paths = {container[probe]["httpGet"]["path"] for probe in ("startupProbe", "livenessProbe", "readinessProbe")}

    assert paths == {"/health/live", "/health/ready"}
    assert paths <= routes


def test_settings_of_a_pool_are_those_that_a_worker_takes(tmp_path: Path) -> None:
    engine = {"kv_tokens": 1000000, "ram": "60%", "offline": True, "peers": ["http://h:9530"], "max_sequences": 4}
    worker = {"shares": {"a": 2.5}, "drain_s": 60.5, "max_attempts": 2}
    documents = _render({"workers": {"pools": [{**POOL, "engine": engine, "worker": worker}]}})
    (text,) = (
        document["data"]["worker.toml"]
        for document in _of_kind(documents, "ConfigMap").values()
        if "worker.toml" in document["data"]
    )
    (tmp_path / "worker.toml").write_text(text)

    config = load_config(tmp_path / "worker.toml", {}, environ={})

    assert config.worker.models == ("a", "b/c")
    assert config.worker.device == "cuda:0"
    assert (config.worker.drain_s, dict(config.worker.shares)) == (60.5, {"a": 2.5})
    assert (config.engine.kv_tokens, config.engine.ram, config.engine.offline) == (1000000, "60%", True)
    assert config.engine.peers == ("http://h:9530",)
    assert config.telemetry.metrics_port == 9464


def test_pool_gets_its_card_its_nodes_and_time_to_drain() -> None:
    pool = {**POOL, "worker": {"drain_s": 100}, "nodeSelector": {"card": "gtx-1080"}, "gpuResource": "amd.com/gpu"}

    pod = _pods(_render({"workers": {"pools": [pool]}}))["demo-lamella-worker-pascal"]

    assert pod["containers"][0]["resources"]["limits"] == {"amd.com/gpu": 1}
    assert pod["nodeSelector"] == {"card": "gtx-1080"}
    assert pod["terminationGracePeriodSeconds"] >= 110
    assert "livenessProbe" not in pod["containers"][0]


def test_pod_without_a_drain_of_its_own_outlasts_the_default() -> None:
    default_s = load_config(None, {"worker.model": "a"}, environ={}).worker.drain_s

    pod = _pods(_render({"workers": {"pools": [POOL]}}))["demo-lamella-worker-pascal"]

    assert pod["terminationGracePeriodSeconds"] >= default_s + 10


def test_external_server_is_reached_by_urls_from_a_secret() -> None:
    documents = _render(EXTERNAL)

    assert not [name for name in _of_kind(documents, "StatefulSet") if "valkey" in name]
    for name, pod in _pods(documents).items():
        environment = {entry["name"]: entry.get("value", "") for entry in pod["containers"][0]["env"]}
        assert "LAMELLA_REDIS_URL" not in environment, name
        assert environment["LAMELLA_REDIS_URL_FILE"].startswith("/etc/lamella/redis/")
        assert {"secretName": "authority"}.items() <= next(
            volume["secret"].items() for volume in pod["volumes"] if volume["name"] == "ca"
        )


def test_image_names_come_from_the_values_and_name_no_registry() -> None:
    shipped = yaml.safe_load((CHART / "values.yaml").read_text())

    images = {pod["containers"][0]["image"] for pod in _pods(_render({})).values()}
    others = {
        pod["containers"][0]["image"]
        for pod in _pods(
            _render(
                {
                    "image": {"repository": "r.example/l", "tag": "2"},
                    "valkey": {"image": {"repository": "r.example/v"}},
                }
            )
        ).values()
    }

    assert all("." not in image.split("/")[0].split(":")[0] for image in images), images
    assert others == {"r.example/l:2", f"r.example/v:{shipped['valkey']['image']['tag']}"}


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown value": ({"gatway": {}}, "gatway"),
    "two cards for a pod": ({"workers": {"pools": [{**POOL, "gpus": 2}]}}, "gpus"),
    "no model": ({"workers": {"pools": [{**POOL, "models": []}]}}, "models"),
    "no store": ({"workers": {"pools": [{**POOL, "store": {"size": ""}}]}}, "store"),
    "a device of its own": ({"workers": {"pools": [{**POOL, "worker": {"device": "cpu"}}]}}, "worker"),
    "pools of one name": ({"workers": {"pools": [POOL, POOL]}}, "pascal"),
    "no server": ({"valkey": {"enabled": False}}, "redis.urlSecret"),
}


@pytest.mark.parametrize(("values", "named"), WRONG.values(), ids=WRONG.keys())
def test_values_that_cannot_work_are_refused_by_name(values: dict[str, Any], named: str) -> None:
    helm = _helm()

    with pytest.raises(helm.HelmError, match=re.escape(named)):
        _render(values)


def test_network_is_closed_but_for_what_is_needed() -> None:
    policies = _of_kind(_render({}), "NetworkPolicy")

    closed = policies["demo-lamella-closed"]["spec"]
    assert closed["policyTypes"] == ["Ingress"]
    assert "ingress" not in closed
    assert set(policies) == {f"demo-lamella-{part}" for part in ("closed", "valkey", "gateway", "metrics")}


@contextmanager
def _server(directory: Path, settings: str) -> Iterator[Path]:
    """The chart's Valkey with its own settings and users, on a socket."""
    for role in Role:
        (directory / f"{role.value}.password").write_text(f"of-{role.value}")
    lines = [*admin_lines(["of-admin"]), *(user_line(role, "lamella:", [f"of-{role.value}"], 0) for role in Role)]
    (directory / "users.acl").write_text("\n".join(lines) + "\n")
    own = settings.replace("/data", str(directory)).replace("/etc/lamella/users", str(directory))
    (directory / "valkey.conf").write_text(own)
    socket = directory / "s"
    process = subprocess.Popen(
        [str(server_program()), str(directory / "valkey.conf"), "--port", "0", "--unixsocket", str(socket)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        wait_until(lambda: socket.exists() or process.poll() is not None)
        assert process.poll() is None, process.communicate(timeout=40)[0]
        yield socket
    finally:
        process.terminate()
        process.communicate(timeout=40)


def test_users_of_the_chart_can_do_their_work_on_its_server(tmp_path: Path) -> None:
    require_embedded()
    documents = _render({})
    settings = _of_kind(documents, "ConfigMap")["demo-lamella-valkey"]["data"]["valkey.conf"]
    environments = {
        name: {entry["name"]: entry.get("value", "") for entry in pod["containers"][0].get("env", [])}
        for name, pod in _pods(documents).items()
    }
    urls = {name.removeprefix("demo-lamella-"): env.get("LAMELLA_REDIS_URL", "") for name, env in environments.items()}
    users = {part: url.partition("//")[2].partition("@")[0] for part, url in urls.items() if url}

    with _server(tmp_path, settings) as socket:
        for part, user in users.items():
            password = f"of-{user.removeprefix('lamella-')}"
            client = redis.Redis(
                unix_socket_path=str(socket),
                username=user,
                password=password,
                protocol=2,
                decode_responses=True,
                socket_timeout=40,
            )
            assert client.ping(), part
            if part == "metrics":
                assert FleetReader(client, Keys("lamella:")).read() is not None
            client.close()
        stranger = redis.Redis(unix_socket_path=str(socket), protocol=2, socket_timeout=40)
        with pytest.raises(redis.exceptions.AuthenticationError):
            stranger.ping()
        stranger.close()

    assert set(users) == {"gateway", "metrics", "worker-cpu"}


def test_settings_of_the_charts_server_are_those_of_the_shipped_file() -> None:
    shipped = (ROOT / "configs" / "valkey.conf").read_text()
    settings = _of_kind(_render({}), "ConfigMap")["demo-lamella-valkey"]["data"]["valkey.conf"].splitlines()

    for line in shipped.splitlines():
        if line and not line.startswith("#"):
            assert line in settings


def test_key_command_of_the_notes_exists() -> None:
    assert "`lamella keys create NAME`" in (CHART / "templates" / "NOTES.txt").read_text()
    assert parse(["keys", "create", "NAME"])
