"""The command as it is installed: a process that serves, and ends when it is told to."""

from __future__ import annotations

import signal
import subprocess
import sys
import urllib.request

from lamella.embedded import EmbeddedServer


def serve(server: EmbeddedServer, *options: str) -> subprocess.Popen[str]:
    code = "from lamella_gateway.cli import app; app()"
    command = [sys.executable, "-c", code, "--redis-url", server.url, *options]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def test_it_serves_until_it_is_told_to_stop(embedded_server: EmbeddedServer) -> None:
    with serve(embedded_server, "--no-auth", "--port", "0") as process:
        assert process.stderr is not None
        line = process.stderr.readline()
        with urllib.request.urlopen(f"{line.split()[-1].removesuffix('/v1')}/health/live", timeout=40) as answer:
            status = answer.status
        process.send_signal(signal.SIGTERM)
        code = process.wait(40)

    assert line.startswith("serving http://127.0.0.1:")
    assert (status, code) == (200, 0)


def test_a_setting_that_cannot_be_ends_it_with_the_reason(embedded_server: EmbeddedServer) -> None:
    with serve(embedded_server, "--no-auth", "--host", "0.0.0.0") as process:
        _, said = process.communicate(timeout=40)

    assert process.returncode == 2
    assert said.startswith("error: --no-auth with --host 0.0.0.0")
