"""What the service adds to its engine: time to the first event, time a token is under way, and tokens a second.

    OMP_NUM_THREADS=1 python -m benchmarks.latency --requests 100 --json latency.json
    OMP_NUM_THREADS=1 python -m benchmarks.latency --model smollm2 --store STORE --streams 64 --tokens 40
    OMP_NUM_THREADS=1 python -m benchmarks.latency --layers 8 --hidden 4096 --device cuda:0 --vram 1500MiB

Everything is measured in one run. *First event*: requests one at a time, in turn to an engine's process alone and
through client, queue, worker and another such process; the difference of each pair is the service's. *Delivery*: a
worker whose tokens say when its engine made them, read by one client as one stream and as many. *Pace*: many streams
side by side, in turn alone and through the service, counted from when all have begun until the first ends. Processor
seconds are told beside the clock, and how busy others kept the machine; with fewer cores than there are processes,
these get in each other's way. Neighbours: `latency_sides` what is started, `stamped_worker` tokens that tell the
time, `delivery` who reads them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, aclosing
from pathlib import Path
from typing import Any

from benchmarks.checkpoint import LlamaShape, build_checkpoint
from benchmarks.delivery import STREAM_S, quantiles_ms
from benchmarks.json_file import write_json
from benchmarks.latency_sides import (
    PROMPT,
    ROOT,
    EngineAlone,
    Pace,
    PaceMeter,
    Service,
    Terms,
    stamped_command,
    worker_command,
)
from benchmarks.machine import Bystanders, machine_facts
from benchmarks.stamped_worker import MODEL as STAMPED
from lamella import AsyncClient, Client
from lamella.messages import TokenEvent
from lamella_engine import ShardStore

HEAD_WIDTH = 16
WARM = 10  # requests before those that count
FIRST_TOKENS = 3  # of a request whose first one is timed
STAMPED_SWEEP_S = 0.05


def first_events(alone: EngineAlone, service: Service, model: str, requests: int) -> dict[str, Any]:
    """Milliseconds to the first event, alone and through the service, in turn; and what the service adds."""
    own, sweeps, whole, submits = [], [], [], []
    with Client(service.url) as client:
        for number in range(WARM + requests):
            own_s, sweep_s = alone.first_token_s(FIRST_TOKENS)
            began = time.perf_counter()
            job = client.submit(PROMPT, model=model, max_tokens=FIRST_TOKENS, ignore_eos=True)
            submitted_s = time.perf_counter() - began
            items = job.stream(timeout_s=STREAM_S)
            next(item for item in items if item.seq is not None)
            whole_s = time.perf_counter() - began
            for _ in items:
                pass
            if number >= WARM:
                own.append(own_s)
                sweeps.append(sweep_s)
                whole.append(whole_s)
                submits.append(submitted_s)
    added = [after - before for before, after in zip(own, whole, strict=True)]
    return {
        "requests": requests,
        "submit": quantiles_ms(submits),
        "submit_to_first_event": quantiles_ms(whole),
        "engine_process_alone": quantiles_ms(own),
        "of_that_the_sweep": quantiles_ms(sweeps),
        "beyond_the_engine": quantiles_ms(added),
    }


async def served_pace(
    url: str, model: str, streams: int, max_tokens: int, busy_s: Any
) -> tuple[Pace, dict[str, float]]:
    """Tokens a second through the service, and processor seconds of each process meanwhile."""
    meter = PaceMeter(streams)

    async def read(client: AsyncClient) -> None:
        job = await client.submit(PROMPT, model=model, max_tokens=max_tokens, ignore_eos=True)
        async with aclosing(job.stream(timeout_s=STREAM_S)) as items:
            async for _, event in items:
                if isinstance(event, TokenEvent):
                    meter.note(job.id, len(event.token_ids), time.perf_counter())
        meter.ended()

    before = busy_s()
    async with AsyncClient(url) as client:
        await asyncio.gather(*(read(client) for _ in range(streams)))
    spent = {name: round(after - before[name], 2) for name, after in busy_s().items()}
    return meter.pace(sum(spent.values())), spent


def paces(alone: EngineAlone, service: Service, options: argparse.Namespace, model: str) -> dict[str, Any]:
    """Tokens a second, alone and through the service, in turn."""
    own: list[Pace] = []
    served: list[Pace] = []
    spent: list[dict[str, float]] = []
    for number in range(options.warm_rounds + options.rounds):
        before = alone.pace(options.streams, options.tokens)
        pace, each = asyncio.run(served_pace(service.url, model, options.streams, options.tokens, service.busy_s))
        is_warm = number >= options.warm_rounds
        counted = "" if is_warm else " (not counted)"
        _say(f"{before.tokens_per_s:.1f} tokens/s alone, {pace.tokens_per_s:.1f} through the service{counted}")
        if is_warm:
            own.append(before)
            served.append(pace)
            spent.append(each)
    if alone.preemptions:
        _say(f"{alone.preemptions} preemptions: the cache is too small for this to be a pace; see --vram and --tokens")
    shares = [after.tokens_per_s / before.tokens_per_s for before, after in zip(own, served, strict=True)]
    return {
        "streams": options.streams,
        "tokens_each": options.tokens,
        "rounds": options.rounds,
        "warm_rounds": options.warm_rounds,
        "preemptions_alone": alone.preemptions,
        "alone_tokens_per_s": [round(each.tokens_per_s, 2) for each in own],
        "served_tokens_per_s": [round(each.tokens_per_s, 2) for each in served],
        "alone_cpu_s": [round(each.cpu_s, 2) for each in own],
        "served_cpu_s": spent,
        "share": round(statistics.median(shares), 4),
        "shares": [round(share, 4) for share in shares],
    }


def made_shape(options: argparse.Namespace) -> LlamaShape:
    """The random model that is made where none is named: float32 on a processor, bfloat16 on a card."""
    heads = max(2, options.hidden // (HEAD_WIDTH if options.hidden < 1024 else 8 * HEAD_WIDTH))
    dtype = "float32" if options.device == "cpu" else "bfloat16"
    return LlamaShape(
        layers=options.layers,
        hidden=options.hidden,
        ffn=options.hidden * 3 // 2 if options.hidden < 1024 else options.hidden * 11 // 4,
        vocab=512,
        heads=heads,
        kv_heads=heads // 2,
        dtype=dtype,
    )


def measure(options: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """Run all parts."""
    model, store = options.model or "tiny", options.store or directory / "store"
    if options.model is None:
        ShardStore(store).ensure(model, source=build_checkpoint(made_shape(options), directory / "checkpoint"))
    terms = Terms(model, store, options.streams, options.ram, options.vram, options.device)
    result: dict[str, Any] = {"model": model, "threads": os.environ.get("OMP_NUM_THREADS", "as torch chooses")}
    with ExitStack() as stack:
        service = stack.enter_context(Service(worker_command(terms, "worker"), "worker", directory))
        alone = stack.enter_context(EngineAlone(terms))
        service.wait_listed()
        result["first_event_ms"] = first_events(alone, service, model, options.requests)
        _say(_table(result["first_event_ms"]))
        result["pace"] = paces(alone, service, options, model)
    with Service(stamped_command("stamped", options.streams, STAMPED_SWEEP_S), "stamped", directory) as stamped:
        stamped.wait_listed()
        result["delivery_ms"] = [_delivery(stamped.url, streams) for streams in (1, options.streams)]
    for each in result["delivery_ms"]:
        _say(f"delivery of {each['streams']} streams: p50 {each['p50']} ms, p99 {each['p99']} ms")
    return result


def _delivery(url: str, streams: int) -> dict[str, Any]:
    """Read by a process without torch, as clients are: collecting this one's garbage takes longer than a delivery."""
    command = [sys.executable, "-m", "benchmarks.delivery", url, STAMPED, str(streams), str(STAMPED_SWEEP_S)]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=STREAM_S, check=True)
    found: dict[str, Any] = json.loads(told.stdout)
    return found


