"""Lamella itself, one tier a process: seconds a sweep at several numbers of sequences, and what each sweep moved.

Owns the tiers as engine options and the timing; the engine is used as any caller uses it. `build_shards` makes the
store beforehand, so that no tier pays for it. Neighbours: `stage` runs the process, `report` sets limits beside it.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.calibrate import plain_read
from benchmarks.coldness import DiskWitness, ReadCount, cached_share, drop_file_cache, prove
from benchmarks.machine import peak_rss_bytes
from benchmarks.stage import say
from lamella_engine import Engine, EngineCounters, EngineOptions, Sampling, SequenceRequest, SequenceTokens, ShardStore
from lamella_engine.placement import Plan, Tier
from lamella_engine.sequence_types import FinishReason, SequenceFinished

TIERS = ("ram", "disk", "resident")
WARM_UP_SWEEPS = 3  # decoding sweeps that are not timed: read-ahead settles, repeated shapes are recorded
# So many sweeps a sequence may decode before the last of its batch has read its prompt. A CPU carries few tokens a
# sweep; on a GPU every spare token of the cache takes room from a layer.
SPARE_TOKENS = {"cpu": 64, "cuda": 16}
FEW_SEQUENCES = 8  # and fewer share an engine, as its defaults have it
MIN_SWEEPS_A_HALF = 4
_POLL_S = 2.0
_MOVED = ("disk_bytes", "ram_bytes", "read_s", "copy_s", "compute_s", "sweep_s")


@dataclass(frozen=True)
class LamellaSpec:
    """What one tier's process is told."""

    tier: str
    store: str
    model: str
    device: str
    cap_bytes: int | None
    vram: int | str
    ram: int | str
    sequences: list[int]
    prompts: list[list[int]]
    sweeps: int
    batched_sweeps: int  # for more than one sequence
    deadline_s: float


@dataclass
class Watch:
    """What a batch of sequences has brought so far; a full sweep is one that brought a token to every sequence."""

    stamps: list[float] = field(default_factory=list)
    token_ids: dict[str, list[int]] = field(default_factory=dict)
    finished: int = 0


