"""``lamella metrics`` as a process: from its start to SIGTERM, and what stops it at the start."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
from typer.testing import CliRunner

from lamella.client import Client
from lamella.embedded import EmbeddedServer
from lamella_worker.metrics_cli import app
from tests.scrape import scrape
from tests.waiting import wait_until


@pytest.fixture
def exporter(own_server: EmbeddedServer) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process, and host:port as it tells it."""
    program = (
        "import sys; from lamella_worker.metrics_cli import app\n"
        "assert not {'torch', 'celery'} & set(sys.modules)\n"
        "app()"
    )
    command = [sys.executable, "-c", program, "--port", "0", "--redis-url", own_server.url]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        late = threading.Timer(60, process.kill)
        late.start()
        line = process.stderr.readline()
        late.cancel()
        found = re.search(r"http://(\S+)/metrics", line)
        assert found is not None, line
        yield process, found.group(1)
        process.kill()


def test_it_serves_until_it_is_told_to_stop(
    exporter: tuple[subprocess.Popen[str], str], own_server: EmbeddedServer
) -> None:
    process, address = exporter
    with Client(own_server.url) as client:
        client.submit("hello", model="nobodys", require_worker=False)

    waiting = wait_until(
        lambda: f if (f := scrape(address)).has("lamella_queue_jobs", model="nobodys") else None, every_s=0.5
    )
    process.terminate()

    assert waiting.value("lamella_queue_jobs", model="nobodys") == 1
    assert waiting.value("lamella_workers", model="nobodys") == 0
    assert process.wait(40) == 0


def test_a_port_that_cannot_be_is_refused() -> None:
    result = CliRunner().invoke(app, ["--port", "70000"])

    assert result.exit_code == 2


def test_a_url_that_is_none_is_a_wrong_call() -> None:
    result = CliRunner().invoke(app, ["--redis-url", "http://x"])

    assert result.exit_code == 2
    assert "its scheme is 'http'" in result.output


def test_an_address_of_another_host_ends_it_with_the_reason() -> None:
    result = CliRunner().invoke(app, ["--host", "203.0.113.7", "--port", "0"])

    assert result.exit_code == 1
    assert "metrics cannot be served on 203.0.113.7:0" in result.output
