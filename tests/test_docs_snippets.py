"""What the pages show works: Python runs against a tiny fleet, commands are parsed, settings are loaded.

Every fenced block of README and docs is covered, or named here with the reason why it is not.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import subprocess
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from lamella import Client
from lamella.connection import Connection
from lamella.embedded import EmbeddedServer
from lamella_engine import ShardStore
from lamella_gateway.api_keys import make_key, shown_key, store_key
from lamella_worker.config import load_config
from tests.doc_blocks import PAGES, ROOT, Block, blocks, lines
from tests.end_to_end.fleet import Fleet
from tests.fixtures.servers import require_embedded
from tests.gateway.running_gateway import RunningGateway
from tests.shown_commands import complaint_of

MODEL = "Qwen/Qwen3-0.6B"  # the name that pages use; the tiny model serves under it

NOT_RUN = {
    "structured.md:python1": "needs a model that can write; tests/end_to_end/test_structured_jobs.py asks one for this",
    "structured.md:python2": "a part of a loop over calls of tools; the same test runs the whole of it",
    "structured.md:python3": "a line out of a program; the same test embeds",
    "observability.md:python1": "needs a provider of OpenTelemetry; tests/end_to_end/test_telemetry.py has one",
}
DEFINES_ONLY = {"README.md:python2", "gateway.md:python1"}  # functions, called by tests of client and gateway
# Programs that pages show beside lamella, none of which a test may start as they stand.
PROGRAMS = {
    "make": "targets are held by tests/test_readme.py",
    "pip": "installs; tests/test_repository.py holds extras and pins",
    "python3": "makes the virtual environment",
    "/opt/lamella/bin/pip": "installs on another host",
    "/opt/lamella/bin/lamella": "parsed as lamella",
    ".": "enters the virtual environment",
    "cd": "changes the directory",
    "umask": "of the shell",
    "export": "of the shell",
    "for": "a loop of the shell",
    "openssl": "draws a password",
    "curl": "tests/gateway/test_page.py sends it",
    "docker": "needs Docker",
    "kubectl": "needs a cluster",
    "helm": "needs a cluster; tests/test_chart.py renders the chart by Helm's own engine",
    "valkey-server": "needs certificates of a host; tests/security/test_tls.py starts such a server",
    "useradd": "changes the host",
    "install": "changes the host",
    "systemctl": "changes the host; tests/test_deployment.py has systemd judge the units",
    "journalctl": "needs systemd",
}


class Service(NamedTuple):
    """What the snippets talk to."""

    redis_url: str
    gateway_url: str
    key: str
    checkpoint: Path


@pytest.fixture(scope="module")
def service(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A server, a worker that serves one tiny model under the pages' name, and a gateway that asks for a key."""
    require_embedded()
    store = tmp_path_factory.mktemp("store")
    ShardStore(store).ensure("tiny-docs", source=tiny_llama_dir)
    with (
        tempfile.TemporaryDirectory(prefix="lamella-") as directory,
        EmbeddedServer(Path(directory) / "d") as server,
        contextlib.closing(Fleet(server.url, store, tmp_path_factory.mktemp("logs"))) as fleet,
        Client(server.url) as client,
        RunningGateway(server.url, requires_key=True) as gateway,
    ):
        fleet.serve(client, "tiny-docs", 1)
        key, secret = make_key("docs", "ada")
        connection = Connection(server.url, "lamella:", 10.0)
        connection.run(store_key(connection.keys, key, secret))
        connection.close()
        yield Service(server.url, gateway.url, shown_key(key, secret), tiny_llama_dir)


def _here(block: Block, service: Service) -> str:
    """The block with this service's addresses and model in the place of the pages'."""
    text = block.text.replace("http://127.0.0.1:8080", service.gateway_url).replace("sk-lamella-...", service.key)
    text = re.sub(r'from_pretrained\("[^"]+"', f"from_pretrained({str(service.checkpoint)!r}", text)
    return text.replace(MODEL, "tiny-docs").replace("max_tokens=100", "max_tokens=10")


