"""The engine on machines that are not here: is a plan as fast as predicted, and how much does spreading gain?

    python -m benchmarks.virtual
    python -m benchmarks.virtual --machines "GTX 1070 + SATA" --sequences 1 --json FILE

For every machine and budget the planner places a real 7B model; the engine then runs a model of the same proportions,
128 times smaller, on lanes that are as much slower. The lanes run at a pace at which a sweep takes --sweep-s seconds,
so that moving bytes takes longer than this CPU's arithmetic; the seconds shown are those of the real machine. Each plan
is run as the planner spreads it and with all resident layers first. It needs no GPU, and a few minutes.

Neighbours: `virtual_case` says what is run, `slow_machine` on what.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import shlex
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.checkpoint import build_checkpoint
from benchmarks.json_file import write_json
from benchmarks.lamella_run import WARM_UP_SWEEPS, Watch, follow
from benchmarks.machine import Bystanders, machine_facts
from benchmarks.slow_machine import MACHINES, OldMachine
from benchmarks.virtual_case import (
    BUDGETS,
    KV_TOKENS,
    MAX_SEQUENCES,
    REAL_NAME,
    SCALE,
    Budgets,
    engine_options,
    paced_machine,
    real_bandwidths,
    real_plan,
    real_shape,
    real_sizes,
    residents_first,
    scaled_plan,
    scaled_shape,
)
from lamella_engine import Engine, Sampling, SequenceRequest, ShardStore, architecture
from lamella_engine.estimate import Prediction, predict
from lamella_engine.model_sizes import sizes_of_sharded
from lamella_engine.open_model import open_sweep_model
from lamella_engine.placement import Plan, Tier
from lamella_engine.shard import ShardedModel

SWEEP_S = 0.5  # long enough that waking a thread does not count
DEADLINE_S = 300.0  # for one plan at one number of sequences
_PROMPT = (5, 9, 13)
_SPARE_SWEEPS = 16  # sequences may decode so many tokens before the last of them has read its prompt


class Spreads(NamedTuple):
    """The real plan as the planner spreads it, and with its resident layers first."""

    spread: Plan
    residents_first: Plan


@dataclass(frozen=True)
class Scene:
    """One machine with one set of budgets, and the pace its lanes are run at."""

    old: OldMachine
    budgets: Budgets
    plans: Spreads
    prediction: Prediction  # of the real machine, for one sequence
    pace: float


@dataclass(frozen=True)
class Measured:
    """What some sweeps took, in seconds of this machine.

    Attributes:
        s_per_sweep: median.
        seconds: of each sweep.
        compute_s: of a sweep, in which this CPU was in the layers' code.
        token_ids: of the first sequence.
    """

    s_per_sweep: float
    seconds: list[float]
    compute_s: float
    token_ids: list[int]


def set_scene(old: OldMachine, budgets: Budgets, layers: int = 32, sweep_s: float = SWEEP_S) -> Scene:
    """Plan the real model for the real machine, and find the pace at which a sweep takes `sweep_s` seconds."""
    sizes = real_sizes(real_shape(layers))
    plan = real_plan(old, budgets, sizes)
    prediction = predict(sizes, plan, real_bandwidths(old), 1)
    return Scene(old, budgets, Spreads(plan, residents_first(plan)), prediction, prediction.seconds / sweep_s)


def build_scaled_model(directory: Path, layers: int = 32) -> ShardedModel:
    """The shards of the scaled model, in `directory`."""
    checkpoint = build_checkpoint(scaled_shape(layers), directory / "checkpoint")
    return ShardStore(directory / "store").ensure("scaled", source=checkpoint)


def open_scene(sharded: ShardedModel, scene: Scene, plan: Plan, *, is_tracing: bool = False) -> Engine:
    """An engine that carries `plan`, one of the scene's, out with the scaled model."""
    options = engine_options(sharded.directory, is_tracing=is_tracing)
    built = architecture.build(architecture.load_config(sharded.directory), torch.float32)
    scaled = scaled_plan(plan, sizes_of_sharded(sharded, built))
    machine = paced_machine(scene.old, scene.pace)
    return Engine(open_sweep_model(sharded, options, torch.device("cpu"), machine, scaled), None, options)


def predict_scaled(sharded: ShardedModel, scene: Scene, count: int) -> Prediction:
    """What a sweep of the scaled model with `count` sequences takes at best on the scene's paced lanes."""
    built = architecture.build(architecture.load_config(sharded.directory), torch.float32)
    sizes = sizes_of_sharded(sharded, built)
    bandwidths = paced_machine(scene.old, scene.pace).bandwidths
    return predict(sizes, scaled_plan(scene.plans.spread, sizes), bandwidths, count)


