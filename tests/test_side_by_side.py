"""The tables of `tests.side_by_side` fit the tests that there are."""

from __future__ import annotations

import re
from pathlib import Path

from tests.side_by_side import LONG, SHARING, unit_of

TESTS = Path(__file__).resolve().parent
FIXTURES = {"end_to_end": r"\b(fleet: Fleet|solo: str|caller: str|pair: list)\b", "security": r"\bguarded_worker: "}


def test_files_that_are_named_exist() -> None:
    for file in (*LONG, *SHARING):
        assert (TESTS / file).is_file(), file


def test_files_that_use_a_lasting_worker_run_together() -> None:
    for directory, fixture in FIXTURES.items():
        using = [path for path in (TESTS / directory).glob("test_*.py") if re.search(fixture, path.read_text())]

        assert len({unit_of(f"tests/{path.relative_to(TESTS)}::test_x") for path in using}) == 1, directory


def test_a_file_of_its_own_is_a_unit_of_its_own() -> None:
    assert unit_of("tests/engine/test_names.py::test_a[x::y]") == "tests/engine/test_names.py"
