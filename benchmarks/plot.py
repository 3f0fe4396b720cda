"""The picture of a run, from its JSON alone: tokens a second against sequences, and efficiency of each tier.

    python -m benchmarks.plot FILE.json OUT.svg

Owns the drawing; needs matplotlib (the extra `bench`), which is loaded only here. Neighbour: `sweep`, whose JSON it is.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.json_file import read_json


class PlotError(Exception):
    """The picture cannot be drawn; the message says why and what to do."""


class Line(NamedTuple):
    """One line of the picture: a name, numbers of sequences and a figure for each."""

    name: str
    sequences: list[int]
    values: list[float]
    is_lamella: bool


def rates(results: dict[str, Any]) -> list[Line]:
    """Tokens a second of everyone, over the numbers of sequences measured."""
    lines = []
    for tier, report in results.get("lamella", {}).items():
        batches = report.get("sequences", {})
        if batches:
            values = [batch["tokens_per_s"] for batch in batches.values()]
            lines.append(Line(f"Lamella, {tier}", [int(count) for count in batches], values, True))
    for peer, report in results.get("peers", {}).items():
        for key in ("kept", "dropped"):
            found = {int(count): run[key] for count, run in report.get("sequences", {}).items() if key in run}
            if found:
                label = next(iter(found.values()))["label"]
                name = peer if key == "kept" else f"{peer}, cache dropped ({label})"
                lines.append(Line(name, list(found), [figure["tokens_per_s"] for figure in found.values()], False))
    return lines


def efficiencies(results: dict[str, Any]) -> list[Line]:
    """Limit over measured time of each of Lamella's tiers."""
    lines = []
    for tier, figures in results.get("derived", {}).get("lamella", {}).items():
        found = {int(count): figure["efficiency"] for count, figure in figures.items() if count.isdigit()}
        if found:
            lines.append(Line(f"Lamella, {tier}", list(found), list(found.values()), True))
    return lines


def plot(results: dict[str, Any], path: Path) -> None:
    """Draw `results` into the SVG `path`.

    Raises:
        PlotError: matplotlib is missing, nothing was measured, or the file cannot be written.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PlotError(f"drawing needs matplotlib ({error}); install it with: pip install 'lamella[bench]'") from error
    lines, shares = rates(results), efficiencies(results)
    if not lines:
        raise PlotError("the results hold no figure to draw: every measurement failed or was skipped")
    matplotlib.rcParams["svg.hashsalt"] = "lamella"  # the same results give the same file
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    for line in lines:
        style = {"linewidth": 2.2, "marker": "o"} if line.is_lamella else {"linewidth": 1, "marker": "x"}
        left.plot(line.sequences, line.values, label=line.name, **style)
    left.set(xscale="log", yscale="log", xlabel="sequences side by side", ylabel="tokens/s in all")
    for line in shares:
        right.plot(line.sequences, [100 * value for value in line.values], label=line.name, linewidth=2.2, marker="o")
    right.set(xscale="log", xlabel="sequences side by side", ylabel="% of the limit measured in the same run")
    right.set_ylim(0, max([105.0, *(100 * value for line in shares for value in line.values)]))
    right.axhline(100, color="grey", linewidth=0.8, linestyle="--")
    counts = sorted({count for line in (*lines, *shares) for count in line.sequences})
    for axes in (left, right):
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    figure.suptitle(_title(results), fontsize=10)
    try:
        figure.savefig(path, format="svg", metadata={"Date": None})
    except OSError as error:
        raise PlotError(f"cannot write {path}: {error.strerror}; name another file") from error


def _title(results: dict[str, Any]) -> str:
    machine, model = results.get("machine", {}), results.get("model", {})
    cap = results.get("options", {}).get("cap_gib")
    where = machine.get("gpu") or machine.get("cpu") or "unknown machine"
    what = f"{model.get('bytes', 0) / 1e9:.2f} GB {model.get('dtype', '')}"
    limit = f", GPU memory limited to {cap:g} GiB" if cap else ""
    return f"{what}, {where}{limit}, {machine.get('date', '')[:10]}"


def main() -> int:
    """Draw one file; 1 if it cannot be drawn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, metavar="FILE.json")
    parser.add_argument("picture", type=Path, metavar="OUT.svg")
    arguments = parser.parse_args()
    try:
        plot(read_json(arguments.results), arguments.picture)
    except (PlotError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
