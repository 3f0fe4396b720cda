"""Engines of families that are run step by step: in company, short of memory, interrupted, and through every tier."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from lamella_engine import Engine, EngineOptions, Sampling, SequenceRequest, ShardStore, architecture
from lamella_engine.placement import Tier
from lamella_engine.sequence_state import SequenceState, StateForward
from lamella_engine.state_pool import StatePool, unit_bytes
from tests.engine.engine_driver import gather, generate, submit_ids
from tests.engine.test_samples import gather_samples
from tests.engine.test_streamed_head import open_streaming
from tests.waiting import wait_until

PROMPTS = [[5, 9, 13], list(range(40, 70)), [7], list(range(100, 117)), [3, 3, 3, 3]]
GREEDY = Sampling(max_tokens=12, ignore_eos=True)
LONG = Sampling(max_tokens=80, ignore_eos=True)
RANDOM = Sampling(max_tokens=12, ignore_eos=True, temperature=1.1, seed=7)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(scope="module")
def store(tiny_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("store")
    for family in ("qwen3_5_text", "recurrent_gemma", "falcon"):
        ShardStore(root).ensure(family, source=tiny_checkpoint(family))
    return root


@pytest.fixture(scope="module")
def options(store: Path) -> EngineOptions:
    return EngineOptions(
        store=store, device="cpu", max_sequences=5, sweep_tokens=64, kv_tokens=4096, offline=True, ram=0
    )


@pytest.fixture(scope="module")
def engine(options: EngineOptions) -> Iterator[Engine]:
    with Engine.open("qwen3_5_text", options) as engine:
        yield engine


def pages_in_use(engine: Engine) -> int:
    pool = engine._cache
    assert isinstance(pool, StatePool)
    return pool.accounted_bytes


def run_together(engine: Engine, sampling: Sampling) -> list[list[int]]:
    names = [str(index) for index in range(len(PROMPTS))]
    for name, prompt in zip(names, PROMPTS, strict=True):
        submit_ids(engine, name, prompt, sampling)
    outcomes = gather(engine, set(names))
    return [outcomes[name].token_ids for name in names]


def test_all_sequences_share_a_sweep_that_reads_each_layer_once(engine: Engine) -> None:
    alone = [generate(engine, prompt, GREEDY).token_ids for prompt in PROMPTS]
    before = engine.counters()

    together = run_together(engine, GREEDY)

    after = engine.counters()
    layers = sum(shard.nbytes for shard in engine.model.sharded.layers)
    assert together == alone
    assert after.sweeps - before.sweeps <= GREEDY.max_tokens + 2
    assert layers <= (after.streamed_bytes - before.streamed_bytes) / (after.sweeps - before.sweeps) < 1.2 * layers
    assert pages_in_use(engine) == 0


@pytest.mark.parametrize("family", ["qwen3_5_text", "recurrent_gemma", "falcon"])
def test_preempted_sequences_give_the_tokens_of_those_that_ran_alone(family: str, options: EngineOptions) -> None:
    with Engine.open(family, options) as engine:
        expected = [generate(engine, prompt, LONG).token_ids for prompt in PROMPTS]
        to_begin = sum(engine._cache.pages_for(len(prompt)) for prompt in PROMPTS) + len(PROMPTS)

    with Engine.open(family, dataclasses.replace(options, kv_tokens=16 * to_begin)) as engine:
        together = run_together(engine, LONG)

        assert together == expected
        assert pages_in_use(engine) == 0
        assert engine.counters().preemptions > 0


def test_samples_are_what_sequences_of_their_own_would_be(engine: Engine) -> None:
    engine.submit(SequenceRequest("many", RANDOM, prompt_ids=tuple(PROMPTS[3]), num_samples=3))
    samples = gather_samples(engine, {"many": 3})["many"]
    first = generate(engine, PROMPTS[3], RANDOM)

    assert samples[0].token_ids == first.token_ids
    assert len({tuple(sample.token_ids) for sample in samples}) == 3
    assert pages_in_use(engine) == 0


def test_samples_that_find_no_room_for_a_copy_wait_and_read_the_prompt_themselves(
    engine: Engine, options: EngineOptions
) -> None:
    engine.submit(SequenceRequest("many", RANDOM, prompt_ids=tuple(PROMPTS[3]), num_samples=3))
    expected = [outcome.token_ids for outcome in gather_samples(engine, {"many": 3})["many"]]
    size = engine.model._state_size
    assert size is not None
    unit = engine.model.plan.kv_bytes // engine.model.plan.kv_tokens
    for_one = (size.sequence_bytes + 40 * size.token_bytes) // unit + 16

    with Engine.open("qwen3_5_text", dataclasses.replace(options, kv_tokens=for_one)) as tight:
        tight.submit(SequenceRequest("many", RANDOM, prompt_ids=tuple(PROMPTS[3]), num_samples=3))
        samples = gather_samples(tight, {"many": 3})["many"]

        assert [sample.token_ids for sample in samples] == expected
        assert pages_in_use(tight) == 0


def test_a_sequence_goes_on_from_tokens_of_an_earlier_life(engine: Engine) -> None:
    whole = generate(engine, PROMPTS[1], GREEDY).token_ids

    engine.submit(SequenceRequest("again", GREEDY, prompt_ids=tuple(PROMPTS[1]), generated_ids=tuple(whole[:5])))
    rest = gather(engine, {"again"})["again"]

    assert rest.token_ids == whole[5:]


def test_cancel_frees_the_state_and_leaves_the_others_alone(engine: Engine) -> None:
    expected = generate(engine, PROMPTS[0], GREEDY).token_ids
    submit_ids(engine, "long", PROMPTS[1], Sampling(max_tokens=200, ignore_eos=True))
    submit_ids(engine, "short", PROMPTS[0], GREEDY)

    outcomes = gather(engine, {"short"})
    engine.cancel("long")
    gather(engine, {"long"})

    assert outcomes["short"].token_ids == expected
    wait_until(lambda: pages_in_use(engine) == 0, 40)


def test_a_failed_sweep_ends_its_sequences_and_the_next_one_works(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    sharded = ShardStore(tmp_path).ensure("tiny", source=tiny_checkpoint("recurrent_gemma"))
    path = sharded.layers[2].path
    whole, status = path.read_bytes(), path.stat()

    with Engine.open("tiny", EngineOptions(store=tmp_path, device="cpu", sweep_tokens=64, ram=0)) as engine:
        expected = generate(engine, PROMPTS[1], GREEDY).token_ids
        submit_ids(engine, "a", PROMPTS[0], Sampling(max_tokens=200, ignore_eos=True))
        submit_ids(engine, "b", PROMPTS[1], Sampling(max_tokens=200, ignore_eos=True))
        os.truncate(path, 4096)
        failed = gather(engine, {"a", "b"})
        with path.open("r+b") as file:
            file.write(whole)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # as if the disk had failed for a moment
        after = generate(engine, PROMPTS[1], GREEDY)

        assert {outcome.finished.error_code for outcome in failed.values() if outcome.finished} == {"engine"}
        assert after.token_ids == expected
        assert pages_in_use(engine) == 0


@pytest.mark.parametrize("tiers", ["v", "r", "d", "vrd"])
@pytest.mark.parametrize("head", [None, (Tier.DISK, 3)])
def test_every_tier_and_a_head_in_blocks_give_the_same_tokens(
    tiers: str, head: tuple[Tier, int] | None, engine: Engine, store: Path
) -> None:
    expected = run_together(engine, GREEDY)

    with open_streaming(ShardStore(store).ensure("qwen3_5_text", offline=True), tiers, head, Tier.DISK) as streaming:
        assert run_together(streaming, GREEDY) == expected


@pytest.mark.parametrize("family", ["qwen3_5_text", "falcon", "mamba", "rwkv", "llama4_text"])
def test_a_state_takes_no_more_than_its_pages_account_for(
    family: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    source = tiny_checkpoint(family)
    built = architecture.build(architecture.load_config(source), torch.float32)
    assert built.state_size is not None
    unit = unit_bytes(built.state_size, 256)
    pool = StatePool(4096, built.state_size, unit)
    model = type(built.model).from_pretrained(source, dtype=torch.float32)
    forward = StateForward(model, torch.device("cpu"))
    state = SequenceState()

    with torch.inference_mode():
        for count in (40, 1, 1, 1):
            forward(state, [7] * count)
            pages = pool.pages_for(len(state.token_ids))
            assert 0 < state.nbytes <= pages * 16 * unit
        twin = state.copy()
        apart = forward(state, [9]), forward(twin, [9])

    assert twin.nbytes == state.nbytes
    assert torch.equal(*apart)
