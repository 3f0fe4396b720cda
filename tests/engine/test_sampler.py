"""Tokens follow the parameters, and a draw depends on seed and position alone."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lamella_engine.adjustments import Draw
from lamella_engine.sampler import gumbel_noise, sample
from lamella_engine.sequence_types import Sampling

VOCABULARY = 1000


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(4, VOCABULARY, generator=torch.Generator().manual_seed(0)) * 3


def draw(sampling: Sampling, generated: list[int] | None = None, prompt: list[int] | None = None) -> Draw:
    return Draw(sampling, prompt or [1], generated or [])


def drawn_tokens(row: torch.Tensor, sampling: Sampling, count: int = 400) -> set[int]:
    draws = [draw(dataclasses.replace(sampling, seed=seed)) for seed in range(count)]
    return {choice.token_id for choice in sample(row.expand(count, -1), draws)}


def test_greedy_takes_the_likeliest_token(logits: torch.Tensor) -> None:
    choices = sample(logits, [draw(Sampling())] * 4)

    assert [choice.token_id for choice in choices] == logits.argmax(-1).tolist()


def test_a_draw_is_the_same_alone_and_in_a_batch(logits: torch.Tensor) -> None:
    sampling = Sampling(temperature=1.0, top_p=0.9, seed=7)
    draws = [draw(sampling, generated=[5] * position) for position in range(4)]

    together = [choice.token_id for choice in sample(logits, draws)]

    assert together == [sample(logits[i : i + 1], [draws[i]])[0].token_id for i in range(4)]


def test_a_draw_changes_with_position_and_seed(logits: torch.Tensor) -> None:
    row = torch.zeros(1, VOCABULARY)

    tokens = {
        sample(row, [draw(Sampling(temperature=1.0, seed=seed), generated=[1] * position)])[0].token_id
        for seed in range(5)
        for position in range(5)
    }

    assert len(tokens) > 20


def test_noise_is_gumbel_noise() -> None:
    noise = torch.cat([gumbel_noise(seed, position, torch.arange(500)) for seed in range(10) for position in range(10)])

    assert float(noise.mean()) == pytest.approx(0.5772, abs=0.02)  # Euler's constant
    assert float(noise.var()) == pytest.approx(math.pi**2 / 6, abs=0.05)
    assert len(set(noise.tolist())) == len(noise)


def test_noise_of_a_token_does_not_depend_on_the_others() -> None:
    whole = gumbel_noise(7, 3, torch.arange(100))

    assert torch.equal(gumbel_noise(7, 3, torch.tensor([42, 5])), whole[[42, 5]])


def test_a_draw_survives_rounding_in_the_logits() -> None:
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(500, 50_000, generator=generator)
    draws = [draw(Sampling(temperature=1.0, seed=seed)) for seed in range(500)]

    tokens = [choice.token_id for choice in sample(rows, draws)]
    again = [choice.token_id for choice in sample(rows * (1 + 1e-6), draws)]

    assert sum(a != b for a, b in zip(tokens, again, strict=True)) <= 1


def test_draws_follow_the_probabilities() -> None:
    row = torch.tensor([[0.5, 0.3, 0.2]]).log()
    count = 4000

    draws = [draw(Sampling(temperature=1.0, seed=seed)) for seed in range(count)]
    tokens = torch.tensor([choice.token_id for choice in sample(row.expand(count, -1), draws)])

    shares = torch.bincount(tokens, minlength=3) / count
    assert torch.allclose(shares, torch.tensor([0.5, 0.3, 0.2]), atol=0.03)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize(
    ("sampling", "warper"),
    [
        (Sampling(top_k=5), TopKLogitsWarper(5)),
        (Sampling(top_p=0.5), TopPLogitsWarper(0.5)),
        (Sampling(top_p=0.999), TopPLogitsWarper(0.999)),
        (Sampling(min_p=0.2), MinPLogitsWarper(0.2)),
    ],
)
def test_filters_keep_what_transformers_keeps(
    logits: torch.Tensor, sampling: Sampling, warper: object, temperature: float
) -> None:
    row = logits[:1]
    kept = set(torch.isfinite(warper(None, row / temperature))[0].nonzero().flatten().tolist())  # type: ignore[operator]

    tokens = drawn_tokens(row, dataclasses.replace(sampling, temperature=temperature))

    assert tokens <= kept
    if len(kept) <= 5:
        assert tokens == kept


def test_combined_filters_keep_what_transformers_keeps(logits: torch.Tensor) -> None:
    row = logits[:1]
    scores = MinPLogitsWarper(0.1)(None, TopPLogitsWarper(0.8)(None, TopKLogitsWarper(20)(None, row)))
    kept = set(torch.isfinite(scores)[0].nonzero().flatten().tolist())

    tokens = drawn_tokens(row, Sampling(temperature=1.0, top_k=20, top_p=0.8, min_p=0.1))

    assert tokens <= kept
    assert len(tokens) > 1


def test_repetition_penalty_equals_transformers(logits: torch.Tensor) -> None:
    row = logits[:1]
    best = int(row.argmax())
    expected = RepetitionPenaltyLogitsProcessor(5.0)(torch.tensor([[best, 3]]), row.clone())

    choice = sample(row, [draw(Sampling(repetition_penalty=5.0), generated=[best], prompt=[3])])[0]

    assert choice.token_id == int(expected.argmax()) != best


@pytest.mark.parametrize(("presence", "frequency", "expected"), [(0.5, 0.0, 0), (1.5, 0.0, 1), (0.0, 0.4, 1)])
def test_presence_counts_once_and_frequency_each_time(presence: float, frequency: float, expected: int) -> None:
    row = torch.tensor([[2.0, 1.0, 0.0]])
    sampling = Sampling(presence_penalty=presence, frequency_penalty=frequency)

    choice = sample(row, [draw(sampling, generated=[0, 0, 0], prompt=[0])])[0]

    assert choice.token_id == expected


def test_presence_penalty_leaves_the_prompt_alone() -> None:
    row = torch.tensor([[2.0, 1.0]])

    choice = sample(row, [draw(Sampling(presence_penalty=2.0), prompt=[0])])[0]

    assert choice.token_id == 0


def test_logprobs_are_those_of_the_model(logits: torch.Tensor) -> None:
    expected = logits[0].log_softmax(-1)

    choice = sample(logits[:1], [draw(Sampling(logprobs=3, repetition_penalty=2.0))])[0]

    assert choice.logprobs is not None
    assert choice.logprobs.logprob == pytest.approx(float(expected[choice.token_id]))
    assert [token for token, _ in choice.logprobs.top] == expected.topk(3).indices.tolist()


def test_a_row_that_is_not_finite_fails_alone(logits: torch.Tensor) -> None:
    logits[1, 5] = float("nan")
    logits[2, 5] = float("inf")

    choices = sample(logits, [draw(Sampling())] * 4)

    assert [choice.error.code if choice.error else None for choice in choices] == [
        None,
        "not_finite",
        "not_finite",
        None,
    ]


def test_a_bias_is_added_to_the_logits_of_its_tokens_alone() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]] * 4)
    biases = [((0, 4.0),), ((3, -100.0),), ((1, 100.0), (2, 100.0)), None]

    choices = sample(logits, [draw(Sampling(logit_bias=bias)) for bias in biases])

    assert [choice.token_id for choice in choices] == [0, 2, 2, 3]
    assert logits[0].tolist() == [0.0, 1.0, 2.0, 3.0], "what others see stays"


def test_a_bias_shifts_what_is_drawn_as_often_as_it_should() -> None:
    logits = torch.zeros(1, 2)
    counts = [0, 0]

    for seed in range(400):
        bias = ((1, 1.0986),)  # three times as likely
        (choice,) = sample(logits, [draw(Sampling(temperature=1.0, seed=seed, logit_bias=bias))])
        counts[choice.token_id] += 1

    assert 260 < counts[1] < 340
