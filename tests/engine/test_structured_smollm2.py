"""The real model answers in a schema: valid, the same token by token, in far fewer sweeps than tokens."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from lamella_engine import AnswerFormat, Engine, EngineOptions, FormatKind, Sampling, SequenceRequest
from tests.engine.engine_driver import Outcome, gather

pytestmark = [pytest.mark.real_model, pytest.mark.timeout(300)]

SCHEMA = {
    "type": "object",
    "properties": {
        "country": {"type": "string", "maxLength": 20},
        "capital": {"type": "string", "maxLength": 20},
        "continent": {"enum": ["Africa", "America", "Asia", "Europe", "Oceania"]},
        "languages_spoken": {
            "type": "array",
            "items": {"type": "string", "maxLength": 12},
            "minItems": 1,
            "maxItems": 2,
        },
    },
    "required": ["country", "capital", "continent", "languages_spoken"],
    "additionalProperties": False,
}
QUESTION = (("user", "Describe France as JSON with country, capital, continent and languages_spoken."),)
SAMPLING = Sampling(max_tokens=120)


@pytest.fixture(scope="module")
def engine(smollm2_store: Path) -> Iterator[Engine]:
    options = EngineOptions(store=smollm2_store, device="cpu", max_sequences=2, sweep_tokens=256, offline=True)
    with Engine.open("SmolLM2-135M-Instruct", options) as engine:
        yield engine


def answer(engine: Engine, sampling: Sampling) -> Outcome:
    wanted = AnswerFormat(FormatKind.JSON_SCHEMA, json.dumps(SCHEMA))
    engine.submit(SequenceRequest("s", sampling, messages=QUESTION, answer_format=wanted))
    return gather(engine, {"s"}, deadline_s=120)["s"]


def test_the_real_model_answers_in_a_schema(engine: Engine) -> None:
    outcome = answer(engine, SAMPLING)

    one_by_one = answer(engine, dataclasses.replace(SAMPLING, logprobs=0))  # with logprobs nothing is forced

    found = json.loads(outcome.text)
    assert list(found) == list(SCHEMA["properties"])
    assert (found["capital"], found["continent"]) == ("Paris", "Europe")
    assert outcome.token_ids == one_by_one.token_ids
    assert outcome.finished is not None
    assert one_by_one.finished is not None
    assert outcome.finished.reason == one_by_one.finished.reason == "stop"
    assert outcome.finished.sweeps < 0.7 * one_by_one.finished.sweeps
