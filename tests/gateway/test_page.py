"""What README and docs/gateway.md show about the gateway is run as it stands, with another address and model."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path

import openai
import pytest

from lamella.embedded import EmbeddedServer
from tests.client.acting_worker import MODEL
from tests.gateway.conftest import MakeKey
from tests.gateway.running_gateway import AnsweringWorker, RunningGateway

ROOT = Path(__file__).resolve().parent.parent.parent
SHOWN_URL, SHOWN_MODEL = "http://127.0.0.1:8080", "Qwen/Qwen3-0.6B"


def section(page: str, heading: str) -> str:
    text = (ROOT / page).read_text()
    return text[text.index(heading) :].partition("\n## ")[0]


def code(text: str, language: str) -> str:
    found = re.search(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert found is not None
    return found[1]


def test_the_snippet_of_the_readme_runs(
    guarded: RunningGateway, answering: AnsweringWorker, new_key: MakeKey, capsys: pytest.CaptureFixture[str]
) -> None:
    snippet = code(section("README.md", "## Use it over HTTP"), "python")
    for shown, real in ((SHOWN_URL, guarded.url), (SHOWN_MODEL, MODEL), ("sk-lamella-...", new_key("ada"))):
        assert shown in snippet
        snippet = snippet.replace(shown, real)
    names: dict[str, openai.OpenAI] = {}

    exec(compile(snippet, "README.md", "exec"), names)
    names["client"].close()

    assert capsys.readouterr().out == "Hello there\n"


def test_the_curl_line_of_the_readme_runs(gateway: RunningGateway, answering: AnsweringWorker) -> None:
    (line,) = [
        line for line in code(section("README.md", "## Use it over HTTP"), "bash").splitlines() if line[:4] == "curl"
    ]
    words = shlex.split(line.replace(SHOWN_URL, gateway.url).replace(SHOWN_MODEL, MODEL))

    outcome = subprocess.run([*words, "-s"], capture_output=True, text=True, timeout=40, check=True)

    assert json.loads(outcome.stdout)["choices"][0]["message"]["content"] == "Hello there"


def test_the_resuming_snippet_of_the_page_runs(
    gateway: RunningGateway, answering: AnsweringWorker, capsys: pytest.CaptureFixture[str]
) -> None:
    names: dict[str, object] = {}
    exec(compile(code(section("docs/gateway.md", "## Resuming"), "python"), "gateway.md", "exec"), names)
    with gateway.client() as sdk:
        made = sdk.responses.create(model=MODEL, input="Hi")

        names["follow"](sdk, made.id, 9)  # type: ignore[operator]  # the page defines it

    assert capsys.readouterr().out == "10 response.completed\n"


def test_every_key_of_the_page_can_be_made(embedded_server: EmbeddedServer) -> None:
    from typer.testing import CliRunner

    from lamella_gateway.keys_cli import app

    lines = [line.strip() for line in (ROOT / "docs" / "gateway.md").read_text().splitlines() if "keys create" in line]
    for line in lines:
        if line.startswith("lamella"):
            words = [*shlex.split(line)[2:], "--redis-url", embedded_server.url]
            assert CliRunner().invoke(app, words).output.startswith("sk-lamella-")
