"""Sequences share sweeps, join and leave at boundaries, and get the tokens of a full load."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lamella_engine import (
    Engine,
    EngineOptions,
    FinishReason,
    Sampling,
    SequenceError,
    SequenceRequest,
    SequenceTokens,
    ShardStore,
)
from lamella_engine.errors import DeviceError, EngineClosed, OptionError, ShardError
from tests.engine.engine_driver import gather, generate, submit_ids

PROMPTS = [[5, 9, 13], list(range(40, 90)), [7], list(range(100, 117)), [3, 3, 3, 3], list(range(20, 33))]
LONG = Sampling(max_tokens=400, ignore_eos=True)


@pytest.fixture(scope="module")
def store(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("store")
    ShardStore(root).ensure("tiny", source=tiny_llama_dir)
    return root


@pytest.fixture(scope="module")
def options(store: Path) -> EngineOptions:
    return EngineOptions(store=store, device="cpu", max_sequences=6, sweep_tokens=32, ram=0, offline=True)


@pytest.fixture(scope="module")
def engine(options: EngineOptions) -> Iterator[Engine]:
    with Engine.open("tiny", options) as engine:
        yield engine


@pytest.fixture(scope="module")
def reference(tiny_llama_dir: Path) -> list[list[int]]:
    """Greedy continuations of PROMPTS by a full load, 24 tokens each, end tokens ignored."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    return [
        model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=24, do_sample=False,
            eos_token_id=None, pad_token_id=0,
        )[0, len(prompt) :].tolist()
        for prompt in PROMPTS
    ]  # fmt: skip


def test_greedy_tokens_equal_a_full_load_alone(engine: Engine, reference: list[list[int]]) -> None:
    sampling = Sampling(max_tokens=24, ignore_eos=True)

    tokens = [generate(engine, prompt, sampling).token_ids for prompt in PROMPTS]

    assert tokens == reference


def test_greedy_tokens_equal_a_full_load_in_one_batch(engine: Engine, reference: list[list[int]]) -> None:
    names = [str(i) for i in range(len(PROMPTS))]
    before = engine.counters().sweeps

    for name, prompt in zip(names, PROMPTS, strict=True):
        submit_ids(engine, name, prompt, Sampling(max_tokens=24, ignore_eos=True))
    outcomes = gather(engine, set(names))

    assert [outcomes[name].token_ids for name in names] == reference
    assert engine.counters().sweeps - before < 24 * 2, "the sequences did not share sweeps"


def test_a_sequence_may_join_while_others_run(engine: Engine, reference: list[list[int]]) -> None:
    submit_ids(engine, "first", PROMPTS[0], Sampling(max_tokens=24, ignore_eos=True))
    early = next(batch for batch in engine.events(poll_s=0.1) if batch.events)
    submit_ids(engine, "second", PROMPTS[1], Sampling(max_tokens=24, ignore_eos=True))
    outcomes = gather(engine, {"first", "second"})

    assert isinstance(early.events[0], SequenceTokens)
    assert list(early.events[0].token_ids) + outcomes["first"].token_ids == reference[0]
    assert outcomes["second"].token_ids == reference[1]


def test_cancel_frees_the_place_and_leaves_the_others_alone(engine: Engine, reference: list[list[int]]) -> None:
    submit_ids(engine, "victim", PROMPTS[3], LONG)
    submit_ids(engine, "other", PROMPTS[0], Sampling(max_tokens=24, ignore_eos=True))
    first = next(batch for batch in engine.events(poll_s=0.1) if batch.events)
    assert first.events

    engine.cancel("victim")
    outcomes = gather(engine, {"victim", "other"})

    victim = outcomes["victim"].finished
    assert victim is not None
    assert victim.reason is FinishReason.CANCELLED
    assert victim.completion_tokens < 400
    assert engine.counters().running == 0
    assert engine._cache.free_tokens == engine._cache.capacity_tokens


def test_cancel_of_an_unknown_sequence_is_ignored(engine: Engine, reference: list[list[int]]) -> None:
    engine.cancel("nobody")

    assert generate(engine, PROMPTS[0], Sampling(max_tokens=24, ignore_eos=True)).token_ids == reference[0]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.9, top_p=0.95, seed=11)])
@pytest.mark.parametrize("split", [1, 7, 23])
def test_a_resumed_sequence_continues_the_same_tokens_and_text(engine: Engine, sampling: Sampling, split: int) -> None:
    sampling = dataclasses.replace(
        sampling, max_tokens=24, ignore_eos=True, repetition_penalty=1.1, presence_penalty=0.2
    )
    whole = generate(engine, PROMPTS[1], sampling)
    done = whole.token_ids[:split]

    engine.submit(SequenceRequest("again", sampling, prompt_ids=tuple(PROMPTS[1]), generated_ids=tuple(done)))
    again = gather(engine, {"again"})["again"]

    assert again.first_position == split
    assert done + again.token_ids == whole.token_ids
    assert whole.text.endswith(again.text)


