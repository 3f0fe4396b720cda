"""A sequence that makes room for an older one goes on as if nothing had happened, in any company."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

from lamella_engine import Engine, EngineOptions, Sampling, SequencePrefill, SequenceTokens, ShardStore
from tests.engine.engine_driver import Outcome, gather, generate, submit_ids

PROMPTS = [[5, 9, 13], list(range(40, 90)), [7], list(range(100, 117)), [3, 3, 3, 3], list(range(20, 33))]
GREEDY = Sampling(max_tokens=48, ignore_eos=True, repetition_penalty=1.1)
RANDOM = Sampling(max_tokens=48, ignore_eos=True, temperature=1.1, top_p=0.95, seed=7, presence_penalty=0.3)


@pytest.fixture(scope="module")
def options(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> EngineOptions:
    root = tmp_path_factory.mktemp("store")
    ShardStore(root).ensure("tiny", source=tiny_llama_dir)
    return EngineOptions(store=root, device="cpu", max_sequences=6, sweep_tokens=16, kv_tokens=4096, offline=True)


@pytest.fixture(scope="module")
def roomy(options: EngineOptions) -> Iterator[Engine]:
    with Engine.open("tiny", options) as engine:
        yield engine


@pytest.fixture(scope="module")
def short(options: EngineOptions) -> Iterator[Engine]:
    """Keys and values of little more than one of the sequences."""
    with Engine.open("tiny", dataclasses.replace(options, kv_tokens=112)) as engine:
        yield engine


def run_together(engine: Engine, samplings: list[Sampling]) -> list[Outcome]:
    names = [str(index) for index in range(len(PROMPTS))]
    for name, prompt, sampling in zip(names, PROMPTS, samplings, strict=True):
        submit_ids(engine, name, prompt, sampling)
    outcomes = gather(engine, set(names))
    return [outcomes[name] for name in names]


@pytest.mark.parametrize("kind", ["greedy", "random", "mixed"])
def test_preempted_sequences_give_the_tokens_and_text_of_those_that_ran_alone(
    roomy: Engine, short: Engine, kind: str
) -> None:
    pairs = {"greedy": [GREEDY, GREEDY], "random": [RANDOM, RANDOM], "mixed": [GREEDY, RANDOM]}[kind]
    samplings = [dataclasses.replace(pairs[i % 2], max_tokens=48 - 3 * i) for i in range(len(PROMPTS))]
    expected = [generate(roomy, prompt, sampling) for prompt, sampling in zip(PROMPTS, samplings, strict=True)]
    before = short.counters()

    outcomes = run_together(short, samplings)

    after = short.counters()
    assert after.preemptions > before.preemptions
    assert after.tokens - before.tokens == sum(len(outcome.token_ids) for outcome in expected)
    assert [outcome.token_ids for outcome in outcomes] == [outcome.token_ids for outcome in expected]
    assert [outcome.text for outcome in outcomes] == [outcome.text for outcome in expected]
    assert (after.running, after.waiting) == (0, 0)
    assert short._cache.free_tokens == short._cache.capacity_tokens


def test_a_roomy_cache_preempts_nobody(roomy: Engine) -> None:
    before = roomy.counters().preemptions

    run_together(roomy, [GREEDY] * len(PROMPTS))

    assert roomy.counters().preemptions == before


def test_stop_strings_and_logprobs_survive_preemption(roomy: Engine, short: Engine) -> None:
    whole = generate(roomy, PROMPTS[5], GREEDY).text
    stop = whole[len(whole) * 2 // 3 :][:4]
    sampling = dataclasses.replace(GREEDY, stop=(stop,), logprobs=1)
    expected = generate(roomy, PROMPTS[5], sampling)
    before = short.counters().preemptions

    outcomes = run_together(short, [GREEDY] * 5 + [sampling])

    assert short.counters().preemptions > before
    assert outcomes[5].text == expected.text == whole[: whole.index(stop)]
    assert outcomes[5].token_ids == expected.token_ids


def test_no_event_comes_twice(short: Engine) -> None:
    for index in range(4):
        submit_ids(short, str(index), [11 + index] * 40, GREEDY)
    before = short.counters().preemptions
    ends, progress, tokens = set(), [], []
    for batch in short.events(poll_s=0.1):
        for event in batch.events:
            if isinstance(event, SequencePrefill):
                progress.append((event.sequence_id, event.prefilled_tokens))
                assert event.prompt_tokens == 40
            elif isinstance(event, SequenceTokens):
                tokens.append((event.sequence_id, event.position))
            else:
                ends.add(event.sequence_id)
        if len(ends) == 4:
            break

    assert short.counters().preemptions > before
    assert len(set(progress)) == len(progress)
    for name in ends:
        read = [count for owner, count in progress if owner == name]
        assert read == sorted(read)
        assert [position for owner, position in tokens if owner == name] == list(range(48))


def test_a_preempted_sequence_can_be_cancelled(short: Engine) -> None:
    submit_ids(short, "old", PROMPTS[1], dataclasses.replace(GREEDY, max_tokens=60))
    submit_ids(short, "young", PROMPTS[3], dataclasses.replace(GREEDY, max_tokens=90))
    before = short.counters().preemptions
    events = short.events(poll_s=0.1)
    while short.counters().preemptions == before:
        next(events)

    short.cancel("young")
    outcomes = gather(short, {"old", "young"})

    young = outcomes["young"].finished
    assert young is not None
    assert young.reason == "cancelled"
    assert young.completion_tokens > 0
    old = outcomes["old"].finished
    assert old is not None
    assert old.completion_tokens == 60
    assert short._cache.free_tokens == short._cache.capacity_tokens


def test_the_oldest_fills_the_whole_cache_and_ends(short: Engine, roomy: Engine) -> None:
    sampling = Sampling(max_tokens=500, ignore_eos=True)
    prompt = PROMPTS[3]
    expected = generate(roomy, prompt, dataclasses.replace(sampling, max_tokens=112 - len(prompt)))

    submit = functools.partial(submit_ids, short, prompt=prompt, sampling=sampling)
    submit(name="old")
    submit(name="young")
    outcomes = gather(short, {"old", "young"})

    assert outcomes["old"].token_ids == outcomes["young"].token_ids == expected.token_ids
