"""Drives an engine in tests: submits sequences, gathers what comes back."""

from __future__ import annotations

import dataclasses
import time
import uuid
from dataclasses import dataclass, field

import torch

from lamella_engine import Engine, EngineOptions, Sampling, SequenceFinished, SequenceRequest, SequenceTokens
from lamella_engine.errors import PlanError
from lamella_engine.shard import ShardedModel


@dataclass
class Outcome:
    """What one sequence produced from `first_position` on."""

    first_position: int | None = None
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finished: SequenceFinished | None = None


def submit_ids(engine: Engine, name: str, prompt: list[int], sampling: Sampling) -> None:
    engine.submit(SequenceRequest(name, sampling, prompt_ids=tuple(prompt)))


def gather(engine: Engine, names: set[str], deadline_s: float = 60.0) -> dict[str, Outcome]:
    """Follow the events until all of `names` have ended."""
    outcomes: dict[str, Outcome] = {}
    deadline = time.monotonic() + deadline_s
    for batch in engine.events(poll_s=0.1):
        for event in batch.events:
            outcome = outcomes.setdefault(event.sequence_id, Outcome())
            assert outcome.finished is None, f"{event.sequence_id} had an event after its last"
            if isinstance(event, SequenceTokens):
                if outcome.first_position is None:
                    outcome.first_position = event.position
                assert event.position == outcome.first_position + len(outcome.token_ids)
                outcome.token_ids.extend(event.token_ids)
                outcome.text += event.text
            elif isinstance(event, SequenceFinished):
                outcome.finished = event
        if names <= {name for name, outcome in outcomes.items() if outcome.finished}:
            return outcomes
        assert time.monotonic() < deadline, f"only {outcomes} ended within {deadline_s} s"
    raise AssertionError("the engine was closed")


def generate(engine: Engine, prompt: list[int], sampling: Sampling) -> Outcome:
    name = uuid.uuid4().hex
    submit_ids(engine, name, prompt, sampling)
    return gather(engine, {name})[name]


def full_load_tokens(model: torch.nn.Module, prompt: list[int], count: int) -> list[int]:
    """The next `count` tokens by transformers' own greedy `generate` where `model` is, whatever they are."""
    ids = torch.tensor([prompt], device=next(model.parameters()).device)
    output = model.generate(  # type: ignore[operator] # transformers leaves it without types
        ids, attention_mask=torch.ones_like(ids),
        max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    tokens: list[int] = output[0, len(prompt) :].tolist()
    return tokens


def open_smallest(sharded: ShardedModel, options: EngineOptions) -> Engine:
    """An engine on the GPU with the smallest device budget that works, so that every layer streams."""
    device = torch.device("cuda", 0)
    try:
        Engine.open_sharded(sharded, device, dataclasses.replace(options, vram=1)).close()
    except PlanError as error:
        return Engine.open_sharded(sharded, device, dataclasses.replace(options, vram=1 + error.missing_bytes))
    raise AssertionError("a model fits one byte")
