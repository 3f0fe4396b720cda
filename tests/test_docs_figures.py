"""Figures of docs/comparison.md and docs/fleet.md are those of the result files that they name."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = ("comparison.md", "fleet.md", "howto/big-model.md", "howto/quantise.md")


def _text(page: str) -> str:
    return (ROOT / "docs" / page).read_text()


def _result(name: str) -> Any:
    return json.loads((RESULTS / name).read_text())


def _rows(text: str, heading: str) -> dict[str, list[str]]:
    """The rows of the first table after a heading or sentence, by their first cell."""
    lines = text[text.index(heading) :].splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("|"))
    rows = {}
    for line in lines[first:]:
        if not line.startswith("|"):
            break
        name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        rows[name] = cells
    return rows


def _agrees(shown: str, measured: float) -> bool:
    """Whether a figure is the measured one, rounded to as many digits as it shows."""
    decimals = len(shown.partition(".")[2])
    return float(shown) == pytest.approx(measured, abs=0.5 * 10**-decimals * 1.001)


@pytest.mark.parametrize("page", PAGES)
def test_result_files_that_a_page_names_are_there(page: str) -> None:
    names = set(re.findall(r"`(?:benchmarks/results/)?(2026-[\w.-]+)`", _text(page)))

    assert names
    assert all((RESULTS / name).is_file() for name in names), names


@pytest.mark.parametrize(
    ("heading", "file"),
    [
        ("## One sequence", "2026-11-23-sweep-h100-all-peers.json"),
        ("SmolLM2-135M in float32 on two cores", "2026-11-23-sweep-cpu-smollm2.json"),
    ],
)
def test_seconds_a_token_beside_others_are_the_measured_ones(heading: str, file: str) -> None:
    result = _result(file)
    rows = _rows(_text("comparison.md"), heading)

    def peer(name: str, cache: str) -> Callable[[], float]:
        return lambda: float(result["peers"][name]["sequences"]["1"][cache]["s_per_token"])

    def ours(tier: str) -> Callable[[], float]:
        return lambda: float(result["lamella"][tier]["sequences"]["1"]["s_per_sweep"])

    ram = "accelerate-ram" if "accelerate-ram" in result["peers"] else "accelerate-disk"
    sources = {
        "Lamella": (ours("ram"), ours("disk")),
        "AirLLM 4.0.0, as shipped": (peer("airllm", "kept"), peer("airllm", "dropped")),
        "AirLLM 4.0.0, its clean-up": (peer("airllm-no-cleanup", "kept"), peer("airllm-no-cleanup", "dropped")),
        "accelerate": (peer(ram, "kept"), peer("accelerate-disk", "dropped")),
        "transformers": (peer("transformers", "kept"),),
    }
    compared = 0
    for name, cells in rows.items():
        for start, measured in sources.items():
            if name.startswith(start):
                shown = [cell for cell in cells if cell]
                assert len(shown) == len(measured), name
                assert all(_agrees(cell, each()) for cell, each in zip(shown, measured, strict=True)), name
                compared += 1

    assert compared == len(rows) - 2, "all but the head of the table and the line under it"


def test_steps_with_everything_on_the_card_are_the_measured_ones() -> None:
    result = _result("2026-11-23-sweep-h100-all-peers.json")
    text = _text("comparison.md")
    said = re.findall(r"[\d.]*\d", text[text.index("a step of 1, 8 and 64 sequences takes") :].partition("(")[0])[3:]
    numbers = ("1", "8", "64")
    ours = [result["lamella"]["resident"]["sequences"][number]["s_per_sweep"] for number in numbers]
    theirs = [result["peers"]["transformers"]["sequences"][number]["kept"]["s_per_token"] for number in numbers]

    assert len(said) == 6
    assert all(_agrees(shown, measured) for shown, measured in zip(said, ours + theirs, strict=True))


def test_ratios_of_four_bits_are_the_measured_ones() -> None:
    forms = _result("2026-11-23-packed-h100-all-forms.json")["forms"]
    said = re.search(r"takes ([\d.]+) times as long.*?card, ([\d.]+) times", _text("comparison.md"), re.DOTALL)
    assert said is not None

    for shown, budget in zip(said.groups(), ("1800MiB+auto", "4GiB+auto"), strict=True):
        full, packed = (forms[form][budget]["sequences"]["1"]["s_per_sweep"] for form in ("full", "nf4"))
        assert _agrees(shown, full / packed)


def test_emulated_machines_of_the_fleet_are_the_measured_ones() -> None:
    scenes = _result("2026-11-23-virtual.json")["scenes"]
    shown = [row for row in re.findall(r"^\| (G.+|R.+) \|$", _text("fleet.md"), re.MULTILINE) if "card" in row]

    for row in shown:
        machine, budgets, seconds, of_one, of_eight, limit = (cell.strip() for cell in row.split("|"))
        card, memory = (int(number) for number in re.findall(r"(\d+) GiB", budgets.replace("no memory", "0 GiB")))
        (scene,) = (
            each
            for each in scenes
            if each["machine"].split()[1] == machine.split()[1].strip(",")
            and (each["budgets"]["vram"], each["budgets"]["ram"]) == (card << 30, memory << 30)
        )
        one, eight = scene["sequences"]["1"], scene["sequences"]["8"]
        assert scene["binding"] == limit
        assert _agrees(seconds, one["measured_s_per_sweep"]), row
        assert _agrees(of_one, one["tokens_per_s"]), row
        assert _agrees(of_eight, eight["tokens_per_s"]), row

    assert len(shown) == 7
