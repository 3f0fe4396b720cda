"""Layers that come without their experts: only those a token is routed to are moved, and no token changes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.slow_machine import MACHINES, slow_machine
from lamella_engine import Engine, EngineOptions, Sampling, ShardStore, architecture
from lamella_engine.expert_share import visited_share
from lamella_engine.experts import ExpertBytes, find_experts
from lamella_engine.model_sizes import sizes_of_sharded
from lamella_engine.open_model import open_sweep_model
from lamella_engine.placement import Tier
from lamella_engine.planner import make_plan
from lamella_engine.shard import ShardedModel
from tests import tiny_models
from tests.engine.engine_driver import full_load_tokens, gather, generate, submit_ids

CPU = torch.device("cpu")
FAST = 0.001
# Sixteen experts of which a token visits two; large enough that a layer is read in several chunks.
MANY = {"num_experts": 16, "num_local_experts": 16, "n_routed_experts": 16, "num_experts_per_tok": 2,
        "hidden_size": 256, "moe_intermediate_size": 512, "intermediate_size": 512}  # fmt: skip
FAMILIES = ["qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss"]
PROMPTS = [[5, 9, 13], list(range(40, 90)), [7]]
GREEDY = Sampling(max_tokens=8, ignore_eos=True)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[ShardedModel, list[list[int]]]]:
    """Shards of a family with many experts, and the tokens of its full load."""
    made: dict[str, tuple[ShardedModel, list[list[int]]]] = {}

    def make(family: str) -> tuple[ShardedModel, list[list[int]]]:
        if family not in made:
            root = tmp_path_factory.mktemp(family)
            config = {**tiny_models.FAMILIES[family], **MANY}
            source = tiny_models.save_checkpoint(root / "source", family, config)
            model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, attn_implementation="eager")
            expected = [full_load_tokens(model.eval(), prompt, 8) for prompt in PROMPTS]
            made[family] = ShardStore(root / "store").ensure("tiny", source=source), expected
        return made[family]

    return make


def open_on(sharded: ShardedModel, tiers: str) -> Engine:
    """With the layers on disk of a CPU, or on a device's disk ("d"; "D" in large blocks), in RAM ("r"), on it ("v")."""
    options = EngineOptions(
        store=sharded.directory, device="cpu", max_sequences=4, sweep_tokens=32, kv_tokens=512, ram=0
    )
    if tiers == "cpu":
        return Engine.open_sharded(sharded, CPU, options)
    letters = {"v": Tier.VRAM, "r": Tier.RAM, "d": Tier.DISK, "D": Tier.DISK}
    built = architecture.build(architecture.load_config(sharded.directory), torch.float32)
    machine = slow_machine(MACHINES[0], FAST, vram=2**30, ram=2**30)
    plan = make_plan(sizes_of_sharded(sharded, built), machine.request(options))
    layers = tuple(dataclasses.replace(place, tier=letters[tiers[place.layer % len(tiers)]]) for place in plan.layers)
    nbytes = max(shard.nbytes for shard in sharded.layers)
    block_bytes, ring_bytes = (4 * nbytes, 64 * nbytes) if "D" in tiers else (256 * 1024, 8 * 2**20)
    machine = dataclasses.replace(machine, style=dataclasses.replace(machine.style, block_bytes=block_bytes))
    plan = dataclasses.replace(plan, layers=layers, device_slots=2, slot_bytes=nbytes, ring_bytes=ring_bytes)
    return Engine(open_sweep_model(sharded, options, CPU, machine, plan), None, options)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tiers", ["cpu", "d", "D", "r", "vrd"])
def test_tokens_are_those_of_a_full_load(
    family: str, tiers: str, models: Callable[[str], tuple[ShardedModel, list[list[int]]]]
) -> None:
    sharded, expected = models(family)

    with open_on(sharded, tiers) as engine:
        alone = [generate(engine, prompt, GREEDY).token_ids for prompt in PROMPTS]
        for name, prompt in enumerate(PROMPTS):
            submit_ids(engine, str(name), prompt, GREEDY)
        outcomes = gather(engine, {str(name) for name in range(len(PROMPTS))})

    assert alone == expected
    assert [outcomes[str(name)].token_ids for name in range(len(PROMPTS))] == expected


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tiers", ["cpu", "d", "D", "r"])
def test_a_token_alone_moves_its_own_experts_and_what_is_dense(
    family: str, tiers: str, models: Callable[[str], tuple[ShardedModel, list[list[int]]]]
) -> None:
    sharded, _ = models(family)

    with open_on(sharded, tiers) as engine:
        check_bytes_of_one_token(engine, "ram" if tiers == "r" else "disk")


def check_bytes_of_one_token(engine: Engine, place: str) -> None:
    """With its layers at `place` ("ram", "disk") and sixteen experts in each, a token moves the two it visits.

    A head that streams is moved as well.
    """
    sharded = engine.model.sharded
    built = architecture.build(architecture.load_config(sharded.directory), torch.float32)
    experts = [find_experts(layer, shard.tensors, 2) for layer, shard in zip(built.layers, sharded.layers, strict=True)]
    routed = sum(
        shard.nbytes - (0 if own is None else own.nbytes - 2 * own.expert_bytes)
        for shard, own in zip(sharded.layers, experts, strict=True)
    )

    submit_ids(engine, "one", [5], Sampling(max_tokens=10, ignore_eos=True))
    gather(engine, {"one"})
    before = engine.counters()
    submit_ids(engine, "two", [5], Sampling(max_tokens=10, ignore_eos=True))
    gather(engine, {"two"})
    after = engine.counters()

    moved = after.ram_bytes - before.ram_bytes if place == "ram" else after.disk_bytes - before.disk_bytes
    moved -= 10 * engine.plan.head.nbytes if engine.plan.head.num_blocks else 0
    rows = 10 * 256 * 4
    assert sum(shard.nbytes for shard in sharded.layers) > 2 * routed
    assert 10 * routed <= moved <= 10 * routed + rows


def test_ranges_join_neighbours_and_leave_out_nothing() -> None:
    experts = ExpertBytes("mlp.experts", 4, 2, ((64, 10), (200, 5)))

    assert experts.ranges([2, 1]) == [(74, 20), (205, 10)]
    assert experts.others(300) == [(0, 64), (104, 96), (220, 80)]
    assert experts.expert_bytes == 15
    covered = sorted(experts.ranges(range(4)) + experts.others(300))
    assert [start for start, _ in covered] == [0, *(start + nbytes for start, nbytes in covered[:-1])]
    assert sum(nbytes for _, nbytes in covered) == 300


def test_few_tokens_visit_few_experts() -> None:
    experts = ExpertBytes("mlp.experts", 8, 2, ((0, 1),))

    assert visited_share(8, 2, 1) == pytest.approx(0.25)
    assert experts.is_sparse(1)
    assert experts.is_sparse(3)
    assert not experts.is_sparse(4)
