"""Lamella, AirLLM, accelerate and transformers on one checkpoint in one run, each beside the machine's own limit.

    python -m benchmarks.sweep --device cuda --peers airllm,accelerate --json FILE --plot FILE.svg
    python -m benchmarks.sweep --device cpu --layers 4 --hidden 256 --ffn 512 --heads 8 --kv-heads 4 --json FILE
    python -m benchmarks.sweep --device cpu --model .models/SmolLM2-135M-Instruct.Q4_1.gguf --json FILE

Without --model a random Llama is written (7.5 GB with the defaults). Every measurement runs in a process of its own
under the same cap; the JSON is written after each, so a run that is cut off still tells what it found. Plain
transformers always runs, without the cap: it says which tokens are right. Progress goes to stderr.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.checkpoint import (
    add_shape_arguments,
    build_checkpoint,
    export_gguf,
    shape_from,
    tensor_bytes,
    weight_files,
)
from benchmarks.coldness import drop_file_cache
from benchmarks.json_file import write_json
from benchmarks.machine import machine_facts
from benchmarks.report import derive, differences, table
from benchmarks.stage import run_stage

TIERS = ("ram", "disk", "resident")
PEERS = {
    "airllm": ("airllm-no-cleanup", "airllm"),
    "airllm-4bit": ("airllm-4bit-no-cleanup", "airllm-4bit"),  # needs bitsandbytes; its tokens are its own
    "accelerate": ("accelerate-ram", "accelerate-disk"),
    "transformers": ("transformers",),
}
PROMPT_TOKENS = 32
REFERENCE_TOKENS = 24  # of plain transformers: at least as many as anyone else is compared on
DEFAULT_CAP_GIB = 4.0
GIB = 2**30
MIN_STAGE_S = 5.0  # with less left, a stage is skipped
_MODEL_NAME = "benchmark"


class Run:
    """One run: its options, its results so far, and the time it has left. Used by one thread."""

    def __init__(self, arguments: argparse.Namespace, work_dir: Path) -> None:
        self.arguments = arguments
        self.work_dir = work_dir
        self.results: dict[str, Any] = {"skipped": [], "lamella": {}, "peers": {}}
        self._deadline = time.monotonic() + arguments.budget_s
        self._began = time.monotonic()

    def stage(self, name: str, kind: str, spec: dict[str, Any]) -> dict[str, Any] | None:
        """Run one stage if there is time for it; None, and a line in ``skipped``, if there is not."""
        left = self._deadline - time.monotonic()
        if left < MIN_STAGE_S:
            self.skip(name, f"the run's {self.arguments.budget_s:g} s (--budget-s) were used up")
            return None
        deadline_s = min(left, self.arguments.stage_s)
        self.say(f"{name} ...")
        if "deadline_s" in spec:
            spec = spec | {"deadline_s": 0.85 * deadline_s}
        report = run_stage(name.replace(" ", "-"), kind, spec, self.work_dir / "stages", deadline_s)
        self.say(f"{name}: {report.get('error', 'done')} after {report['wall_s']} s")
        return report

    def skip(self, name: str, why: str) -> None:
        """Remember that a stage was not run, and why."""
        self.results["skipped"].append({"stage": name, "why": why})
        self.say(f"{name}: skipped, {why}")

    def save(self) -> None:
        """Derive what follows, and write everything."""
        self.results["derived"] = derive(self.results)
        self.results["wall_s"] = round(time.monotonic() - self._began, 1)
        if self.arguments.json:
            write_json(self.arguments.json, self.results)

    def say(self, text: str) -> None:
        """One line of progress with the seconds since the start."""
        print(f"[{time.monotonic() - self._began:7.1f} s] {text}", file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
    """Run everything; 0 if all stages ran to their end, 1 if one failed or was skipped, 2 on unusable options."""
    arguments = _parser().parse_args(argv)
    try:
        _check(arguments)
        with tempfile.TemporaryDirectory(prefix="lamella-bench-") as scratch:
            run = Run(arguments, arguments.work_dir or Path(scratch))
            run.work_dir.mkdir(parents=True, exist_ok=True)
            run.results |= {"command": f"python -m benchmarks.sweep {shlex.join(argv or sys.argv[1:])}"}
            run.results |= {"machine": machine_facts(run.work_dir, arguments.device), "options": _options(arguments)}
            measure(run)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(run.results))
    if arguments.plot:
        from benchmarks.plot import PlotError, plot

        try:
            plot(run.results, arguments.plot)
        except PlotError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    return 1 if run.results["skipped"] or _failures(run.results) else 0


def measure(run: Run) -> None:
    """All stages in order, the ones that say most first; results are saved after each."""
    checkpoint = _checkpoint(run)
    store = run.work_dir / "store"
    shards = run.stage("shards", "shards", {"store": str(store), "checkpoint": str(checkpoint), "model": _MODEL_NAME})
    if shards is None or "error" in shards:
        run.results["shards"] = shards or {"error": "no time"}
        run.save()
        return
    files = shards.pop("files")
    run.results["shards"] = shards
    _calibrate(run, files)
    prompts = _prompts(run)
    for tier in run.arguments.tiers:
        _measure_tier(run, tier, store, prompts)
    for kind in PEERS["transformers"]:
        _measure_peer(run, kind, checkpoint, prompts, run.arguments.sequences)
    for peer in run.arguments.peers:
        for kind in PEERS[peer] if peer != "transformers" else ():
            _measure_peer(run, kind, checkpoint, prompts, run.arguments.peer_sequences)
    _look_up_margins(run, checkpoint)
    run.save()


def _checkpoint(run: Run) -> Path:
    began = time.monotonic()
    arguments = run.arguments
    if arguments.model is None:
        shape = shape_from(arguments)
        run.say(f"writing a random checkpoint of {shape.nbytes / 1e9:.2f} GB ...")
        directory = build_checkpoint(shape, run.work_dir / "checkpoint")
        run.results["model"] = {"random": True} | asdict(shape)
    elif arguments.model.suffix == ".gguf":
        directory = export_gguf(arguments.model, run.work_dir / "checkpoint")
        run.results["model"] = {"random": False, "name": arguments.model.name}
    else:
        directory = arguments.model
        run.results["model"] = {"random": False, "name": arguments.model.name}
    config = json.loads((directory / "config.json").read_text())
    sizes = tensor_bytes(directory)
    total = sum(sizes.values())
    embedding = sum(nbytes for name, nbytes in sizes.items() if "embed_tokens" in name)
    is_tied = not any("lm_head" in name for name in sizes)
    dtype = str(config.get("dtype", "float32"))
    itemsize = 4 if dtype == "float32" else 2
    swept = total if is_tied else total - embedding
    run.results["model"] |= {
        "bytes": total,
        "swept_bytes": swept,
        "active_parameters": swept // itemsize,
        "layers": config["num_hidden_layers"],
        "vocab": config["vocab_size"],
        "dtype": dtype,
    }
    drop_file_cache(weight_files(directory))
    run.say(f"checkpoint of {total / 1e9:.2f} GB ready after {time.monotonic() - began:.1f} s")
    run.save()
    return directory


def _calibrate(run: Run, files: list[str]) -> None:
    spec = {
        "device": run.arguments.device,
        "dtype": run.results["model"]["dtype"],
        "files": files,
        "seconds_per_depth": run.arguments.calibration_s,
    }
    report = run.stage("calibration", "calibrate", spec)
    if report is not None:
        run.results["calibration"] = report
        run.save()


def _prompts(run: Run) -> list[list[int]]:
    span = min(run.results["model"]["vocab"] - 3, 1000)
    most = max([*run.arguments.sequences, *run.arguments.peer_sequences])
    return [[(index * 31 + place * 7) % span + 3 for place in range(PROMPT_TOKENS)] for index in range(most)]


def _cap_bytes(arguments: argparse.Namespace) -> int | None:
    return int(arguments.cap_gib * GIB) if arguments.cap_gib else None


def _measure_tier(run: Run, tier: str, store: Path, prompts: list[list[int]]) -> None:
    arguments = run.arguments
    cap = None if tier == "resident" else _cap_bytes(arguments)
    sweeps = arguments.disk_sweeps if tier == "disk" else arguments.sweeps
    spec = {
        "tier": tier,
        "store": str(store),
        "model": _MODEL_NAME,
        "device": arguments.device,
        "cap_bytes": cap,
        "vram": cap or "auto",
        "ram": 0 if tier == "disk" else arguments.ram,
        "sequences": arguments.sequences,
        "prompts": prompts,
        "sweeps": sweeps,
        "batched_sweeps": (sweeps + 1) // 2 if tier == "disk" else sweeps,
        "deadline_s": 0.0,
    }
    report = run.stage(f"lamella {tier}", "lamella", spec)
    if report is not None:
        run.results["lamella"][tier] = report
        run.save()


def _measure_peer(run: Run, kind: str, checkpoint: Path, prompts: list[list[int]], sequences: list[int]) -> None:
    arguments = run.arguments
    is_resident = kind == "transformers"
    reads_disk = kind not in ("transformers", "accelerate-ram")
    if kind == "accelerate-ram" and arguments.device == "cpu":
        run.say(f"{kind}: left out, on a CPU there is no device to offload from")
        return
    kept = arguments.airllm_tokens if kind in ("airllm", "airllm-4bit") else arguments.tokens
    spec = {
        "checkpoint": str(checkpoint),
        "device": arguments.device,
        "cap_bytes": None if is_resident else _cap_bytes(arguments),
        "sequences": sequences,
        "prompts": prompts,
        "warm_tokens": max(kept, REFERENCE_TOKENS) if is_resident else kept,
        "cold_tokens": arguments.cold_tokens if reads_disk else 0,
        "deadline_s": 0.0,
        "work_dir": str(run.work_dir / "peers"),
    }
    report = run.stage(kind, kind, spec)
    if report is not None:
        run.results["peers"][kind] = report
        run.save()


def _look_up_margins(run: Run, checkpoint: Path) -> None:
    """Where tokens differ, how close the two best were: a tie is not an error."""
    differing = differences(run.results)
    if not differing:
        return
    first = _prompts(run)[0]
    spec = {
        "checkpoint": str(checkpoint),
        "device": run.arguments.device,
        "prefixes": [first + difference.shared_ids for difference in differing],
    }
    report = run.stage("margins", "margins", spec)
    if report is not None:
        pairs = zip(differing, report.get("margins", []), strict=False)
        run.results["margins"] = {str(difference.position): margin for difference, margin in pairs}


def _failures(results: dict[str, Any]) -> list[str]:
    reports = {f"lamella {tier}": report for tier, report in results["lamella"].items()}
    reports |= results["peers"]
    reports |= {name: results.get(name, {}) for name in ("shards", "calibration")}
    return [name for name, report in reports.items() if "error" in report or "skipped" in report]


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(arguments).items()}


def _check(arguments: argparse.Namespace) -> None:
    """Fill in what depends on the device, and refuse what cannot work.

    Raises:
        ValueError: says which option, and what to use instead.
    """
    _check_device(arguments)
    if arguments.tiers is None:
        arguments.tiers = [tier for tier in TIERS if not (arguments.device == "cpu" and tier == "resident")]
    if arguments.model is None:
        shape_from(arguments)
    elif not arguments.model.exists():
        raise ValueError(f"--model: there is no {arguments.model}; name a checkpoint directory or a .gguf file")
    for name in ("json", "plot"):
        path = getattr(arguments, name)
        if path is not None and not path.parent.is_dir():
            raise ValueError(f"--{name}: there is no directory {path.parent}; make it first")


def _check_device(arguments: argparse.Namespace) -> None:
    if arguments.device == "cuda":
        arguments.device = "cuda:0"
    is_cpu = arguments.device == "cpu"
    if not is_cpu and not arguments.device.removeprefix("cuda:").isdigit():
        raise ValueError(f"--device is {arguments.device!r}; use cpu, cuda or cuda:N")
    if is_cpu and arguments.cap_gib is not None:
        raise ValueError("--cap-gib limits GPU memory and --device is cpu; leave it out, or use --ram for Lamella")
    if arguments.cap_gib is None and not is_cpu:
        arguments.cap_gib = DEFAULT_CAP_GIB
    if arguments.cap_gib is not None and arguments.cap_gib <= 0:
        raise ValueError(f"--cap-gib is {arguments.cap_gib}; it must be above 0")


def _choices(known: tuple[str, ...]) -> Callable[[str], list[str]]:
    """A comma-separated list out of `known`; an empty text is an empty list."""

    def read(text: str) -> list[str]:
        names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(known)}")
        return names

    return read


def _counts(text: str) -> list[int]:
    """Comma-separated positive numbers, smallest first."""
    try:
        counts = sorted({int(part) for part in text.split(",")})
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers such as 1,8,64") from error
    if counts[0] < 1:
        raise argparse.ArgumentTypeError(f"{counts[0]} sequences cannot be measured; use numbers from 1 on")
    return counts


def _at_least(least: float, kind: type[int] | type[float]) -> Callable[[str], float]:
    """A number not below `least`."""

    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r} is no number") from error
        if not value >= least:
            raise argparse.ArgumentTypeError(f"{text} is below {least:g}")
        return value

    return read


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", default="cpu", help="cpu, cuda or cuda:N (%(default)s)")
    add("--peers", type=_choices(tuple(PEERS)), default="airllm,accelerate", help="who else runs (%(default)s)")
    add("--tiers", type=_choices(TIERS), help="Lamella with weights in ram, on disk, resident (all; on a CPU ram,disk)")
    add("--sequences", type=_counts, default="1,8,64", help="of Lamella and transformers (%(default)s)")
    add("--peer-sequences", type=_counts, default="1", help="of AirLLM and accelerate (%(default)s)")
    add("--cap-gib", type=float, help="GPU memory of everyone but the resident ones (4)")
    add("--ram", default="auto", help="Lamella's RAM budget where it may use RAM: bytes, 16GiB, 80%%, auto")
    add("--model", type=Path, help="a checkpoint directory or a .gguf file, instead of a random Llama")
    add("--work-dir", type=Path, help="keeps checkpoint, shards and logs; without it they go when the run ends")
    add("--json", type=Path, help="results, written after every stage")
    add("--plot", type=Path, help="SVG of the results (needs the extra `bench`)")
    add("--sweeps", type=_at_least(2, int), default=10, help="timed sweeps a figure (%(default)s)")
    add("--disk-sweeps", type=_at_least(2, int), default=10, help="the same from disk; half for N > 1 (%(default)s)")
    add("--tokens", type=_at_least(1, int), default=10, help="timed tokens of a peer (%(default)s)")
    add("--airllm-tokens", type=_at_least(1, int), default=3, help="the same of AirLLM as shipped (%(default)s)")
    add("--cold-tokens", type=_at_least(0, int), default=2, help="more, the file cache dropped before each")
    add("--calibration-s", type=_at_least(0.05, float), default=1.0, help="seconds a disk depth (%(default)s)")
    add("--budget-s", type=_at_least(1, float), default=1800.0, help="for the whole run (%(default)s)")
    add("--stage-s", type=_at_least(1, float), default=300.0, help="deadline of one stage (%(default)s)")
    add_shape_arguments(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
