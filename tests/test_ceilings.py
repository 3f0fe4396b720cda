"""The checks of tools/ceilings.py: each breach is found where it is, and words in texts are not breaches."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.ceilings import MAX_FILE_LINES, MAX_FUNCTION_LINES, check, check_file, main

BREACHES = {
    "future.result()": "waits without a deadline",
    "queue.get()": "waits without a deadline",
    "thread.join()": "waits without a deadline",
    "lock.acquire()": "waits without a deadline",
    "def f(x: dict[str, Any]) -> None: ...": "dict[str, Any]",
    "raise NotImplementedError": "NotImplementedError",
    "raise NotImplementedError('later')": "NotImplementedError",
    "x = 1  # type: ignore": "names its code",
    "x = 1  # noqa": "names its code",
    "x = 1  # TODO make it 2": "TODO",
    "x = 1  # FIXME": "FIXME",
}
FINE = [
    "future.result(timeout=1)",
    "queue.get(timeout=1)",
    "table.get('key')",
    "', '.join(words)",
    "text = 'thread.join()  # TODO'",
    '"""Explains queue.get() and dict[str, Any]."""',
    "x: dict[str, int] = {}",
    "x = 1  # type: ignore[assignment]  # reason",
    "x = 1  # noqa: S101 - reason",
]
IN_TESTS = {
    "time.sleep(1)": "sleep in a test",
    "await_(asyncio.sleep(1))": "sleep in a test",
    "from unittest.mock import patch": "mocks in a test",
    "from unittest import mock\nmock.patch('x')": "mock.patch",
}


def _file(directory: Path, text: str, name: str = "module.py") -> Path:
    path = directory / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")
    return path


@pytest.mark.parametrize("line", BREACHES)
def test_breach_is_found_with_its_line(tmp_path: Path, line: str) -> None:
    path = _file(tmp_path, f"import this\n\n{line}")

    findings = check_file(path, is_product=True)

    assert [(finding.path, finding.line) for finding in findings] == [(path, 3)]
    assert BREACHES[line] in findings[0].rule
    assert str(findings[0]).startswith(f"{path}:3: ")


@pytest.mark.parametrize("line", FINE)
def test_fine_code_passes(tmp_path: Path, line: str) -> None:
    assert check_file(_file(tmp_path, line), is_product=True) == []


@pytest.mark.parametrize("text", IN_TESTS)
def test_sleep_and_mocks_are_found_in_tests_only(tmp_path: Path, text: str) -> None:
    path = _file(tmp_path, text)

    in_a_test = check_file(path, is_product=False, is_test=True)
    elsewhere = check_file(path, is_product=False)

    assert [finding.rule for finding in in_a_test if IN_TESTS[text] in finding.rule]
    assert elsewhere == []


def test_long_file_is_found(tmp_path: Path) -> None:
    allowed = _file(tmp_path, "\n".join(["x = 1"] * MAX_FILE_LINES), "allowed.py")
    too_long = _file(tmp_path, "\n".join(["x = 1"] * (MAX_FILE_LINES + 1)), "too_long.py")

    assert check_file(allowed, is_product=False) == []
    assert f"has {MAX_FILE_LINES + 1} lines" in check_file(too_long, is_product=False)[0].rule


def test_long_function_is_found_in_product_code(tmp_path: Path) -> None:
    body = ["    x = 1"] * MAX_FUNCTION_LINES
    allowed = _file(tmp_path, "\n".join(["def f():", *body[1:]]), "allowed.py")
    too_long = _file(tmp_path, "\n".join(["async def f():", *body]), "too_long.py")

    assert check_file(allowed, is_product=True) == []
    assert "f has 61 lines" in check_file(too_long, is_product=True)[0].rule
    assert check_file(too_long, is_product=False) == []


def test_sweep_file_neither_logs_nor_waits_for_the_device(tmp_path: Path) -> None:
    text = "import logging\nx = logits.item()\ntorch.cuda.synchronize(timeout)"
    sweep = _file(tmp_path, text, "sweep.py")
    other = _file(tmp_path, text, "other.py")

    assert [finding.line for finding in check_file(sweep, is_product=True)] == [1, 2, 3]
    assert check_file(other, is_product=True) == []


def test_place_in_the_tree_decides_the_rules(tmp_path: Path) -> None:
    product = _file(tmp_path, "queue.get()", "engine/a.py")
    test = _file(tmp_path, "queue.get()\ntime.sleep(1)", "tests/b.py")
    tool = _file(tmp_path, "queue.get()\ntime.sleep(1)", "tools/c.py")

    findings = check([tmp_path / "engine", tmp_path / "tests", tmp_path / "tools"], root=tmp_path)

    assert [(finding.path, finding.line) for finding in findings] == [(product, 1), (test, 2)]
    assert tool not in {finding.path for finding in findings}


def test_command_prints_findings_and_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = _file(tmp_path, "x = 1  # TODO")

    code = main([str(path)])

    assert code == 1
    assert capsys.readouterr().out == f"{path}:1: TODO left in the code\n"


def test_command_names_a_missing_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "none.py")]) == 2
    assert "there is no" in capsys.readouterr().err
