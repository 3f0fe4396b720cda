"""The real model: weights and streamed tokens equal a full load's, alone and in one batch, in less memory."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel

from lamella_engine import Engine, EngineOptions, Sampling, SequenceRequest, ShardStore
from tests.engine.engine_driver import gather
from tests.engine.shards import stored_weights

pytestmark = [pytest.mark.real_model, pytest.mark.timeout(300)]

QUESTIONS = [
    "What is the capital of France?",
    "Write a haiku about rivers.",
    "def fibonacci(n):",
    "Explain to a child why the sky is blue.",
    "1, 1, 2, 3, 5, 8,",
    "List three fruits: 🍎",
    "Who wrote Hamlet?",
    "Translate to French: good morning",
]
ALONE = ["What is the capital of France?", "1, 1, 2, 3, 5, 8,", "List three fruits: 🍎"]
TOKENS = 16


@pytest.fixture(scope="module")
def full_model(smollm2_gguf: Path) -> PreTrainedModel:
    """Transformers' own load of the same file; it takes long, so all that needs it stands in this module."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        smollm2_gguf.parent,
        gguf_file=smollm2_gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    return model.eval()


@pytest.fixture(scope="module")
def full_load(smollm2_gguf: Path, full_model: PreTrainedModel) -> dict[str, list[int]]:
    """Greedy tokens of the full load, by question."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2_gguf.parent, gguf_file=smollm2_gguf.name)
    answers = {}
    for question in QUESTIONS:
        chat = [{"role": "user", "content": question}]
        inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        output = full_model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
        answers[question] = output[0, inputs["input_ids"].shape[1] :].tolist()
    return answers


@pytest.fixture(scope="module")
def engine(smollm2_store: Path) -> Iterator[Engine]:
    options = EngineOptions(
        store=smollm2_store, device="cpu", max_sequences=len(QUESTIONS), sweep_tokens=512, ram=0, offline=True
    )
    with Engine.open("SmolLM2-135M-Instruct", options) as engine:
        yield engine


def ask(engine: Engine, name: str, question: str) -> None:
    engine.submit(SequenceRequest(name, Sampling(max_tokens=TOKENS), messages=(("user", question),)))


def test_every_weight_equals_a_full_load(full_model: PreTrainedModel, smollm2_store: Path) -> None:
    stored = stored_weights(ShardStore(smollm2_store).open("SmolLM2-135M-Instruct"))

    full = full_model.state_dict()
    assert full.keys() - stored.keys() == {"lm_head.weight"}
    assert [name for name, value in stored.items() if not torch.equal(full[name], value)] == []


def test_tokens_equal_a_full_load_alone(engine: Engine, full_load: dict[str, list[int]]) -> None:
    answers = {}
    for question in ALONE:
        ask(engine, question, question)
        answers[question] = gather(engine, {question})[question].token_ids

    assert answers == {question: full_load[question] for question in ALONE}


def test_tokens_equal_a_full_load_in_one_batch(engine: Engine, full_load: dict[str, list[int]]) -> None:
    sweeps = engine.counters().sweeps

    for question in QUESTIONS:
        ask(engine, question, question)
    outcomes = gather(engine, set(QUESTIONS))

    assert {question: outcome.token_ids for question, outcome in outcomes.items()} == full_load
    assert engine.counters().sweeps - sweeps <= TOKENS + 2


def test_the_capital_of_france_is_paris(engine: Engine) -> None:
    ask(engine, "paris", QUESTIONS[0])

    assert "Paris" in gather(engine, {"paris"})["paris"].text


def test_memory_stays_below_a_full_load_by_about_the_streamed_layers(smollm2_store: Path) -> None:
    sharded = ShardStore(smollm2_store).open("SmolLM2-135M-Instruct")
    layers = [shard.nbytes for shard in sharded.layers]

    streamed, budget = _peak_growth_bytes("stream", smollm2_store)
    full, _ = _peak_growth_bytes("full", smollm2_store)

    saved = sum(layers) - 3 * max(layers)
    assert full - streamed > 0.8 * saved, f"full {full / 1e6:.0f} MB, streamed {streamed / 1e6:.0f} MB"
    assert streamed <= budget, f"{streamed:,} bytes where the plan has {budget:,}"


_MEASURE = """
import json, sys
import torch
from pathlib import Path
from lamella_engine import Engine, EngineOptions, Sampling, SequenceFinished, SequenceRequest, ShardStore, architecture
from lamella_engine.device import peak_rss_bytes as peak

mode, store = sys.argv[1], Path(sys.argv[2])
sharded = ShardStore(store).open("SmolLM2-135M-Instruct")
architecture.build(architecture.load_config(sharded.directory), torch.float32)
before = peak()
options = EngineOptions(store=store, device="cpu", ram=0 if mode == "stream" else "auto", max_sequences=1)
with Engine.open_sharded(sharded, torch.device("cpu"), options) as engine:
    engine.submit(SequenceRequest("one", Sampling(max_tokens=4), prompt_ids=tuple(range(100, 120))))
    for batch in engine.events():
        if any(isinstance(event, SequenceFinished) for event in batch.events):
            break
    print(json.dumps([peak() - before, engine.plan.ram.used]))
"""


def _peak_growth_bytes(mode: str, store: Path) -> tuple[int, int]:
    """How much the peak resident memory of a fresh process grows while it generates, and what its plan allows."""
    result = subprocess.run(
        [sys.executable, "-c", _MEASURE, mode, str(store)], capture_output=True, text=True, timeout=200, check=True
    )
    growth, budget = json.loads(result.stdout.strip().splitlines()[-1])
    return int(growth), int(budget)
