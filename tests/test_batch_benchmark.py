"""The benchmark of batch files: it sees lines that are wrong, and a killed run goes through."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.batch_file import judge, main, parse


def record(number: int, text: str = "a") -> str:
    choice = {"index": 0, "text": text, "finish_reason": "length"}
    return json.dumps({"custom_id": f"line-{number}", "response": {"status_code": 200, "body": {"choices": [choice]}}})


@pytest.mark.parametrize(
    ("numbers", "wrong"),
    [
        ([0, 1, 2, 3], {}),
        ([0, 1, 3], {"lines": 3, "lost": 1}),
        ([0, 1, 1, 2, 3], {"lines": 5, "twice": 1, "out_of_order": 1}),
        ([0, 2, 1, 3], {"out_of_order": 1}),
    ],
)
def test_lines_that_lack_come_twice_or_stand_elsewhere_are_counted(
    tmp_path: Path, numbers: list[int], wrong: dict[str, int]
) -> None:
    output = tmp_path / "out.jsonl"
    output.write_text("\n".join(record(number) for number in numbers) + "\n")

    verdict = judge(output, 4)

    assert verdict == {"lines": 4, "lost": 0, "twice": 0, "out_of_order": 0, "different": 0} | wrong


def test_a_text_that_differs_from_that_of_an_equal_request_is_counted(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    output.write_text(f"{record(0)}\n{record(1)}\n{record(350, 'b')}\n")  # the prompt and the length of line 0

    assert judge(output, 351)["different"] == 1


def test_no_lines_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--lines", "0"])

    assert "at least 1" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_killed_run_loses_no_line(tmp_path: Path) -> None:
    told = tmp_path / "result.json"

    code = main(["--lines", "120", "--kills", "1", "--slots", "8", "--json", str(told)])

    result = json.loads(told.read_text())
    assert code == 0
    assert result["runs"][0]["exit_code"] == -9
    assert result["jobs_asked"] == 120