@pytest.mark.parametrize("block", [each for each in blocks("python") if str(each) not in NOT_RUN], ids=str)
def test_python_block_runs(block: Block, service: Service, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LAMELLA_REDIS_URL", service.redis_url)
    monkeypatch.setenv("LAMELLA_STORE", str(tmp_path))
    names: dict[str, Any] = {"__name__": "__main__"}
    printed = io.StringIO()

    with contextlib.redirect_stdout(printed):
        exec(compile(_here(block, service), str(block), "exec"), names)
        _close(names)

    assert printed.getvalue() or str(block) in DEFINES_ONLY or "print(" not in block.text


def _close(names: dict[str, Any]) -> None:
    """Close what a snippet left open, as its end of the process would."""
    for value in names.values():
        if callable(close := getattr(value, "close", None)) and not isinstance(value, type):
            close()


@pytest.mark.parametrize("block", blocks("bash"), ids=str)
def test_commands_of_a_shell_block_are_understood(block: Block) -> None:
    for line in lines(block):
        words = re.sub(r"^(?:[A-Z_]+=\S+ )+", "", line)
        program = words.split()[0]
        if program.endswith("lamella"):
            assert complaint_of(re.sub(r"^\S+", "lamella", words)) is None, complaint_of(words)
        else:
            assert program in PROGRAMS, f"{block} starts {program}: say why no test runs it"


@pytest.mark.parametrize("block", blocks("bash"), ids=str)
def test_shell_block_is_well_formed(block: Block) -> None:
    outcome = subprocess.run(["bash", "-n"], input=block.text, capture_output=True, text=True, timeout=40, check=False)

    assert outcome.returncode == 0, outcome.stderr


@pytest.mark.parametrize("block", blocks("toml"), ids=str)
def test_settings_of_a_block_are_those_that_a_worker_takes(block: Block, tmp_path: Path) -> None:
    (tmp_path / "worker.toml").write_text(block.text)
    tables = set(tomllib.loads(block.text))

    config = load_config(tmp_path / "worker.toml", {"worker.model": None}, environ={})

    assert tables <= set(type(config).model_fields)


@pytest.mark.parametrize("block", blocks("yaml"), ids=str)
def test_values_of_the_chart_are_those_it_takes(block: Block) -> None:
    helm = pytest.importorskip("helm_python")

    with helm.Chart.load(str(ROOT / "configs" / "helm" / "lamella")) as chart:
        assert chart.render(yaml.safe_load(block.text), name="shown")


@pytest.mark.parametrize("block", blocks("json"), ids=str)
def test_json_block_is_json_line_by_line(block: Block) -> None:
    assert all(isinstance(json.loads(line), dict) for line in block.text.splitlines())


def test_every_language_of_a_block_is_covered() -> None:
    covered = {"python", "bash", "toml", "yaml", "json"}
    seen = {kind for page in PAGES for kind in re.findall(r"^```(\w+)$", page.read_text(), re.MULTILINE)}

    assert seen - covered <= {"mermaid", "text", "ini", "nginx"}, "say how the others are held"


def test_every_exemption_is_still_needed() -> None:
    shown = {str(block) for block in blocks("python")}
    programs = {re.sub(r"^(?:[A-Z_]+=\S+ )+", "", line).split()[0] for block in blocks("bash") for line in lines(block)}

    assert set(NOT_RUN) <= shown
    assert shown >= DEFINES_ONLY
    assert set(PROGRAMS) <= programs


def test_variables_of_environment_files_are_those_of_the_reference() -> None:
    reference = (ROOT / "docs" / "reference" / "environment.md").read_text()

    for block in blocks("ini"):
        for line in lines(block):
            assert f"`{line.partition('=')[0]}`" in reference, line
