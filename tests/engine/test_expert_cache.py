"""Experts kept between sweeps: those visited most, byte for byte, within the budgets, and no token changes."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from benchmarks.slow_machine import MACHINES, slow_machine
from lamella_engine import Engine, EngineOptions, Sampling, ShardStore, architecture
from lamella_engine.errors import OptionError
from lamella_engine.estimate import predict
from lamella_engine.expert_cache import ExpertCache
from lamella_engine.experts import ExpertBytes
from lamella_engine.model_sizes import sizes_of_sharded
from lamella_engine.open_model import open_sweep_model
from lamella_engine.placement import ExpertRoom, Tier
from lamella_engine.planner import PlanRequest, make_plan
from lamella_engine.shard import ShardedModel
from lamella_engine.sweep_profile import SweepProfile, profile_table
from tests import tiny_models
from tests.engine.engine_driver import full_load_tokens, gather, generate, submit_ids
from tests.engine.model_shapes import CARD, GIB, MIXTRAL
from tests.engine.model_shapes import CPU as CPU_LANES
from tests.engine.test_experts import FAST, MANY, PROMPTS

# Two tensors of eight experts in a layer of 1000 bytes.
OWN = ExpertBytes("mlp.experts", 8, 2, ((100, 30), (500, 20)))
CPU = torch.device("cpu")
GREEDY = Sampling(max_tokens=8, ignore_eos=True)


def layer() -> torch.Tensor:
    return torch.randint(0, 256, (1000,), dtype=torch.uint8)


def cache_of(entries: int, pieces: int = 1) -> ExpertCache:
    def copy(target: torch.Tensor, source: torch.Tensor) -> None:
        target.copy_(source)

    memory = torch.zeros(entries * 50 + 49, dtype=torch.uint8)
    return ExpertCache(memory, 50, [(number, 8) for number in range(pieces)], copy, copy)


def visit(cache: ExpertCache, number: int, experts: list[int], whole: torch.Tensor) -> list[int]:
    """What a sweep does at a layer; returns what was not kept."""
    slot = torch.zeros_like(whole)
    missing = cache.bring(number, OWN, experts, slot)
    for start, nbytes in OWN.ranges(missing):
        slot[start : start + nbytes] = whole[start : start + nbytes]
    cache.keep(number, OWN, missing, slot)
    for start, nbytes in OWN.ranges(experts):
        assert torch.equal(slot[start : start + nbytes], whole[start : start + nbytes])
    return missing


def test_what_was_brought_once_is_kept_while_there_is_room() -> None:
    cache, whole = cache_of(3), layer()

    assert visit(cache, 0, [1, 5], whole) == [1, 5]
    assert visit(cache, 0, [1, 5], whole) == []
    assert visit(cache, 0, [5, 7], whole) == [7]
    assert visit(cache, 0, [1, 5, 7], whole) == []


def test_going_round_more_experts_than_there_is_room_for_keeps_some_of_them() -> None:
    cache, whole = cache_of(4), layer()
    for expert in range(8):
        visit(cache, 0, [expert], whole)

    missed = [len(visit(cache, 0, [expert], whole)) for expert in range(8)]

    assert sum(missed) == 4


def test_the_experts_visited_most_are_the_ones_kept() -> None:
    cache, whole, draw = cache_of(4), layer(), random.Random(0)
    for _ in range(400):
        visit(cache, 0, [3 if draw.random() < 0.5 else draw.choice([0, 1, 2, 4, 5, 6, 7])], whole)

    assert visit(cache, 0, [3], whole) == []


def test_what_is_no_longer_visited_gives_way() -> None:
    cache, whole = cache_of(2), layer()
    for _ in range(1000):
        visit(cache, 0, [0, 1], whole)

    for _ in range(2000):
        missing = visit(cache, 0, [6, 7], whole)

    assert missing == []


def test_layers_share_the_room_and_are_told_apart() -> None:
    cache, first, second = cache_of(2, pieces=2), layer(), layer()
    visit(cache, 0, [4], first)
    visit(cache, 1, [4], second)

    assert visit(cache, 0, [4], first) == visit(cache, 1, [4], second) == []


def test_no_room_keeps_nothing() -> None:
    cache, whole = cache_of(0), layer()

    assert len(cache) == 0
    assert visit(cache, 0, [1], whole) == visit(cache, 0, [1], whole) == [1]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[ShardedModel, list[list[int]]]:
    root = tmp_path_factory.mktemp("mixtral")
    source = tiny_models.save_checkpoint(root / "source", "mixtral", {**tiny_models.FAMILIES["mixtral"], **MANY})
    whole = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, attn_implementation="eager").eval()
    expected = [full_load_tokens(whole, prompt, 8) for prompt in PROMPTS]
    return ShardStore(root / "store").ensure("tiny", source=source), expected


@pytest.mark.parametrize(
    ("home", "in_vram", "in_ram"),
    [(Tier.DISK, 0, 9), (Tier.DISK, 7, 0), (Tier.DISK, 5, 9), (Tier.RAM, 9, 0), (Tier.DISK, 64, 64), ("cpu", 0, 9)],
)
def test_tokens_are_those_of_a_full_load_and_fewer_bytes_are_moved(
    home: Tier | str, in_vram: int, in_ram: int, model: tuple[ShardedModel, list[list[int]]]
) -> None:
    sharded, expected = model
    kept, bare = (open_with(home, sharded, *entries) for entries in ((in_vram, in_ram), (0, 0)))
    with kept, bare:
        moved = []
        for engine in (kept, bare):
            for prompt in PROMPTS:
                generate(engine, prompt, GREEDY)
            before = engine.counters()
            assert [generate(engine, prompt, GREEDY).token_ids for prompt in PROMPTS] == expected
            after = engine.counters()
            far = (before.disk_bytes, after.disk_bytes) if home != Tier.RAM else (before.ram_bytes, after.ram_bytes)
            moved.append(far[1] - far[0])
            visited = after.experts_visited - before.experts_visited
            hits = after.experts_in_vram - before.experts_in_vram, after.experts_in_ram - before.experts_in_ram
            assert visited > 0
            assert (hits[0] > 0) == (engine is kept and in_vram > 0)
            assert (hits[1] > 0) == (engine is kept and in_ram > in_vram)
            profile = SweepProfile.between(before, after)
            assert profile.experts_kept * profile.sweeps == pytest.approx(sum(hits))
            console = Console(record=True, width=160)
            console.print(profile_table([(1, profile)], "A sweep"))
            assert f"({sum(hits) / visited:.0%})" in console.export_text()
        for name, prompt in enumerate(PROMPTS):
            submit_ids(kept, str(name), prompt, GREEDY)
        outcomes = gather(kept, {str(name) for name in range(len(PROMPTS))})

    assert [outcomes[str(name)].token_ids for name in range(len(PROMPTS))] == expected
    assert moved[0] < 0.95 * moved[1]


def open_with(home: Tier | str, sharded: ShardedModel, in_vram: int, in_ram: int) -> Engine:
    """All layers at `home`, with room for some experts nearer."""
    options = EngineOptions(
        store=sharded.directory, device="cpu", max_sequences=4, sweep_tokens=32, kv_tokens=512, ram=0
    )
    built = architecture.build(architecture.load_config(sharded.directory), torch.float32)
    sizes = sizes_of_sharded(sharded, built)
    assert sizes.experts is not None
    entry = max(sizes.experts.layers) // sizes.experts.count
    room = ExpertRoom(entry, in_vram * entry, in_ram * entry)
    if home == "cpu":
        plan = dataclasses.replace(make_plan(sizes, PlanRequest("cpu", None, 0, CPU_LANES)), experts=room)
        return Engine(open_sweep_model(sharded, options, CPU, None, plan), None, options)
    machine = slow_machine(MACHINES[0], FAST, vram=2**30, ram=2**30)
    plan = make_plan(sizes, machine.request(options))
    layers = tuple(dataclasses.replace(place, tier=Tier(home)) for place in plan.layers)
    nbytes = max(shard.nbytes for shard in sharded.layers)
    plan = dataclasses.replace(
        plan, layers=layers, device_slots=2, slot_bytes=nbytes, ring_bytes=8 * 2**20, experts=room
    )
    return Engine(open_sweep_model(sharded, options, CPU, machine, plan), None, options)


@pytest.mark.parametrize(("vram", "ram"), [(10 * GIB, 0), (10 * GIB, 40 * GIB), (None, 40 * GIB)])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_experts_get_what_layers_leave_over_and_what_is_set_aside(vram: int | None, ram: int, share: float) -> None:
    lanes = CPU_LANES if vram is None else CARD
    request = PlanRequest("cpu" if vram is None else "cuda:0", vram, ram, lanes, expert_share=share)
    none = make_plan(MIXTRAL, dataclasses.replace(request, expert_share=0.0))

    plan = make_plan(MIXTRAL, request)

    layer = MIXTRAL.layers[0]
    for spending in (plan.vram, plan.ram):
        assert spending is None or spending.used <= spending.budget
        assert spending is None or ram == 0 or spending.budget - spending.used < layer // 8
    if ram:
        kept = plan.experts.ram_bytes
        assert kept % plan.experts.entry_bytes == 0
        assert share == 0.0 or kept > 10 * GIB
        assert share < 1.0 or all(place.tier is not Tier.RAM for place in plan.layers)
        assert predict(MIXTRAL, plan, lanes, 1).lanes.disk < 1.1 * predict(MIXTRAL, none, lanes, 1).lanes.disk


def test_a_model_that_stays_whole_keeps_no_experts_beside() -> None:
    plan = make_plan(MIXTRAL, PlanRequest("cuda:0", 200 * GIB, 0, CARD))

    assert plan.experts == ExpertRoom()


@pytest.mark.parametrize("share", ["half", "120%", "-1%", "5GiB", ""])
def test_what_is_no_share_is_refused(share: str) -> None:
    with pytest.raises(OptionError, match=r'expert_cache is .* Use "25%" or "auto"'):
        EngineOptions(store=Path("store"), expert_cache=share)
