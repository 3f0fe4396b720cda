"""The package alone: what importing it costs, and what it exports."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lamella

HEAVY = ("torch", "transformers", "celery", "kombu", "numpy", "typer", "rich")
UNTIL_ASKED = ("pydantic", "redis", "asyncio")


def run(program: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True, timeout=60
    ).stdout.strip()


def test_a_client_loads_nothing_heavy() -> None:
    heavy = run(f"import sys; from lamella import Client; print([name for name in {HEAVY} if name in sys.modules])")

    assert heavy == "[]"


def test_importing_loads_next_to_nothing_until_a_name_is_asked_for() -> None:
    loaded = run(f"import sys, lamella; print([name for name in {UNTIL_ASKED + HEAVY} if name in sys.modules])")

    assert loaded == "[]"


def test_the_command_line_loads_neither_torch_nor_celery() -> None:
    heavy = run("import sys, lamella.cli; print([name for name in ('torch', 'celery') if name in sys.modules])")

    assert heavy == "[]"


def test_every_export_exists() -> None:
    assert all(hasattr(lamella, name) for name in lamella.__all__)
    assert set(lamella.__all__) <= set(dir(lamella))


def test_type_checkers_see_each_name_where_it_is_loaded_from() -> None:
    tree = ast.parse(Path(lamella.__file__).read_text())

    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 0]
    seen = {alias.name: node.module for node in imports for alias in node.names if alias.name in lamella.__all__}

    assert seen == lamella._HOMES
    assert sorted(seen) == lamella.__all__


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Clients'"):
        lamella.Clients  # type: ignore[attr-defined]  # noqa: B018  # the point of the test
