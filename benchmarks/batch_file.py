"""A file of many lines through `lamella batch run`, killed on the way: lines a second, memory, and what was lost.

    OMP_NUM_THREADS=1 python -m benchmarks.batch_file --lines 50000 --kills 3 --json batch.json

A real server, worker and command; the model is a tiny random one, so that what is measured is the way of the lines.
The command is killed with SIGKILL when the output has grown by equal parts, and started again; at the end every line
has to be there once, in order, with one text for one prompt, and the service must have been asked for each line once.
Neighbour: `latency_sides`, which starts server and worker.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import redis

from benchmarks.checkpoint import LlamaShape, build_checkpoint
from benchmarks.json_file import write_json
from benchmarks.latency_sides import ROOT, Service, Terms, worker_command
from benchmarks.machine import Bystanders, machine_facts, proc_field
from lamella.keys import Keys
from lamella_engine import ShardStore

TINY = LlamaShape(layers=2, hidden=64, ffn=96, vocab=512, heads=4, kv_heads=2, dtype="float32")
MODEL = "tiny"
PROMPTS = 50  # different ones, so that equal prompts can be held against each other
RUN_S = 3600.0
LOOK_S = 0.05


def write_lines(path: Path, count: int) -> None:
    """The input: OpenAI's batch requests, `PROMPTS` different prompts in turn."""
    with path.open("w", encoding="utf-8") as lines:
        for number in range(count):
            body = {"model": MODEL, "prompt": f"Line {number % PROMPTS}", "max_tokens": 2 + number % 7}
            request = {"custom_id": f"line-{number}", "method": "POST", "url": "/v1/completions", "body": body}
            lines.write(json.dumps(request) + "\n")


def run_once(command: Sequence[str], output: Path, kill_at_bytes: int | None) -> tuple[int, float, float]:
    """Run the command to its end, or until the output has so many bytes; exit code, seconds, most memory in MB."""
    began = time.monotonic()
    memory_mb = 0.0
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, cwd=ROOT)
    try:
        while process.poll() is None:
            peak = proc_field(f"/proc/{process.pid}/status", "VmHWM")
            memory_mb = max(memory_mb, int(peak.split()[0]) / 1e3 if peak else 0.0)
            if kill_at_bytes is not None and output.exists() and output.stat().st_size >= kill_at_bytes:
                process.send_signal(signal.SIGKILL)
            if time.monotonic() - began > RUN_S:
                raise TimeoutError(f"the command took longer than {RUN_S:g} s")
            time.sleep(LOOK_S)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(30)
    return process.returncode, time.monotonic() - began, memory_mb


def judge(output: Path, count: int) -> dict[str, int]:
    """What is wrong with the output: lines that lack, come twice, stand elsewhere, or differ from their like."""
    texts: dict[tuple[int, int], str] = {}
    ids, different = [], 0
    with output.open(encoding="utf-8") as lines:
        for line in lines:
            record = json.loads(line)
            number = int(record["custom_id"].removeprefix("line-"))
            ids.append(number)
            text = record["response"]["body"]["choices"][0]["text"]
            different += texts.setdefault((number % PROMPTS, 2 + number % 7), text) != text
    return {
        "lines": len(ids),
        "lost": count - len(set(ids)),
        "twice": len(ids) - len(set(ids)),
        "out_of_order": sum(low >= high for low, high in itertools.pairwise(ids)),
        "different": different,
    }


def measure(options: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """Run the file with its kills."""
    source, output = directory / "in.jsonl", directory / "out.jsonl"
    write_lines(source, options.lines)
    store = directory / "store"
    ShardStore(store).ensure(MODEL, source=build_checkpoint(TINY, directory / "checkpoint"))
    runs: list[dict[str, Any]] = []
    with Service(worker_command(Terms(MODEL, store, options.slots, "auto"), "worker"), "worker", directory) as service:
        service.wait_listed()
        command = [sys.executable, "-m", "lamella", "batch", "run", str(source), str(output), "--json"]
        command += ["--redis-url", service.url]
        line_bytes = 430  # about; only says when to kill
        for part in range(1, options.kills + 2):
            is_last = part > options.kills
            at = None if is_last else options.lines * line_bytes * part // (options.kills + 1)
            code, seconds, memory_mb = run_once(command, output, at)
            runs.append({"exit_code": code, "seconds": round(seconds, 1), "memory_mb": round(memory_mb)})
            runs[-1]["output_bytes"] = output.stat().st_size if output.exists() else 0
            print(runs[-1], file=sys.stderr, flush=True)
        with redis.Redis.from_url(service.url, protocol=2, decode_responses=True, socket_timeout=60) as client:
            asked = sum(1 for _ in client.scan_iter(match=Keys().job("*"), count=1000, _type="hash"))
    seconds = sum(run["seconds"] for run in runs)
    return {
        "slots": options.slots,
        "runs": runs,
        "seconds": round(seconds, 1),
        "lines_per_s": round(options.lines / seconds, 1),
        "jobs_asked": asked,
        "verdict": judge(output, options.lines),
    }


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, default=50_000)
    parser.add_argument("--kills", type=int, default=3, help="kill -9 of the command, spread over the output")
    parser.add_argument("--slots", type=int, default=64, help="of the worker")
    parser.add_argument("--json", type=Path, help="where the result goes; else standard output")
    options = parser.parse_args(arguments)
    if options.lines < 1 or options.kills < 0 or options.slots < 1:
        parser.error("--lines and --slots are at least 1, --kills at least 0")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and tell; 1 if a line was lost, doubled, moved or different."""
    options = parse(arguments)
    bystanders, load = Bystanders(), os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="lamella-batch-") as name:
        figures = measure(options, Path(name))
        facts = machine_facts(Path(name), "cpu")
    result = {
        "command": "python -m benchmarks.batch_file " + " ".join(sys.argv[1:] if arguments is None else arguments),
        "machine": {**facts, "others_busy_cores": bystanders.busy_cores()},
        "load_before": round(load, 2),
        "lines": options.lines,
        "kills": options.kills,
        **figures,
    }
    if options.json is None:
        print(json.dumps(result, indent=2))
    else:
        write_json(options.json, result)
    verdict = figures["verdict"]
    is_well = verdict["lines"] == options.lines == figures["jobs_asked"]
    return 0 if is_well and not any(verdict[key] for key in ("lost", "twice", "out_of_order", "different")) else 1


if __name__ == "__main__":
    sys.exit(main())