def test_a_sequence_that_had_ended_before_it_was_resumed_ends_at_once(engine: Engine) -> None:
    whole = generate(engine, PROMPTS[0], Sampling(max_tokens=5, ignore_eos=True))

    engine.submit(
        SequenceRequest(
            "over", Sampling(max_tokens=5, ignore_eos=True), prompt_ids=(5, 9, 13), generated_ids=tuple(whole.token_ids)
        )
    )
    outcome = gather(engine, {"over"})["over"]

    assert outcome.token_ids == []
    assert outcome.finished is not None
    assert outcome.finished.reason is FinishReason.LENGTH


def test_the_same_seed_draws_the_same_tokens_alone_and_in_company(engine: Engine) -> None:
    sampling = Sampling(max_tokens=20, temperature=1.2, top_k=50, seed=42, ignore_eos=True)
    alone = generate(engine, PROMPTS[3], sampling).token_ids

    names = {str(i) for i in range(5)}
    for name in names - {"0"}:
        submit_ids(engine, name, PROMPTS[int(name)], Sampling(max_tokens=20, temperature=1.0, seed=int(name)))
    submit_ids(engine, "0", PROMPTS[3], sampling)
    together = gather(engine, names)["0"].token_ids

    assert together == alone


def test_a_stop_string_ends_the_text_before_it(engine: Engine) -> None:
    whole = generate(engine, PROMPTS[1], Sampling(max_tokens=40, ignore_eos=True)).text
    stop = whole[len(whole) // 2 :][:3]
    assert stop, "the tiny model writes text"

    outcome = generate(engine, PROMPTS[1], Sampling(max_tokens=40, ignore_eos=True, stop=(stop,)))

    assert outcome.text == whole[: whole.index(stop)]
    assert outcome.finished is not None
    assert outcome.finished.reason is FinishReason.STOP


def test_a_stop_id_ends_the_sequence_and_is_its_last_token(engine: Engine, reference: list[list[int]]) -> None:
    stop_id = reference[0][10]

    outcome = generate(engine, PROMPTS[0], Sampling(max_tokens=24, stop_token_ids=(stop_id,), ignore_eos=True))

    assert outcome.token_ids == reference[0][: reference[0].index(stop_id) + 1]


def test_the_end_of_the_context_ends_the_sequence(engine: Engine) -> None:
    context = engine.facts.context_length
    prompt = [5] * (context - 3)

    outcome = generate(engine, prompt, LONG)

    assert len(outcome.token_ids) == 3
    assert outcome.finished is not None
    assert outcome.finished.reason is FinishReason.LENGTH


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        (SequenceRequest("x", prompt_ids=()), "prompt_empty"),
        (SequenceRequest("x", prompt=""), "prompt_empty"),
        (SequenceRequest("x", prompt_ids=(5,) * 5000), "prompt_too_long"),
        (SequenceRequest("x", prompt_ids=(10**9,)), "bad_token"),
        (SequenceRequest("x", prompt_ids=(-1,)), "bad_token"),
        (SequenceRequest("x", Sampling(temperature=1.0), prompt_ids=(1,)), "no_seed"),
    ],
)
def test_a_sequence_that_cannot_run_is_refused_at_once(engine: Engine, request_: SequenceRequest, code: str) -> None:
    with pytest.raises(SequenceError) as refusal:
        engine.submit(request_)

    assert refusal.value.code == code


def test_the_same_id_twice_is_refused(engine: Engine) -> None:
    submit_ids(engine, "twin", PROMPTS[0], LONG)

    with pytest.raises(SequenceError, match="running already"):
        submit_ids(engine, "twin", PROMPTS[0], LONG)

    engine.cancel("twin")
    gather(engine, {"twin"})


def test_a_failed_sweep_ends_its_sequences_and_the_next_one_works(
    tiny_llama_dir: Path, tmp_path: Path, reference: list[list[int]]
) -> None:
    sharded = ShardStore(tmp_path).ensure("tiny", source=tiny_llama_dir)
    path = sharded.layers[2].path
    whole, status = path.read_bytes(), path.stat()
    options = EngineOptions(store=tmp_path, device="cpu", ram=0)
    sampling = Sampling(max_tokens=24, ignore_eos=True)

    with Engine.open("tiny", options) as engine:
        submit_ids(engine, "a", PROMPTS[0], LONG)
        submit_ids(engine, "b", PROMPTS[1], LONG)
        os.truncate(path, 4096)
        failed = gather(engine, {"a", "b"})
        with path.open("r+b") as file:
            file.write(whole)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # as if the disk had failed for a moment
        after = generate(engine, PROMPTS[1], sampling)

        assert {outcome.finished.error_code for outcome in failed.values() if outcome.finished} == {"engine"}
        assert all("layer" in str(outcome.finished) for outcome in failed.values())
        assert after.token_ids == reference[1]
        assert engine._cache.free_tokens == engine._cache.capacity_tokens


