"""On a GPU: answers in a format are those of the CPU, alone and in a batch, wherever the layers are."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from lamella_engine import Engine, EngineOptions, ShardStore
from tests.engine.engine_driver import gather, open_smallest
from tests.engine.test_structured_output import FORMATS, answer, ask

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(300),
]


@pytest.mark.parametrize("place", ["resident", "ram", "disk"])
def test_answers_in_a_format_are_those_of_the_cpu(place: str, tiny_llama_dir: Path, tmp_path: Path) -> None:
    sharded = ShardStore(tmp_path).ensure("tiny", source=tiny_llama_dir)
    options = EngineOptions(store=tmp_path, device="cpu", max_sequences=6, sweep_tokens=48)
    with Engine.open("tiny", options) as engine:
        expected = {name: answer(engine, each).token_ids for name, each in FORMATS.items()}

    on_card = dataclasses.replace(options, device="cuda", ram=0 if place == "disk" else "auto")
    with Engine.open("tiny", on_card) if place == "resident" else open_smallest(sharded, on_card) as engine:
        alone = {name: answer(engine, each).token_ids for name, each in FORMATS.items()}
        for name, each in FORMATS.items():
            ask(engine, each, name=name)
        found = gather(engine, set(FORMATS))

    assert alone == expected
    assert {name: outcome.token_ids for name, outcome in found.items()} == expected