def _table(figures: dict[str, Any]) -> str:
    rows = [(name, each) for name, each in figures.items() if isinstance(each, dict)]
    lines = [f"{'ms':24}" + "".join(f"{name:>9}" for name in rows[0][1])]
    return "\n".join([*lines, *(f"{name:24}" + "".join(f"{ms:9.2f}" for ms in each.values()) for name, each in rows)])


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a model in --store; else a random one is made")
    parser.add_argument("--store", type=Path, help="directory of the shard cache, with --model")
    parser.add_argument("--layers", type=int, default=4, help="of the random model, where --model names none")
    parser.add_argument("--hidden", type=int, default=64, help="its width")
    parser.add_argument("--device", default="cpu", help="of both sides")
    parser.add_argument("--vram", default="auto", help="device memory, of each side")
    parser.add_argument("--ram", default="auto", help="host memory for weights, of each side")
    parser.add_argument("--requests", type=int, default=100, help="whose first event is timed")
    parser.add_argument("--streams", type=int, default=64, help="side by side")
    parser.add_argument("--tokens", type=int, default=200, help="of each of these streams")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side")
    parser.add_argument("--warm-rounds", type=int, default=1, help="turns before those that count")
    parser.add_argument("--json", type=Path, help="where the result goes; else standard output")
    options = parser.parse_args(arguments)
    if (options.model is None) != (options.store is None):
        parser.error("--model and --store go together")
    if min(options.requests, options.streams, options.rounds) < 1 or options.tokens < 2 or options.warm_rounds < 0:
        parser.error("--requests, --streams and --rounds are at least 1, --tokens at least 2, --warm-rounds at least 0")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and tell."""
    options = parse(arguments)
    bystanders, load = Bystanders(), os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="lamella-latency-") as name:
        figures = measure(options, Path(name))
        facts = machine_facts(Path(name), options.device)
    result = {
        "command": "python -m benchmarks.latency " + " ".join(sys.argv[1:] if arguments is None else arguments),
        "machine": {**facts, "others_busy_cores": bystanders.busy_cores()},
        "load_before": round(load, 2),
        "load_after": round(os.getloadavg()[0], 2),
        **figures,
    }
    if options.json is None:
        print(json.dumps(result, indent=2))
    else:
        write_json(options.json, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
