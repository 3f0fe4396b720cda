"""The package alone: what importing it costs, and what it exports."""

from __future__ import annotations

import subprocess
import sys

import lamella

HEAVY = ("torch", "transformers", "celery", "kombu", "numpy", "typer", "rich")


def run(program: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True, timeout=60
    ).stdout.strip()


def test_importing_loads_nothing_heavy() -> None:
    heavy = run(f"import sys, lamella; print([name for name in {HEAVY} if name in sys.modules])")

    assert heavy == "[]"


def test_the_command_line_loads_neither_torch_nor_celery() -> None:
    heavy = run("import sys, lamella.cli; print([name for name in ('torch', 'celery') if name in sys.modules])")

    assert heavy == "[]"


def test_every_export_exists() -> None:
    assert all(hasattr(lamella, name) for name in lamella.__all__)
