"""The worker page of a real Flower, over a real server and a real worker process."""

from __future__ import annotations

import base64
import html
import re
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from lamella.cli.flower import Flower
from lamella.client import Client
from lamella.embedded import EmbeddedServer
from tests.waiting import wait_until
from tests.worker.scripted_fleet import ScriptedFleet

pytest.importorskip("flower", reason="the extra [flower] is not installed")


@pytest.fixture
def fleet(own_server: EmbeddedServer, tmp_path: Path) -> Iterator[ScriptedFleet]:
    fleet = ScriptedFleet(own_server.url, tmp_path)
    yield fleet
    fleet.close()


@pytest.fixture
def flower(own_server: EmbeddedServer, tmp_path: Path) -> Iterator[Flower]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with (tmp_path / "flower.log").open("wb") as output:
        flower = Flower(own_server.url, port, output)
        flower.start()
        yield flower
        flower.stop()


def page(flower: Flower, path: str) -> str | None:
    """A page of Flower, None while there is none."""
    request = urllib.request.Request(flower.url + path)
    request.add_header("Authorization", "Basic " + base64.b64encode(flower.login.encode()).decode())
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return html.unescape(answer.read().decode())
    except (urllib.error.URLError, ConnectionError, TimeoutError) as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()
        return None


def test_the_page_of_a_worker_shows_device_model_plan_and_engine(
    fleet: ScriptedFleet, flower: Flower, own_server: EmbeddedServer
) -> None:
    fleet.start("w1", isolation="child")
    with Client(own_server.url) as client:
        client.generate("hello there", model="tiny", max_tokens=7, timeout_s=40)

    path = f"/worker/w1@{socket.gethostname()}"
    shown = wait_until(lambda: found if "lamella engine" in (found := page(flower, path) or "") else None, every_s=0.3)

    rows = dict(re.findall(r"<td>(lamella[\w ]*)</td>\s*<td[^>]*>(.*?)</td>", shown, re.DOTALL))
    assert rows["lamella device"] == "cpu"
    assert rows["lamella model"] == "tiny: llama, 4 layers, 976.6 KiB as float32, context 4096 tokens"
    assert rows["lamella plan"] == "none"
    assert rows["lamella engine"].startswith("ready, restarted 0 times; 0 of 8 sequences run")
    assert "'engine_process': {" in rows["lamella"]
    assert "hello there" not in shown