def measure(engine: Engine, count: int, sweeps: int) -> Measured:
    """Decode with `count` sequences side by side; the first sweeps do not count.

    Raises:
        TimeoutError: `DEADLINE_S` passed first.
    """
    names = [f"{time.monotonic_ns()}-{index}" for index in range(count)]
    sampling = Sampling(max_tokens=WARM_UP_SWEEPS + sweeps + _SPARE_SWEEPS, ignore_eos=True)
    for name in names:
        engine.submit(SequenceRequest(name, sampling, prompt_ids=_PROMPT))
    watch, marks, deadline = Watch(), [], time.monotonic() + DEADLINE_S
    for full_sweeps in follow(engine, watch, names, deadline):
        if full_sweeps in (WARM_UP_SWEEPS, WARM_UP_SWEEPS + sweeps):
            marks.append(engine.counters())
        if len(marks) == 2:
            break
    for name in names:
        engine.cancel(name)
    for _ in follow(engine, watch, names, deadline):
        pass
    if len(marks) < 2:
        raise TimeoutError(f"only {len(watch.stamps)} of {WARM_UP_SWEEPS + sweeps} sweeps in {DEADLINE_S:.0f} s")
    stamps = watch.stamps[WARM_UP_SWEEPS - 1 : WARM_UP_SWEEPS + sweeps]
    seconds = [after - before for before, after in itertools.pairwise(stamps)]
    before, after = marks
    return Measured(
        s_per_sweep=statistics.median(seconds),
        seconds=[round(second, 5) for second in seconds],
        compute_s=(after.compute_s - before.compute_s) / sweeps,
        token_ids=watch.token_ids[names[0]],
    )


def run_scene(sharded: ShardedModel, scene: Scene, counts: list[int], sweeps: int) -> dict[str, Any]:
    """Both plans of a scene at every number of sequences, in seconds of the real machine.

    The busy shares are the bytes that a sweep moves over what the lane could have moved in its time.
    """
    found, bystanders = {}, Bystanders()
    for name, plan in scene.plans._asdict().items():
        with open_scene(sharded, scene, plan) as engine:
            found[name] = {count: measure(engine, count, sweeps) for count in counts}
    plan = scene.plans.spread
    return {
        "machine": scene.old.name,
        "budgets": dataclasses.asdict(scene.budgets) | {"vram": min(scene.budgets.vram, scene.old.vram)},
        "order": {
            name: "".join(str(place.tier)[0] for place in each.layers) for name, each in scene.plans._asdict().items()
        },
        "bytes": {str(tier): plan.layer_bytes(tier) for tier in Tier},
        "ring_bytes": plan.ring_bytes,
        "device_slots": plan.device_slots,
        "binding": scene.prediction.binding,
        "pace": round(scene.pace, 3),
        "others_busy_cores": bystanders.busy_cores(),
        "sequences": {str(count): _figures(sharded, scene, count, found) for count in counts},
    }


def _figures(sharded: ShardedModel, scene: Scene, count: int, found: dict[str, dict[int, Measured]]) -> dict[str, Any]:
    spread, first = (found[name][count] for name in Spreads._fields)
    predicted = predict_scaled(sharded, scene, count)
    return {
        "predicted_s_per_sweep": predicted.seconds * scene.pace,
        "measured_s_per_sweep": spread.s_per_sweep * scene.pace,
        "tokens_per_s": count / (spread.s_per_sweep * scene.pace),
        "efficiency": predicted.seconds / spread.s_per_sweep,
        "residents_first_s_per_sweep": first.s_per_sweep * scene.pace,
        "gain_of_spreading": first.s_per_sweep / spread.s_per_sweep,
        "disk_busy": predicted.lanes.disk / spread.s_per_sweep,
        "bus_busy": predicted.lanes.bus / spread.s_per_sweep,
        "computing_here": spread.compute_s / spread.s_per_sweep,
        "token_ids": spread.token_ids,
        "seconds_here": {name: found[name][count].seconds for name in Spreads._fields},
    }


def have_equal_tokens(scenes: list[dict[str, Any]]) -> bool:
    """Whether every scene chose the same tokens for the first prompt, over as many as all have."""
    texts = [figures["token_ids"] for scene in scenes for figures in scene["sequences"].values()]
    shared = min(map(len, texts))
    return len({tuple(text[:shared]) for text in texts}) == 1


