"""What the latency benchmark counts, and one small run of it from end to end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.delivery import quantiles_ms
from benchmarks.latency import main, parse
from benchmarks.latency_sides import PaceMeter
from tests.fixtures.servers import require_embedded


def test_a_pace_is_counted_while_all_streams_run() -> None:
    meter = PaceMeter(2)

    meter.note("a", 5, at=1.0)
    meter.note("b", 5, at=2.0)
    meter.note("a", 3, at=3.0)
    meter.note("b", 3, at=4.0)
    meter.ended()
    meter.note("a", 100, at=50.0)

    pace = meter.pace(cpu_s=1.5)
    assert (pace.tokens, pace.seconds, pace.tokens_per_s, pace.cpu_s) == (6, 2.0, 3.0, 1.5)


def test_streams_that_never_ran_side_by_side_have_no_pace() -> None:
    meter = PaceMeter(2)
    meter.note("a", 5, at=1.0)
    meter.ended()

    with pytest.raises(RuntimeError, match="more tokens"):
        meter.pace(cpu_s=0.0)


def test_percentiles_are_told_in_milliseconds() -> None:
    assert quantiles_ms([number / 1000 for number in range(1, 101)]) == {
        "min": 1.0, "p50": 51.0, "p90": 91.0, "p99": 100.0, "max": 100.0
    }  # fmt: skip


def test_a_model_needs_its_store() -> None:
    with pytest.raises(SystemExit):
        parse(["--model", "tiny"])


@pytest.mark.timeout(180)
def test_a_run_tells_what_the_service_adds(tmp_path: Path) -> None:
    """It starts two engine processes and two workers, so it takes longer than other tests."""
    require_embedded()
    out = tmp_path / "latency.json"

    status = main(
        ["--requests", "2", "--streams", "2", "--tokens", "40", "--rounds", "1", "--ram", "0", "--json", str(out)]
    )

    told = json.loads(out.read_text())
    assert status == 0
    assert told["first_event_ms"]["submit_to_first_event"]["p50"] > told["first_event_ms"]["submit"]["p50"] > 0
    assert told["pace"]["alone_tokens_per_s"][0] > 0
    assert told["pace"]["preemptions_alone"] == 0
    assert told["pace"]["served_tokens_per_s"][0] > 0
    assert [each["streams"] for each in told["delivery_ms"]] == [1, 2]
    assert all(each["tokens"] > 0 and each["p50"] > 0 for each in told["delivery_ms"])
    assert told["command"].startswith("python -m benchmarks.latency --requests 2")
