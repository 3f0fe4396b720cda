"""Seconds a sweep of the streaming engine, beside the limit that the same machine sets in the same run.

    python -m benchmarks.streaming --device cpu --model SmolLM2-135M-Instruct --store DIR --json FILE
    python -m benchmarks.streaming --device cuda --layers 16 --hidden 4096 --ffn 14336 --cap-gib 4 --json FILE

Without --model a seeded random Llama of the given size is built (bf16). The limit is the time in which the layers'
bytes alone can be read from the same shard files by the engine's own reader (through the file cache, best of
several passes) and, on a GPU, copied from pinned memory; a design that overlaps perfectly takes the larger of the two.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from lamella_engine import Engine, EngineOptions, Sampling, SequenceFinished, SequenceRequest, ShardStore
from lamella_engine.device import resolve_device
from lamella_engine.reader import LayerReader, allocate_host_slot
from lamella_engine.shard import ShardedModel

WARM_UP_TOKENS = 3
TOKENS = 12
PROMPT_TOKENS = 32
READ_PASSES = 6


def main() -> int:
    """Measure and print one JSON object."""
    arguments = _arguments()
    device = resolve_device(arguments.device)
    if device.type == "cuda" and arguments.cap_gib:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(arguments.cap_gib * 2**30 / total)
    with tempfile.TemporaryDirectory() as scratch:
        store = Path(arguments.store or scratch)
        sharded = _sharded(arguments, store, Path(scratch))
        report = _machine(device) | _limits(sharded, device) | {"cap_gib": arguments.cap_gib, "sequences": {}}
        options = EngineOptions(store=store, device=arguments.device, max_sequences=64, kv_tokens=64 * 64, offline=True)
        with Engine.open_sharded(sharded, device, options) as engine:
            _sweep_seconds(engine, 1, WARM_UP_TOKENS)
            for count in (1, 8, 64):
                seconds = _sweep_seconds(engine, count, TOKENS)
                report["sequences"][count] = {
                    "s_per_sweep": round(seconds, 5),
                    "tokens_per_s": round(count / seconds, 2),
                    "efficiency": round(report["limit_s_per_sweep"] / seconds, 3),
                }
            report["peak_rss_bytes"] = engine.counters().peak_rss_bytes
        if device.type == "cuda":
            report["peak_device_bytes"] = torch.cuda.max_memory_allocated(device)
    text = json.dumps(report, indent=2)
    print(text)
    if arguments.json:
        Path(arguments.json).write_text(text + "\n")
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model", help="a model in the store; without it a random one is built")
    parser.add_argument("--store", help="the shard store; without it a temporary one")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--ffn", type=int, default=5632)
    parser.add_argument("--cap-gib", type=float, help="GPU memory this process may have")
    parser.add_argument("--json", help="write the report to this file, too")
    return parser.parse_args()


def _sharded(arguments: argparse.Namespace, store: Path, scratch: Path) -> ShardedModel:
    if arguments.model:
        return ShardStore(store).ensure(arguments.model, offline=True)
    config = transformers.LlamaConfig(
        vocab_size=32000,
        hidden_size=arguments.hidden,
        intermediate_size=arguments.ffn,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.hidden // 128,
        num_key_value_heads=max(1, arguments.hidden // 512),
        max_position_embeddings=4096,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(scratch / "checkpoint")
    del model
    return ShardStore(store).ensure("random-llama", source=scratch / "checkpoint")


def _machine(device: torch.device) -> dict[str, Any]:
    return {
        "command": " ".join(["python -m benchmarks.streaming", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def _limits(sharded: ShardedModel, device: torch.device) -> dict[str, Any]:
    """The time one sweep's bytes take to read, and to copy to the device, each on its own."""
    nbytes = sum(shard.nbytes for shard in sharded.layers)
    reader = LayerReader(sharded.layers, 3, pinned=device.type == "cuda")
    try:
        reader.start()
        passes = []
        for _ in range(1 + READ_PASSES):  # the first one fills the file cache
            began = time.perf_counter()
            for _ in sharded.layers:
                reader.give_back(reader.next_filled().slot)
            passes.append(time.perf_counter() - began)
        read_s = min(passes[1:])
    finally:
        reader.close()
    copy_s = _copy_seconds(nbytes, device) if device.type == "cuda" else 0.0
    return {
        "streamed_bytes_per_sweep": nbytes,
        "read_s_per_sweep": round(read_s, 5),
        "copy_s_per_sweep": round(copy_s, 5),
        "limit_s_per_sweep": max(read_s, copy_s),
    }


def _copy_seconds(nbytes: int, device: torch.device) -> float:
    chunk = 256 * 1024 * 1024
    source = allocate_host_slot(chunk, pinned=True).tensor
    target = torch.empty(chunk, dtype=torch.uint8, device=device)
    target.copy_(source, non_blocking=True)
    torch.cuda.synchronize(device)
    began = time.perf_counter()
    for _ in range(16):
        target.copy_(source, non_blocking=True)
    torch.cuda.synchronize(device)
    return (time.perf_counter() - began) / 16 * nbytes / chunk


def _sweep_seconds(engine: Engine, count: int, tokens: int) -> float:
    """Mean seconds of a decoding sweep that carries `count` sequences."""
    sampling = Sampling(max_tokens=tokens + 2, ignore_eos=True)
    vocabulary = 1000
    for index in range(count):
        prompt = tuple((index * 31 + position * 7) % vocabulary + 3 for position in range(PROMPT_TOKENS))
        engine.submit(SequenceRequest(f"s{index}", sampling, prompt_ids=prompt))
    finished, stamps = 0, []
    for batch in engine.events(poll_s=5.0):
        if batch.events:
            stamps.append(time.perf_counter())
        finished += sum(isinstance(event, SequenceFinished) for event in batch.events)
        if finished == count:
            break
    return (stamps[-1] - stamps[-1 - tokens]) / tokens


if __name__ == "__main__":
    sys.exit(main())
