"""Packed forms of a model beside the model itself: seconds a sweep under the same budgets, in one run.

    python -m benchmarks.packed --store DIR --model NAME --device cuda --vram 4GiB --json FILE

The model has to be in the store; packed forms are built from it if they are not there. Every form decodes with the same
budgets, with weights that stay in RAM or come from disk: its ratio to full precision is what packing gains. What
expanding takes is measured on its own after each run, layer by layer, and told apart from what else a layer takes.
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.json_file import write_json
from benchmarks.machine import Bystanders, machine_facts
from lamella_engine import EngineOptions, ShardStore
from lamella_engine.bench import BenchReport, BenchRequest, run_bench
from lamella_engine.placement import Tier
from lamella_engine.shard import ShardedModel
from lamella_engine.stored_form import StoredForm

FULL = "full"


def main(argv: list[str] | None = None) -> int:
    """Measure every form with every budget and say it."""
    arguments = _parser().parse_args(argv)
    store = ShardStore(arguments.store)
    bystanders = Bystanders()
    results: dict[str, Any] = {
        "command": f"python -m benchmarks.packed {shlex.join(argv or sys.argv[1:])}",
        "machine": machine_facts(arguments.store, arguments.device),
        "packing_s": {},
        "forms": {},
    }
    for quant in (FULL, *arguments.quants):
        began_s = time.perf_counter()
        model = store.open(arguments.model) if quant == FULL else _packed(store, arguments.model, quant)
        results["packing_s"][quant] = time.perf_counter() - began_s
        rows: dict[str, Any] = {"layer_bytes": sum(layer.nbytes for layer in model.layers)}
        for budget in arguments.budgets:
            rows[budget] = _measure(model, budget, arguments)
            _say(quant, budget, rows[budget], results["forms"].get(FULL, {}).get(budget))
        results["forms"][quant] = rows
        results["others_busy_cores"] = bystanders.busy_cores()
        if arguments.json:  # as far as it has come: a run may be cut short
            write_json(arguments.json, results)
    return 0


def _packed(store: ShardStore, model: str, quant: str) -> ShardedModel:
    return store.ensure(model, form=StoredForm(quant=quant))


def _measure(model: ShardedModel, budget: str, arguments: argparse.Namespace) -> dict[str, Any]:
    vram, _, ram = budget.partition("+")
    options = EngineOptions(
        store=arguments.store, device=arguments.device, vram=vram or "auto", ram=ram or "auto", offline=True
    )
    report = run_bench(model, BenchRequest(arguments.sequences, arguments.sweeps, 16, options), lambda _: None)
    return {
        "layers_by_tier": {tier: sum(place.tier is tier for place in report.plan.layers) for tier in Tier},
        "keeps_packed": report.plan.keeps_packed,
        "memory": dataclasses.asdict(report.memory),
        "bandwidths": {name: getattr(report.bandwidths, name) for name in ("disk", "h2d", "device_memory")},
        "expansion": dataclasses.asdict(report.expansion),
        "sequences": _rows(report),
    }


def _rows(report: BenchReport) -> dict[str, Any]:
    return {
        str(row.num_sequences): {
            "s_per_sweep": row.s_per_sweep,
            "tokens_per_s": row.tokens_per_second,
            "limit_s": row.limit.seconds,
            "binding": row.limit.binding,
            "profile": dataclasses.asdict(row.profile),
            "expand_s_per_layer": row.expand_s_per_layer,
            "other_s_per_layer": row.other_s_per_layer,
        }
        for row in report.rows
    }


def _say(quant: str, budget: str, measured: dict[str, Any], full: dict[str, Any] | None) -> None:
    for count, row in measured["sequences"].items():
        ratio = f", {full['sequences'][count]['s_per_sweep'] / row['s_per_sweep']:.2f} times full" if full else ""
        print(
            f"{quant:>9} {budget:>12} {count:>3} sequences: {row['s_per_sweep']:.4f} s a sweep, limit "
            f"{row['limit_s']:.4f} ({row['binding']}){ratio}; a layer expands in "
            f"{1e3 * row['expand_s_per_layer']:.3f} ms, the rest takes {1e3 * row['other_s_per_layer']:.3f}; "
            f"layers {measured['layers_by_tier']}",
            flush=True,
        )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--store", type=Path, required=True, help="the shard store")
    add("--model", required=True, help="a model in it")
    add("--device", default="cpu", help="cpu or cuda (%(default)s)")
    add(
        "--quants",
        type=lambda text: text.split(";" if ";" in text else ","),
        default=["nf4", "int8", "lossless"],
        help="with commas between them, or semicolons where they have commas themselves (%(default)s)",
    )
    add(
        "--budgets",
        type=lambda text: text.split(","),
        default=["4GiB+auto"],
        help="VRAM+RAM, several with commas (%(default)s)",
    )
    add("--sequences", type=lambda text: tuple(map(int, text.split(","))), default=(1,), help="(%(default)s)")
    add("--sweeps", type=int, default=8, help="timed sweeps a figure (%(default)s)")
    add("--json", type=Path, help="results")
    return parser


if __name__ == "__main__":
    sys.exit(main())
