"""Several samples of one prompt: it is read once, and each goes on as a sequence of its own would."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lamella_engine import (
    AutoModel,
    Engine,
    EngineOptions,
    FinishReason,
    Sampling,
    SequenceError,
    SequenceFinished,
    SequencePrefill,
    SequenceRequest,
    SequenceTokens,
    ShardStore,
)
from lamella_engine.errors import OptionError
from lamella_engine.sequence import sampling_of
from tests.engine.engine_driver import Outcome, generate, submit_ids

PROMPT = list(range(40, 90))
RANDOM = Sampling(max_tokens=24, temperature=1.1, top_p=0.95, seed=5, presence_penalty=0.2, ignore_eos=True)


@pytest.fixture(scope="module")
def options(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> EngineOptions:
    root = tmp_path_factory.mktemp("store")
    ShardStore(root).ensure("tiny", source=tiny_llama_dir)
    return EngineOptions(store=root, device="cpu", max_sequences=6, sweep_tokens=32, kv_tokens=4096, offline=True)


@pytest.fixture(scope="module")
def engine(options: EngineOptions) -> Iterator[Engine]:
    with Engine.open("tiny", options) as engine:
        yield engine


@pytest.fixture(scope="module")
def tight(options: EngineOptions) -> Iterator[Engine]:
    """Keys and values for a prompt of 200 tokens and three pages for each of six samples."""
    with Engine.open("tiny", dataclasses.replace(options, kv_tokens=200 + 6 * 48)) as engine:
        yield engine


def submit(engine: Engine, name: str, prompt: list[int], sampling: Sampling, num_samples: int) -> None:
    engine.submit(SequenceRequest(name, sampling, prompt_ids=tuple(prompt), num_samples=num_samples))


def gather_samples(engine: Engine, counts: dict[str, int]) -> dict[str, list[Outcome]]:
    """Follow the events until every sample has ended."""
    outcomes = {name: [Outcome() for _ in range(count)] for name, count in counts.items()}
    for batch in engine.events(poll_s=40.0):
        assert batch.events, "the engine is silent"
        for event in batch.events:
            if isinstance(event, SequencePrefill):
                continue
            outcome = outcomes[event.sequence_id][event.sample]
            assert outcome.finished is None, "an event after the last"
            if isinstance(event, SequenceTokens):
                assert event.position == len(outcome.token_ids)
                outcome.token_ids.extend(event.token_ids)
                outcome.text += event.text
            else:
                outcome.finished = event
        if all(outcome.finished for samples in outcomes.values() for outcome in samples):
            return outcomes
    raise AssertionError("the engine was closed")


def run_samples(engine: Engine, prompt: list[int], sampling: Sampling, num_samples: int) -> list[Outcome]:
    submit(engine, "samples", prompt, sampling, num_samples)
    return gather_samples(engine, {"samples": num_samples})["samples"]


def run_apart(engine: Engine, prompt: list[int], sampling: Sampling, num_samples: int) -> list[Outcome]:
    """The same samples, each as a sequence of its own that shares nothing."""
    return [generate(engine, prompt, sampling_of(sampling, sample)) for sample in range(num_samples)]


def content(outcomes: list[Outcome]) -> list[tuple[list[int], str]]:
    return [(outcome.token_ids, outcome.text) for outcome in outcomes]


@pytest.mark.parametrize("prompt_tokens", [1, 16, 50], ids=["one", "a whole page", "pages and a part"])
def test_samples_are_what_sequences_of_their_own_would_be(engine: Engine, prompt_tokens: int) -> None:
    prompt = (PROMPT * 2)[:prompt_tokens]
    expected = run_apart(engine, prompt, RANDOM, 4)

    outcomes = run_samples(engine, prompt, RANDOM, 4)

    assert content(outcomes) == content(expected)
    assert outcomes[0].token_ids == generate(engine, prompt, RANDOM).token_ids, "the first is the single one"
    assert len({tuple(outcome.token_ids) for outcome in outcomes}) == 4
    assert engine._cache.free_tokens == engine._cache.capacity_tokens


def test_samples_in_company_are_the_same(engine: Engine) -> None:
    other = dataclasses.replace(RANDOM, seed=99)
    expected = run_apart(engine, PROMPT, RANDOM, 3), run_apart(engine, PROMPT[::-1], other, 2)

    submit(engine, "a", PROMPT, RANDOM, 3)
    submit(engine, "b", PROMPT[::-1], other, 2)
    outcomes = gather_samples(engine, {"a": 3, "b": 2})

    assert content(outcomes["a"]) == content(expected[0])
    assert content(outcomes["b"]) == content(expected[1])


def test_greedy_samples_are_equal(engine: Engine) -> None:
    greedy = Sampling(max_tokens=12, ignore_eos=True)

    outcomes = run_samples(engine, PROMPT, greedy, 3)

    assert content(outcomes) == content([generate(engine, PROMPT, greedy)] * 3)


def test_the_prompt_is_read_and_kept_once(tight: Engine) -> None:
    sampling = dataclasses.replace(RANDOM, max_tokens=30)
    before = tight.counters()

    outcomes = run_samples(tight, PROMPT * 4, sampling, 6)

    after = tight.counters()
    assert [len(outcome.token_ids) for outcome in outcomes] == [30] * 6
    assert after.preemptions == before.preemptions, "pages for one prompt and six endings are enough"
    assert after.sweeps - before.sweeps == 7 + 29, "200 tokens in chunks of 32, then all six in every sweep"
    assert after.tokens - before.tokens == 6 * 30
    assert tight._cache.free_tokens == tight._cache.capacity_tokens


def test_samples_go_on_as_they_were_when_pages_run_short(engine: Engine, tight: Engine) -> None:
    sampling = dataclasses.replace(RANDOM, max_tokens=60)
    expected = run_apart(engine, PROMPT * 4, sampling, 6)
    before = tight.counters().preemptions

    outcomes = run_samples(tight, PROMPT * 4, sampling, 6)

    assert tight.counters().preemptions > before
    assert content(outcomes) == content(expected)
    assert tight._cache.free_tokens == tight._cache.capacity_tokens


def test_each_sample_has_an_end_of_its_own(engine: Engine) -> None:
    whole = run_apart(engine, PROMPT, RANDOM, 3)
    only_in_second = set(whole[1].token_ids[3:20]) - set(whole[0].token_ids) - set(whole[2].token_ids)
    stop_id = min(only_in_second)

    outcomes = run_samples(engine, PROMPT, dataclasses.replace(RANDOM, stop_token_ids=(stop_id,)), 3)

    reasons = [outcome.finished.reason for outcome in outcomes if outcome.finished]
    assert reasons == [FinishReason.LENGTH, FinishReason.STOP, FinishReason.LENGTH]
    assert outcomes[1].token_ids == whole[1].token_ids[: whole[1].token_ids.index(stop_id) + 1]
    assert [outcomes[0].token_ids, outcomes[2].token_ids] == [whole[0].token_ids, whole[2].token_ids]


def test_samples_of_one_token_end_with_the_prompt(engine: Engine) -> None:
    outcomes = run_samples(engine, PROMPT, dataclasses.replace(RANDOM, max_tokens=1), 5)

    assert [len(outcome.token_ids) for outcome in outcomes] == [1] * 5


@pytest.mark.parametrize("is_prompt_read", [False, True])
def test_cancel_ends_all_samples(engine: Engine, is_prompt_read: bool) -> None:
    submit(engine, "victim", [7] * 400, dataclasses.replace(RANDOM, max_tokens=100), 4)
    kind = SequenceTokens if is_prompt_read else SequencePrefill
    next(batch for batch in engine.events(poll_s=0.1) if any(isinstance(event, kind) for event in batch.events))

    engine.cancel("victim")

    ends: dict[int, FinishReason] = {}
    for batch in engine.events(poll_s=0.1):
        ends |= {event.sample: event.reason for event in batch.events if isinstance(event, SequenceFinished)}
        if len(ends) == 4:
            break
    assert ends == dict.fromkeys(range(4), FinishReason.CANCELLED)
    assert (engine.counters().running, engine.counters().waiting) == (0, 0)
    assert engine._cache.free_tokens == engine._cache.capacity_tokens
    submit_ids(engine, "victim", PROMPT, Sampling(max_tokens=1))
    gather_samples(engine, {"victim": 1})


@pytest.mark.parametrize("num_samples", [-1, 0, 7])
def test_a_number_of_samples_that_cannot_run_is_refused(engine: Engine, num_samples: int) -> None:
    with pytest.raises(SequenceError, match=r"1 to 6 .*max_sequences") as refusal:
        submit(engine, "x", PROMPT, RANDOM, num_samples)

    assert refusal.value.code == "bad_request"


def test_several_samples_cannot_be_resumed_at_once(engine: Engine) -> None:
    with pytest.raises(SequenceError, match="resume samples one by one"):
        engine.submit(SequenceRequest("x", RANDOM, prompt_ids=(5,), generated_ids=(6,), num_samples=2))


def test_generate_returns_the_samples_of_each_prompt_together(tiny_llama_dir: Path, options: EngineOptions) -> None:
    prompts = torch.tensor([[30, 31, 32], [40, 41, 42]])
    with AutoModel.from_pretrained(tiny_llama_dir, layer_shards_saving_path=options.store, device="cpu") as model:
        single = model.generate(prompts, max_new_tokens=8, do_sample=True, temperature=1.5, seed=3)

        rows = model.generate(
            prompts, max_new_tokens=8, do_sample=True, temperature=1.5, seed=3, num_return_sequences=3
        )

        assert isinstance(rows, torch.Tensor)
        assert isinstance(single, torch.Tensor)
        assert rows.shape[0] == 6
        assert rows[:, :3].tolist() == [[30, 31, 32]] * 3 + [[40, 41, 42]] * 3
        assert rows[[0, 3], : single.shape[1]].tolist() == single.tolist()
        assert len({tuple(row) for row in rows.tolist()}) == 6
        with pytest.raises(OptionError, match="greedy"):
            model.generate(prompts, num_return_sequences=2)
        with pytest.raises(OptionError, match="greedy"):
            model.generate(prompts, num_return_sequences=2, do_sample=True, temperature=0.0)
        with pytest.raises(OptionError, match="between 1 and 8"):
            model.generate(prompts, num_return_sequences=9, do_sample=True)
        with pytest.raises(OptionError, match="between 1 and 8"):
            model.generate(prompts, num_return_sequences=0)