def build_shards(spec: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Build (or find) the store's shards of `spec["checkpoint"]` under the name `spec["model"]`."""
    began = time.perf_counter()
    store = ShardStore(Path(spec["store"]))
    sharded = store.ensure(spec["model"], source=Path(spec["checkpoint"]))
    files = sorted({str(shard.path) for shard in (sharded.root, *sharded.layers)})
    drop_file_cache(Path(name) for name in files)
    yield {"build_s": round(time.perf_counter() - began, 2), "bytes": sharded.size_bytes, "files": files}


def measure_lamella(spec: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Open the engine for one tier and decode with every number of sequences; yields after each."""
    run = LamellaSpec(**spec)
    deadline = time.monotonic() + run.deadline_s
    device = torch.device(run.device)
    if run.cap_bytes is not None and device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(run.cap_bytes / total, device)
    files = _shard_files(run)
    drop_file_cache(files)
    report: dict[str, Any] = {"tier": run.tier, "cap_bytes": run.cap_bytes, "vram": run.vram, "ram": run.ram}
    report |= {"rss_before_open_bytes": peak_rss_bytes(), "sequences": {}}  # Python, torch: no part of any budget
    for counts in _engines(run.sequences):
        began = time.perf_counter()
        with Engine.open(run.model, _options(run, max(counts))) as engine:
            open_s, plan = round(time.perf_counter() - began, 2), _plan_report(engine.plan)
            say(f"open for {max(counts)} sequences after {open_s} s: {plan['bytes']}")
            for count in counts:
                if time.monotonic() > deadline:
                    report["skipped"] = f"{count} sequences and more: the stage's time was up"
                    break
                facts = {"open_s": open_s, "plan": plan}
                report["sequences"][str(count)] = facts | _measure_batch(engine, run, count, files, deadline)
                report |= _memory(device, engine.plan)
                yield report


def _engines(sequences: list[int]) -> list[list[int]]:
    """Which numbers of sequences share an engine: few ones do, so that they do not pay for the cache of many."""
    few = [count for count in sequences if count <= FEW_SEQUENCES]
    return ([few] if few else []) + [[count] for count in sequences if count > FEW_SEQUENCES]


def _options(run: LamellaSpec, most: int) -> EngineOptions:
    tokens_each = len(run.prompts[0]) + _most_tokens(run)
    return EngineOptions(
        store=Path(run.store),
        device=run.device,
        max_sequences=most,
        kv_tokens=most * (-(-tokens_each // 16) * 16),
        vram=run.vram,
        ram=run.ram,
        offline=True,
    )


def _measure_batch(engine: Engine, run: LamellaSpec, count: int, files: list[Path], deadline: float) -> dict[str, Any]:
    """Decode with `count` sequences side by side until enough full sweeps have been timed.

    From disk with plain reads of the same layers before, between and after: what the disk gives wanders.
    """
    wanted = run.sweeps if count == 1 else run.batched_sweeps
    on_disk = engine.plan.layer_bytes(Tier.DISK)
    if run.tier != "disk" or not on_disk:
        return _time_sweeps(engine, run, count, files, wanted, deadline)
    streamed = _streamed_files(engine, run)
    speeds = [plain_read(streamed, on_disk)]
    parts = []
    for part in _halves(wanted) if count == 1 else [wanted]:
        parts.append(_time_sweeps(engine, run, count, files, part, deadline))
        speeds.append(plain_read(streamed, on_disk))
    seconds = [second for part in parts for second in part["seconds"]]
    whole = parts[0] | {
        "s_per_sweep": statistics.median(seconds),
        "best_s_per_sweep": min(seconds),
        "mean_s_per_sweep": statistics.fmean(seconds),
        "tokens_per_s": count / statistics.median(seconds),
        "samples": len(seconds),
        "seconds": seconds,
        "label": next((part["label"] for part in parts if part["label"] != "cold"), "cold"),
        "plain_read_bytes_per_s": [round(speed) for speed in speeds],
    }
    return whole | ({"second_part": {key: parts[1][key] for key in ("proof", "per_sweep")}} if parts[1:] else {})


def _halves(number: int) -> list[int]:
    return [number // 2, number - number // 2] if number >= MIN_SWEEPS_A_HALF * 2 else [number]


def _time_sweeps(
    engine: Engine, run: LamellaSpec, count: int, files: list[Path], wanted: int, deadline: float
) -> dict[str, Any]:
    """Time `wanted` sweeps that bring a token to each of `count` sequences."""
    if run.tier == "disk":
        drop_file_cache(files)
    share_before = cached_share(files)
    names = [f"n{count}-{index}" for index in range(count)]
    sampling = Sampling(max_tokens=_most_tokens(run), ignore_eos=True)
    for index, name in enumerate(names):
        prompt = tuple(run.prompts[index % len(run.prompts)])
        engine.submit(SequenceRequest(name, sampling, prompt_ids=prompt))
    witness = DiskWitness(files[0])
    watch = Watch()
    marks: list[tuple[ReadCount, EngineCounters]] = []
    for full_sweeps in follow(engine, watch, names, deadline):
        if full_sweeps == WARM_UP_SWEEPS or full_sweeps == WARM_UP_SWEEPS + wanted:
            marks.append((witness.count(), engine.counters()))
        if len(marks) == 2:
            break
    for name in names:
        engine.cancel(name)
    for _ in follow(engine, watch, names, deadline + 60.0):
        pass
    if len(marks) < 2:
        raise TimeoutError(
            f"{count} sequences: only {len(watch.stamps)} sweeps carried all of them before time or tokens ended"
        )
    stamps = watch.stamps[WARM_UP_SWEEPS - 1 : WARM_UP_SWEEPS + wanted]
    seconds = [after - before for before, after in itertools.pairwise(stamps)]
    median = statistics.median(seconds)
    say(f"{count} sequences: {median:.4f} s a sweep, {count / median:.2f} tokens/s in all")
    (reads_before, before), (reads_after, after) = marks
    plan = engine.plan
    expected = plan.layer_bytes(Tier.DISK) if run.tier == "disk" else sum(place.nbytes for place in plan.layers)
    proof = prove(reads_before, reads_after, expected * wanted)
    return {
        "s_per_sweep": median,
        "best_s_per_sweep": min(seconds),
        "mean_s_per_sweep": statistics.fmean(seconds),
        "tokens_per_s": count / median,
        "samples": len(seconds),
        "seconds": [round(second, 5) for second in seconds],
        "label": proof.label,
        "proof": asdict(proof),
        "file_cache_share_before": share_before,
        "per_sweep": _per_sweep(before, after),
        "token_ids": watch.token_ids[names[0]],
    }


def follow(engine: Engine, watch: Watch, names: list[str], deadline: float) -> Iterator[int]:
    """Take events into `watch`; yields the number of full sweeps after each one; ends when all sequences have ended."""
    live = set(names)
    for batch in engine.events(poll_s=_POLL_S):
        now = time.perf_counter()
        brought = 0
        for event in batch.events:
            if isinstance(event, SequenceTokens):
                watch.token_ids.setdefault(event.sequence_id, []).extend(event.token_ids)
                brought += 1
            elif isinstance(event, SequenceFinished):
                watch.finished += 1
                live.discard(event.sequence_id)
                if event.reason is FinishReason.ERROR:
                    raise RuntimeError(f"the engine ended {event.sequence_id}: {event.error}")
        if brought == len(names):
            watch.stamps.append(now)
            yield len(watch.stamps)
        if watch.finished >= len(names) or time.monotonic() > deadline:
            return


def _most_tokens(run: LamellaSpec) -> int:
    spare = SPARE_TOKENS[torch.device(run.device).type]
    return WARM_UP_SWEEPS + max(run.sweeps, run.batched_sweeps) + spare


def _per_sweep(before: EngineCounters, after: EngineCounters) -> dict[str, float | None]:
    """What the counters rose by a sweep; None for one that this engine does not keep."""
    old, new = dataclasses.asdict(before), dataclasses.asdict(after)
    sweeps = max(1, after.sweeps - before.sweeps)
    return {name: (new[name] - old[name]) / sweeps if name in new else None for name in _MOVED} | {"sweeps": sweeps}


def _plan_report(plan: Plan) -> dict[str, Any]:
    """The plan in figures: bytes and layers a tier, slots, ring, cache, and what each budget is spent on."""
    return {
        "layers": {str(tier): sum(place.tier is tier for place in plan.layers) for tier in Tier},
        "bytes": {str(tier): plan.layer_bytes(tier) for tier in Tier},
        "order": "".join(str(place.tier)[0] for place in plan.layers),
        "head": {"tier": str(plan.head.tier), "nbytes": plan.head.nbytes, "num_blocks": plan.head.num_blocks},
        "embedding": str(plan.embedding),
        "device_slots": plan.device_slots,
        "slot_bytes": plan.slot_bytes,
        "ring_bytes": plan.ring_bytes,
        "kv_tokens": plan.kv_tokens,
        "kv_bytes": plan.kv_bytes,
        "sweep_tokens": plan.sweep_tokens,
        "workspace_bytes": plan.workspace_bytes,
        "vram": asdict(plan.vram) | {"used": plan.vram.used} if plan.vram else None,
        "ram": asdict(plan.ram) | {"used": plan.ram.used},
    }


def _memory(device: torch.device, plan: Plan) -> dict[str, int | None]:
    memory = {"peak_rss_bytes": peak_rss_bytes()}
    if device.type == "cuda":
        memory["pinned_bytes"] = plan.ram.used
        memory["vram_peak_allocated_bytes"] = torch.cuda.max_memory_allocated(device)
        memory["vram_peak_reserved_bytes"] = torch.cuda.max_memory_reserved(device)
    return memory


def _streamed_files(engine: Engine, run: LamellaSpec) -> list[Path]:
    layers = ShardStore(Path(run.store)).open(run.model).layers
    return [layers[place.layer].path for place in engine.plan.layers if place.tier is Tier.DISK]


def _shard_files(run: LamellaSpec) -> list[Path]:
    sharded = ShardStore(Path(run.store)).open(run.model)
    return sorted({shard.path for shard in (sharded.root, *sharded.layers)})
