"""The simulated fleet at a size for tests: every job accounted for, shares kept, lost workers' jobs seen through."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.fleet_sim import main, parse
from tests.fixtures.servers import require_embedded


def test_a_small_fleet_loses_nothing_and_doubles_nothing(tmp_path: Path) -> None:
    require_embedded()
    out = tmp_path / "fleet.json"
    command = [
        "--jobs",
        "1600",
        "--workers",
        "20",
        "--users",
        "8",
        "--slots",
        "2",
        "--run",
        "400",
        "--lease-ms",
        "1000",
    ]

    status = main([*command, "--drain", "--no-appendonly", "--out", str(out)])

    figures = json.loads(out.read_text())
    assert status == 0
    assert figures["account"]["ended_once"] == 1600
    assert figures["account"]["lost"] == figures["account"]["ended_twice"] == figures["account"]["in_flight"] == 0
    assert figures["recovery"]["resumed"] == figures["recovery"]["jobs_they_held"] > 0
    assert figures["recovery"]["late_ends_refused"] == figures["recovery"]["jobs_they_held"]
    assert figures["fairness"]["worst_error_jobs"] <= 2
    assert [step["waiting"] for step in figures["steps"]] == [200, 400, 800, 1600]


@pytest.mark.parametrize("wrong", [["--jobs", "3"], ["--workers", "1"], ["--jobs", "100", "--users", "101"]])
def test_sizes_that_cannot_work_are_refused(wrong: list[str]) -> None:
    with pytest.raises(SystemExit):
        parse(wrong)
