"""On a machine with a metered disk and bus: planned tiers move exactly their bytes, overlap, and change no token."""

from __future__ import annotations

import dataclasses
import gc
import json
from pathlib import Path

import pytest
import torch

from benchmarks.slow_machine import MACHINES, OldMachine, slow_machine
from lamella_engine import Engine, EngineOptions, Sampling, ShardStore, architecture
from lamella_engine.model_sizes import sizes_of_sharded
from lamella_engine.open_model import open_sweep_model
from lamella_engine.placement import Tier
from lamella_engine.planner import make_plan
from lamella_engine.shard import ShardedModel
from tests import tiny_models
from tests.engine.engine_driver import gather, generate, submit_ids

SHAPE: dict[str, object] = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
SCALE = 2.5  # how much slower than the real machine: the model is that much smaller, and more
SATA = MACHINES[0]
RING = 8 * 2**20
PROMPTS = [[5, 9, 13], list(range(40, 90)), [7], list(range(100, 117))]
GREEDY = Sampling(max_tokens=8, ignore_eos=True)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> ShardedModel:
    root = tmp_path_factory.mktemp("metered")
    source = tiny_models.save_checkpoint(root / "source", "llama", SHAPE, std=0.05)
    return ShardStore(root / "store").ensure("metered", source=source)


@pytest.fixture(scope="module")
def expected(sharded: ShardedModel) -> list[list[int]]:
    options = EngineOptions(store=sharded.directory, device="cpu")
    with Engine.open_sharded(sharded, torch.device("cpu"), options) as engine:
        return [generate(engine, prompt, GREEDY).token_ids for prompt in PROMPTS]


def open_on(old: OldMachine, sharded: ShardedModel, tiers: str, *, trace: bool = False) -> Engine:
    """An engine whose layers are in the tiers that the letters of `tiers` name, round and round."""
    letters = {"v": Tier.VRAM, "r": Tier.RAM, "d": Tier.DISK}
    options = EngineOptions(store=sharded.directory, max_sequences=8, sweep_tokens=64, kv_tokens=1024, trace=trace)
    built = architecture.build(architecture.load_config(sharded.directory), torch.float32)
    machine = slow_machine(old, SCALE, vram=2**30, ram=2**30)
    plan = make_plan(sizes_of_sharded(sharded, built), machine.request(options))
    layers = tuple(dataclasses.replace(place, tier=letters[tiers[place.layer % len(tiers)]]) for place in plan.layers)
    streams = {"r", "d"} & set(tiers)
    plan = dataclasses.replace(
        plan,
        layers=layers,
        embedding=Tier.DISK,
        device_slots=2 if streams else 0,
        slot_bytes=sharded.layers[0].nbytes if streams else 0,
        ring_bytes=RING if "d" in tiers else 0,
    )
    return Engine(open_sweep_model(sharded, options, torch.device("cpu"), machine, plan), None, options)


def batch(engine: Engine, sampling: Sampling = GREEDY) -> list[list[int]]:
    names = {f"{index}-{id(sampling)}": prompt for index, prompt in enumerate(PROMPTS)}
    for name, prompt in names.items():
        submit_ids(engine, name, prompt, sampling)
    outcomes = gather(engine, set(names))
    return [outcomes[name].token_ids for name in names]


@pytest.mark.parametrize("tiers", ["d", "vdd", "vrd", "r", "v"])
def test_tokens_do_not_depend_on_where_the_weights_are(
    tiers: str, sharded: ShardedModel, expected: list[list[int]]
) -> None:
    with open_on(SATA, sharded, tiers) as engine:
        alone = [generate(engine, prompt, GREEDY).token_ids for prompt in PROMPTS]

        assert alone == expected
        assert batch(engine) == expected


def test_a_sweep_moves_exactly_the_bytes_of_its_tiers(sharded: ShardedModel) -> None:
    layer = sharded.layers[0].nbytes

    with open_on(SATA, sharded, "vrd") as engine:
        before = engine.counters()
        generate(engine, [5, 9, 13], Sampling(max_tokens=5, ignore_eos=True))
        after = engine.counters()

    sweeps = 5
    embedding_rows = (3 + 4) * 256 * 4
    assert after.disk_bytes - before.disk_bytes == sweeps * 4 * layer + embedding_rows
    assert after.ram_bytes - before.ram_bytes == sweeps * 4 * layer
    assert after.vram_bytes - before.vram_bytes == sweeps * 4 * layer


def test_a_trace_shows_reads_copies_and_computing_side_by_side(sharded: ShardedModel, tmp_path: Path) -> None:
    with open_on(SATA, sharded, "vrd", trace=True) as engine:
        generate(engine, [5, 9], Sampling(max_tokens=4, ignore_eos=True))
        engine.write_trace(tmp_path / "trace.json")

    events = json.loads((tmp_path / "trace.json").read_text())
    spans = [event for event in events if event["ph"] == "X"]
    names = {event["tid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    lanes = {names[event["tid"]] for event in spans}
    assert {"read", "copy", "compute", "sweep"} <= lanes
    reads = [event for event in spans if names[event["tid"]] == "read"]
    computes = [event for event in spans if names[event["tid"]] == "compute"]
    assert any(_overlap(read, compute) for read in reads for compute in computes)


def _overlap(left: dict[str, float], right: dict[str, float]) -> bool:
    return left["ts"] < right["ts"] + right["dur"] and right["ts"] < left["ts"] + left["dur"]


def held_bytes() -> dict[int, int]:
    """Bytes by address of all memory that tensors hold."""
    tensors = [found for found in gc.get_objects() if type(found) in (torch.Tensor, torch.nn.Parameter)]
    dense = [tensor for tensor in tensors if tensor.layout is torch.strided and tensor.device.type == "cpu"]
    storages = [tensor.untyped_storage() for tensor in dense]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


@pytest.mark.parametrize("tiers", ["vrd", "v", "on a CPU"])
def test_a_closed_engine_holds_no_memory_though_somebody_holds_it(tiers: str, sharded: ShardedModel) -> None:
    gc.collect()
    before = held_bytes()
    options = EngineOptions(store=sharded.directory, ram="80MiB", kv_tokens=256)
    cpu = torch.device("cpu")
    engine = Engine.open_sharded(sharded, cpu, options) if "CPU" in tiers else open_on(SATA, sharded, tiers)
    batch(engine)
    while_open = sum(held_bytes().values())

    engine.close()

    left = {address: nbytes for address, nbytes in held_bytes().items() if address not in before}
    assert while_open - sum(before.values()) > sharded.layers[0].nbytes
    assert sum(left.values()) < 64 * 1024
