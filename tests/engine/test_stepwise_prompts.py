"""Prompts longer than a sweep of families that are run step by step: in parts, or alone in a sweep, or refused."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lamella_engine import Engine, EngineOptions, Sampling, SequenceRequest, ShardStore
from lamella_engine.errors import SequenceError
from lamella_engine.state_pool import StatePool
from tests.engine.engine_driver import full_load_tokens, gather, generate, submit_ids
from tests.engine.test_samples import gather_samples

IN_PARTS = ["qwen3_5_text", "mamba2"]
AT_ONCE = ["recurrent_gemma", "mamba"]
LONG = [3 + 7 * index % 120 for index in range(150)]
PROMPTS = [[5, 9, 13], LONG, [7, 9], LONG[20:80]]
GREEDY = Sampling(max_tokens=8, ignore_eos=True)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(scope="module")
def store(tiny_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("store")
    for family in (*IN_PARTS, *AT_ONCE, "openai-gpt"):
        ShardStore(root).ensure(family, source=tiny_checkpoint(family))
    return root


@pytest.fixture(scope="module")
def options(store: Path) -> EngineOptions:
    return EngineOptions(
        store=store, device="cpu", max_sequences=5, sweep_tokens=16, kv_tokens=65536, offline=True, ram=0
    )


def run_together(engine: Engine) -> list[list[int]]:
    names = [str(index) for index in range(len(PROMPTS))]
    for name, prompt in zip(names, PROMPTS, strict=True):
        submit_ids(engine, name, prompt, GREEDY)
    outcomes = gather(engine, set(names))
    return [outcomes[name].token_ids for name in names]


def pool_of(engine: Engine) -> StatePool:
    assert isinstance(engine._cache, StatePool)
    return engine._cache


def smallest_pool(options: EngineOptions, family: str, prompt_tokens: int) -> int:
    """The cache tokens that a refusal asks for."""
    with Engine.open(family, dataclasses.replace(options, kv_tokens=16)) as engine:
        with pytest.raises(SequenceError, match="kv_tokens") as refusal:
            submit_ids(engine, "long", LONG[:prompt_tokens], GREEDY)
        found = re.search(r"kv_tokens to (\d+)", str(refusal.value))
    assert found is not None
    return int(found[1])


@pytest.mark.parametrize("family", [*IN_PARTS, *AT_ONCE])
def test_a_prompt_longer_than_a_sweep_equals_a_full_load(
    family: str, options: EngineOptions, tiny_checkpoint: Callable[[str], Path]
) -> None:
    source = tiny_checkpoint(family)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, attn_implementation="eager").eval()
    expected = [full_load_tokens(model, prompt, GREEDY.max_tokens) for prompt in PROMPTS]

    with Engine.open(family, options) as engine:
        alone = generate(engine, LONG, GREEDY)
        together = run_together(engine)

        assert alone.finished is not None
        assert alone.token_ids == expected[1]
        assert together == expected
        assert engine.model.reads_whole == (family in AT_ONCE)
        steps = 1 if family in AT_ONCE else -(-len(LONG) // 16)
        assert alone.finished.sweeps == steps + GREEDY.max_tokens - 1
        assert pool_of(engine).accounted_bytes == 0


def test_a_refused_prompt_is_read_with_the_cache_that_the_refusal_asks_for(options: EngineOptions) -> None:
    family = "recurrent_gemma"
    with Engine.open(family, options) as roomy:
        expected = generate(roomy, LONG, GREEDY).token_ids
    needed = smallest_pool(options, family, len(LONG))

    with Engine.open(family, dataclasses.replace(options, kv_tokens=needed)) as enough:
        tokens = generate(enough, LONG, GREEDY).token_ids

    assert tokens == expected


def test_a_refused_prompt_is_read_in_a_sweep_as_large_as_the_refusal_asks_for(options: EngineOptions) -> None:
    with (
        Engine.open("mamba", dataclasses.replace(options, kv_tokens=512)) as engine,
        pytest.raises(SequenceError, match=rf"sweep_tokens to {len(LONG) + 4}\."),
    ):
        submit_ids(engine, "long", LONG, GREEDY)

    with Engine.open("mamba", dataclasses.replace(options, kv_tokens=512, sweep_tokens=len(LONG) + 4)) as engine:
        assert len(generate(engine, LONG, GREEDY).token_ids) == GREEDY.max_tokens


def test_who_reads_alone_waits_for_memory_that_others_hold_and_is_not_overtaken(options: EngineOptions) -> None:
    with Engine.open("recurrent_gemma", options) as roomy:
        expected = run_together(roomy)
    needed = smallest_pool(options, "recurrent_gemma", len(LONG))

    with Engine.open("recurrent_gemma", dataclasses.replace(options, kv_tokens=needed)) as tight:
        together = run_together(tight)

        assert together == expected
        assert pool_of(tight).accounted_bytes == 0


def test_a_long_prompt_with_tokens_of_an_earlier_life_needs_no_more_room_to_be_read(options: EngineOptions) -> None:
    needed = smallest_pool(options, "recurrent_gemma", len(LONG))
    more = dataclasses.replace(GREEDY, max_tokens=60)
    with Engine.open("recurrent_gemma", options) as roomy:
        whole = generate(roomy, LONG, more).token_ids

    with Engine.open("recurrent_gemma", dataclasses.replace(options, kv_tokens=needed)) as tight:
        tight.submit(SequenceRequest("again", more, prompt_ids=tuple(LONG), generated_ids=tuple(whole[:50])))
        rest = gather(tight, {"again"})["again"]

    assert rest.token_ids == whole[50:]


def test_samples_of_a_prompt_that_is_read_alone_start_from_it(options: EngineOptions) -> None:
    sampling = dataclasses.replace(GREEDY, temperature=1.1, seed=7)
    with Engine.open("recurrent_gemma", options) as engine:
        engine.submit(SequenceRequest("many", sampling, prompt_ids=tuple(LONG), num_samples=3))
        submit_ids(engine, "other", PROMPTS[0], GREEDY)
        samples = gather_samples(engine, {"many": 3, "other": 1})["many"]
        first = generate(engine, LONG, sampling)

    assert samples[0].token_ids == first.token_ids
    assert len({tuple(sample.token_ids) for sample in samples}) == 3


def test_prompts_that_must_stay_whole_wait_for_each_other(options: EngineOptions) -> None:
    with Engine.open("recurrent_gemma", dataclasses.replace(options, sweep_tokens=512)) as roomy:
        expected = run_together(roomy)

    with Engine.open("recurrent_gemma", dataclasses.replace(options, sweep_tokens=21)) as narrow:
        assert run_together(narrow) == expected


def test_a_family_that_keeps_nothing_is_told_to_raise_the_sweep_only(options: EngineOptions) -> None:
    with (
        Engine.open("openai-gpt", options) as engine,
        pytest.raises(SequenceError, match=r"12 at most.*option: sweep_tokens to 24\.") as refusal,
    ):
        submit_ids(engine, "long", LONG[:20], GREEDY)

    assert refusal.value.code == "prompt_too_long"