def test_nothing_can_be_submitted_after_close(options: EngineOptions) -> None:
    engine = Engine.open("tiny", options)
    engine.close()
    engine.close()

    with pytest.raises(EngineClosed):
        submit_ids(engine, "late", PROMPTS[0], LONG)

    assert list(engine.events()) == []


def test_closing_while_sequences_run_does_not_hang(options: EngineOptions) -> None:
    with Engine.open("tiny", options) as engine:
        submit_ids(engine, "a", PROMPTS[0], LONG)
        next(batch for batch in engine.events() if batch.events)

    assert engine._thread.join(timeout=0)


def test_an_altered_shard_that_cannot_be_built_again_is_refused_when_the_engine_opens(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny_llama_dir, source)
    sharded = ShardStore(tmp_path).ensure("tiny", source=source)
    shutil.rmtree(source)
    with sharded.layers[1].path.open("r+b") as file:
        file.seek(sharded.layers[1].data_start + 1000)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))

    with pytest.raises(ShardError, match="layer-00001"):
        Engine.open("tiny", EngineOptions(store=tmp_path, device="cpu"))


def test_streaming_reads_each_layer_once_a_sweep(engine: Engine) -> None:
    before = engine.counters()

    outcome = generate(engine, PROMPTS[0], Sampling(max_tokens=10, ignore_eos=True))

    after = engine.counters()
    layers = engine.model.sharded.layers
    assert after.sweeps - before.sweeps == 10
    embedding_rows = (len(PROMPTS[0]) + 9) * 64 * 4
    assert after.streamed_bytes - before.streamed_bytes == 10 * sum(shard.nbytes for shard in layers) + embedding_rows
    assert outcome.finished is not None
    assert outcome.finished.sweeps == 10


def test_a_device_that_does_not_exist_is_named(options: EngineOptions) -> None:
    with pytest.raises(DeviceError, match="cuda:31"):
        Engine.open("tiny", dataclasses.replace(options, device="cuda:31"))

    with pytest.raises(DeviceError, match="not a device"):
        Engine.open("tiny", dataclasses.replace(options, device="gpu"))


def test_options_that_cannot_work_are_refused(store: Path) -> None:
    with pytest.raises(OptionError, match="max_sequences"):
        EngineOptions(store=store, max_sequences=0)

    with pytest.raises(OptionError, match="sweep_tokens"):
        EngineOptions(store=store, max_sequences=64, sweep_tokens=32)

    with pytest.raises(OptionError, match="int4"):
        EngineOptions(store=store, dtype="int4")


def test_a_compute_type_other_than_the_stored_one_equals_a_full_load_in_it(
    tiny_llama_dir: Path, options: EngineOptions
) -> None:
    full = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.bfloat16).eval()
    ids = torch.tensor([PROMPTS[1]])
    with torch.no_grad():
        expected = full(ids).logits[0, -1].float().log_softmax(-1)

    with Engine.open("tiny", dataclasses.replace(options, dtype="bfloat16")) as engine:
        submit_ids(engine, "bf16", PROMPTS[1], Sampling(max_tokens=1, logprobs=0))
        events = [event for batch in _until_end(engine) for event in batch]

    logprobs = next(event.logprobs for event in events if isinstance(event, SequenceTokens))
    assert logprobs is not None
    assert logprobs[0].logprob == pytest.approx(float(expected.max()), abs=0.05)


def _until_end(engine: Engine) -> Iterator[tuple[object, ...]]:
    for batch in engine.events(poll_s=0.1):
        yield batch.events
        if any(type(event).__name__ == "SequenceFinished" for event in batch.events):
            return


def test_a_model_without_a_tokenizer_takes_token_ids_only(tiny_llama_dir: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(tiny_llama_dir, bare, ignore=shutil.ignore_patterns("tokenizer*", "special*", "*.jinja", "vocab*"))

    with Engine.open(bare, EngineOptions(store=tmp_path / "store", device="cpu")) as engine:
        outcome = generate(engine, PROMPTS[0], Sampling(max_tokens=4, ignore_eos=True))
        with pytest.raises(SequenceError, match="tokenizer"):
            engine.submit(SequenceRequest("text", prompt="hello"))

    assert len(outcome.token_ids) == 4
    assert outcome.text == ""
