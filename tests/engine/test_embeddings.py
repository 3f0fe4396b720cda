"""Vectors of texts equal those of the full-load model, alone, beside conversations, in chunks, interrupted."""

from __future__ import annotations

import base64
import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from lamella_engine import (
    EmbeddingTerms,
    Engine,
    EngineOptions,
    Pooling,
    Sampling,
    SequenceEmbeddings,
    SequenceFinished,
    SequencePrefill,
    SequenceRequest,
    SequenceTokens,
    ShardStore,
)
from lamella_engine.errors import SequenceError
from tests import tiny_models

TEXTS = (
    "The river runs slowly past the mill.",
    "a",
    "Ein kleiner Vogel saß auf dem Dach — naïve façade, jalapeño, Ωmega, こんにちは, 🍎🍏.",
    "One, two, three, four, five, six, seven, eight, nine, ten; " * 6,
    "Paris is the capital of France.",
    "Every layer is read once for all sequences together, and then the next one is read. " * 4,
    "def add(left, right):\n    return left + right\n",
    "z",
)
PROSE = Sampling(max_tokens=60, ignore_eos=True)


@pytest.fixture(scope="module")
def options(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> EngineOptions:
    root = tmp_path_factory.mktemp("store")
    ShardStore(root).ensure("tiny", source=tiny_llama_dir)
    return EngineOptions(store=root, device="cpu", max_sequences=4, sweep_tokens=32, kv_tokens=4096, offline=True)


@pytest.fixture(scope="module")
def engine(options: EngineOptions) -> Iterator[Engine]:
    with Engine.open("tiny", options) as engine:
        yield engine


def full_load(directory: Path, texts: tuple[str, ...], pooling: Pooling, *, is_normalised: bool) -> torch.Tensor:
    model, tokenizer = AutoModel.from_pretrained(directory).eval(), AutoTokenizer.from_pretrained(directory)
    vectors = []
    for text in texts:
        with torch.inference_mode():
            hidden = model(**tokenizer(text, return_tensors="pt", return_token_type_ids=False)).last_hidden_state[0]
        vector = hidden.double().mean(0) if pooling is Pooling.MEAN else hidden[-1].double()
        vectors.append(vector / vector.norm() if is_normalised else vector)
    return torch.stack(vectors)


class Followed:
    """What came of several requests."""

    def __init__(self) -> None:
        self.matrices: dict[str, torch.Tensor] = {}
        self.tokens: dict[str, list[int]] = {}
        self.ends: dict[str, SequenceFinished] = {}
        self.progress: dict[str, list[tuple[int, int]]] = {}


def follow(engine: Engine, *names: str) -> Followed:
    found = Followed()
    for batch in engine.events(poll_s=0.1):
        for event in batch.events:
            name = event.sequence_id
            assert name not in found.ends, "nothing comes after the last event"
            if isinstance(event, SequenceEmbeddings):
                assert name not in found.matrices
                numbers = torch.frombuffer(bytearray(base64.b64decode(event.values)), dtype=torch.float32)
                found.matrices[name] = numbers.reshape(event.count, event.width)
            elif isinstance(event, SequenceTokens):
                found.tokens.setdefault(name, []).extend(event.token_ids)
            elif isinstance(event, SequencePrefill):
                found.progress.setdefault(name, []).append((event.prefilled_tokens, event.prompt_tokens))
            else:
                found.ends[name] = event
        if set(names) <= set(found.ends):
            return found
    raise AssertionError("the engine was closed")


def embed(
    engine: Engine, name: str, texts: tuple[str, ...] = TEXTS, pooling: Pooling = Pooling.MEAN, normalised: bool = True
) -> None:
    engine.submit(SequenceRequest(name, embedding=EmbeddingTerms(texts, pooling, normalised)))


def assert_near(found: torch.Tensor, expected: torch.Tensor) -> None:
    differences = (found.double() - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert float(differences.max()) < 1e-5


@pytest.mark.parametrize("pooling", Pooling)
@pytest.mark.parametrize("is_normalised", [True, False])
def test_vectors_equal_those_of_the_full_load(
    engine: Engine, tiny_llama_dir: Path, pooling: Pooling, is_normalised: bool
) -> None:
    expected = full_load(tiny_llama_dir, TEXTS, pooling, is_normalised=is_normalised)

    embed(engine, "e", pooling=pooling, normalised=is_normalised)
    found = follow(engine, "e")

    assert_near(found.matrices["e"], expected)
    end = found.ends["e"]
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    tokens = sum(len(tokenizer(text)["input_ids"]) for text in TEXTS)
    assert (end.reason, end.prompt_tokens, end.completion_tokens) == ("stop", tokens, 0)
    assert end.sweeps < len(TEXTS) + math.ceil(tokens / 32), "texts share sweeps"
    read = found.progress["e"]
    assert read == sorted(set(read))
    assert all(total == tokens and done < total for done, total in read)


def test_texts_and_conversations_share_sweeps_and_none_changes_another(engine: Engine, tiny_llama_dir: Path) -> None:
    expected = full_load(tiny_llama_dir, TEXTS, Pooling.MEAN, is_normalised=True)
    engine.submit(SequenceRequest("alone", PROSE, prompt="The river"))
    alone = follow(engine, "alone").tokens["alone"]
    before = engine.counters().sweeps

    engine.submit(SequenceRequest("talk", PROSE, prompt="The river"))
    embed(engine, "one")
    embed(engine, "two", tuple(reversed(TEXTS)))
    found = follow(engine, "talk", "one", "two")

    assert found.tokens["talk"] == alone
    assert_near(found.matrices["one"], expected)
    assert_near(found.matrices["two"], expected.flip(0))
    assert engine.counters().sweeps - before < 60 + len(TEXTS), "texts ride the conversation's sweeps"


def test_a_conversation_waits_for_no_more_than_the_texts_under_way(engine: Engine) -> None:
    embed(engine, "many", tuple(f"text number {number}" for number in range(150)))

    engine.submit(SequenceRequest("talk", dataclasses.replace(PROSE, max_tokens=3), prompt="The river"))
    first = follow(engine, "talk")

    assert "many" not in first.ends
    assert follow(engine, "many").matrices["many"].shape == (150, 64)


def test_preempted_texts_are_read_again(options: EngineOptions, tiny_llama_dir: Path) -> None:
    expected = full_load(tiny_llama_dir, TEXTS[3:6], Pooling.MEAN, is_normalised=False)
    talks = [str(number) for number in range(11)]
    tight = dataclasses.replace(options, max_sequences=12, kv_tokens=592, sweep_tokens=16)
    with Engine.open("tiny", tight) as short:
        for talk in talks:
            short.submit(SequenceRequest(talk, dataclasses.replace(PROSE, max_tokens=60), prompt="The river"))
        embed(short, "e", TEXTS[3:6], normalised=False)
        found = follow(short, *talks, "e")

        assert short.counters().preemptions > 0
        assert short._cache.free_tokens == short._cache.capacity_tokens
    assert_near(found.matrices["e"], expected)


def test_a_cancelled_job_ends_once_and_leaves_nothing(engine: Engine) -> None:
    embed(engine, "many", tuple(f"text number {number}" for number in range(150)))

    engine.cancel("many")
    found = follow(engine, "many")

    assert found.ends["many"].reason == "cancelled"
    assert found.matrices == {}
    embed(engine, "many", TEXTS[:1])
    assert follow(engine, "many").ends["many"].reason == "stop"
    counters = engine.counters()
    assert (counters.running, counters.waiting, counters.kv_blocks_used) == (0, 0, 0)


def test_a_sweep_that_fails_ends_a_job_once(engine: Engine) -> None:
    def fail() -> None:
        raise RuntimeError("a failed sweep")

    engine.before_sweep = fail
    try:
        embed(engine, "e")
        found = follow(engine, "e")
    finally:
        engine.before_sweep = lambda: None

    assert (found.ends["e"].reason, found.ends["e"].error_code) == ("error", "engine")
    embed(engine, "e", TEXTS[:2])
    assert follow(engine, "e").matrices["e"].shape == (2, 64)


@pytest.mark.parametrize(
    ("texts", "code"),
    [
        (("a", "x" * 5000), "prompt_too_long"),
        (("a", ""), "prompt_empty"),
        (("a",) * 12_289, "too_many_texts"),
        ((), "too_many_texts"),
    ],
)
def test_what_cannot_be_read_is_refused(engine: Engine, texts: tuple[str, ...], code: str) -> None:
    with pytest.raises(SequenceError) as caught:
        embed(engine, "e", texts)

    assert caught.value.code == code


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "opt", "gemma3_text", "mixtral", "phi"])
def test_families_on_the_packed_path_give_their_own_vectors(
    family: str, options: EngineOptions, tmp_path: Path
) -> None:
    directory = with_tokenizer(family, tmp_path)
    ShardStore(options.store).ensure(f"embed-{family}", source=directory)
    expected = full_load(directory, TEXTS[:3], Pooling.MEAN, is_normalised=True)

    with Engine.open(f"embed-{family}", options) as engine:
        embed(engine, "e", TEXTS[:3])
        found = follow(engine, "e")

    assert_near(found.matrices["e"], expected)


def test_a_family_that_runs_stepwise_is_refused(options: EngineOptions, tmp_path: Path) -> None:
    ShardStore(options.store).ensure("embed-mamba", source=with_tokenizer("mamba", tmp_path))

    with Engine.open("embed-mamba", options) as engine, pytest.raises(SequenceError, match="mamba") as caught:
        embed(engine, "e", TEXTS[:1])

    assert caught.value.code == "embeddings_unsupported"


def with_tokenizer(family: str, directory: Path) -> Path:
    """A checkpoint whose vocabulary is that of the tests' tokenizer."""
    tokenizer = tiny_models.save_tokenizer(directory)
    shape = tiny_models.FAMILIES[family] | {"vocab_size": len(tokenizer)}
    return tiny_models.save_checkpoint(directory, family, shape, std=0.2, keeps_scales=True)