def table(results: dict[str, Any]) -> str:
    """The figures for a terminal."""
    lines = [
        f"{'machine':<22}{'budgets':<15}{'N':>3}{'predicted':>11}{'measured':>10}{'of limit':>10}{'tok/s':>8}"
        f"{'disk':>6}{'bus':>6}{'residents first':>17}{'gain':>7}"
    ]
    for scene in results["scenes"]:
        for count, figures in scene["sequences"].items():
            lines.append(
                f"{scene['machine']:<22}{scene['budgets']['name']:<15}{count:>3}"
                f"{figures['predicted_s_per_sweep']:>9.2f} s{figures['measured_s_per_sweep']:>8.2f} s"
                f"{figures['efficiency']:>10.1%}{figures['tokens_per_s']:>8.2f}{figures['disk_busy']:>6.0%}"
                f"{figures['bus_busy']:>6.0%}{figures['residents_first_s_per_sweep']:>15.2f} s"
                f"{figures['gain_of_spreading']:>6.2f}x"
            )
    return "\n".join([*lines, f"same tokens everywhere: {'yes' if results['tokens_equal'] else 'no'}"])


def main(argv: list[str] | None = None) -> int:
    """Run every scene; 0, 1 if tokens differ, 2 on unusable options."""
    arguments = _parser().parse_args(argv)
    try:
        machines = _machines(arguments.machines)
        counts = _counts(arguments.sequences)
        if arguments.json and not arguments.json.parent.is_dir():
            raise ValueError(f"--json: there is no directory {arguments.json.parent}; make it first")
        _check_rooms(arguments)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    results: dict[str, Any] = {
        "command": f"python -m benchmarks.virtual {shlex.join(argv if argv is not None else sys.argv[1:])}".rstrip(),
        "model": REAL_NAME if arguments.layers == 32 else f"{arguments.layers} layers of {REAL_NAME}",
        "scale": SCALE,
        "sweep_s": arguments.sweep_s,
        "scenes": [],
    }
    with tempfile.TemporaryDirectory(prefix="lamella-virtual-") as scratch:
        results["here"] = machine_facts(Path(scratch), "cpu")
        sharded = build_scaled_model(Path(scratch), arguments.layers)
        for old, budgets in itertools.product(machines, BUDGETS):
            print(f"{old.name}, {budgets.name} ...", file=sys.stderr, flush=True)
            scene = set_scene(old, budgets, arguments.layers, arguments.sweep_s)
            results["scenes"].append(run_scene(sharded, scene, counts, arguments.sweeps))
            results["tokens_equal"] = have_equal_tokens(results["scenes"])
            if arguments.json:
                write_json(arguments.json, results)
    print(table(results))
    return 0 if results["tokens_equal"] else 1


def _machines(names: list[str]) -> list[OldMachine]:
    known = {old.name: old for old in MACHINES}
    for name in names:
        if name not in known:
            raise ValueError(f"--machines: {name!r} is none of {json.dumps(list(known))}")
    return [known[name] for name in dict.fromkeys(names)]


def _counts(text: str) -> list[int]:
    try:
        counts = sorted({int(part) for part in text.split(",")})
    except ValueError as error:
        raise ValueError(f"--sequences: {text!r} is no list of numbers such as 1,8") from error
    if not 1 <= counts[0] <= counts[-1] <= MAX_SEQUENCES:
        raise ValueError(f"--sequences: {text} is not between 1 and {MAX_SEQUENCES}")
    return counts


def _check_rooms(arguments: argparse.Namespace) -> None:
    """Refuse what the scaled model has no room for."""
    most = KV_TOKENS // MAX_SEQUENCES - len(_PROMPT) - WARM_UP_SWEEPS - _SPARE_SWEEPS
    for name, low, high in (("sweeps", 2, most), ("layers", 8, 128), ("sweep_s", 0.05, 60.0)):
        value = getattr(arguments, name)
        if not low <= value <= high:
            raise ValueError(f"--{name.replace('_', '-')}: {value} is not between {low} and {high}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--machines", nargs="+", default=[old.name for old in MACHINES], metavar="NAME", help="names; all if left out")
    add("--sequences", default="1,8", help="how many decode at once (%(default)s)")
    add("--sweeps", type=int, default=10, help="timed sweeps a figure (%(default)s)")
    add("--sweep-s", type=float, default=SWEEP_S, help="seconds a sweep is to take here (%(default)s)")
    add("--layers", type=int, default=32, help="of the model (%(default)s)")
    add("--json", type=Path, metavar="FILE", help="results, written after every machine and budget")
    return parser


if __name__ == "__main__":
    sys.exit(main())
