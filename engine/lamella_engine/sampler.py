"""Chooses the next token of each sequence from the logits of a sweep.

Order of steps, as in transformers: penalties, bias, mask (these three in `adjustments`), temperature, top-k, top-p,
min-p, draw. The draw is the Gumbel-max
trick with noise that is a function of (seed, position, token) alone, so that batching, resuming and the device do not
change it. Logits differ in their last bits between a prefill and a decoding sweep; with this draw such a difference
matters only where the two best sums are as close as that, however large the vocabulary. (Inverting the cumulative
distribution with one number a position changed 1 of 36 resumed runs of a tiny model, this one none of 36.)
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import torch

from lamella_engine.adjustments import Draw, adjust
from lamella_engine.errors import SequenceError
from lamella_engine.sequence_types import Sampling, TokenLogprobs


@dataclass(frozen=True)
class Choice:
    """The token of one sequence, or why there is none."""

    token_id: int
    logprobs: TokenLogprobs | None
    error: SequenceError | None = None


def sample(logits: torch.Tensor, draws: list[Draw]) -> list[Choice]:
    """One `Choice` per row of `logits` (float32 [len(draws), vocabulary]); a row that is not finite gets an error."""
    best = logits.max(-1)  # of a row with a NaN in it that is NaN: one pass over the logits finds everything
    broken, tokens = torch.stack((~torch.isfinite(best.values), best.indices)).tolist()
    errors: dict[int, SequenceError] = {i: _not_finite() for i in range(len(draws)) if broken[i]}
    changed = [i for i, draw in enumerate(draws) if draw.adjusts and not broken[i]]
    rows: dict[int, torch.Tensor] = {}
    if changed:
        adjusted = logits[changed]
        refusals = adjust(adjusted, [draws[i] for i in changed])
        errors |= {i: error for i, error in zip(changed, refusals, strict=True) if error is not None}
        rows = dict(zip(changed, adjusted, strict=True))
        for i, token in zip(changed, adjusted.argmax(-1).tolist(), strict=True):
            tokens[i] = token
    choices = []
    for i, draw in enumerate(draws):
        if i in errors:
            choices.append(Choice(0, None, errors[i]))
            continue
        if draw.sampling.temperature > 0:
            tokens[i] = _draw_token(rows[i] if i in rows else logits[i], draw.sampling, len(draw.generated_ids))
        choices.append(Choice(tokens[i], _logprobs(logits[i], tokens[i], draw.sampling.logprobs)))
    return choices


def gumbel_noise(seed: int, position: int, token_ids: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise for `token_ids` (int64) at `position` (generated tokens so far); float64, same shape.

    Each number is a hash of (seed, position, token): splitmix64's finaliser (Steele, Lea and Flood, "Fast splittable
    pseudorandom number generators", 2014) over a keyed start.
    """
    digest = hashlib.blake2b(position.to_bytes(8, "little"), digest_size=8, key=seed.to_bytes(16, "little")).digest()
    start = int.from_bytes(digest, "little", signed=True)
    bits = (token_ids + 1) * _signed(0x9E3779B97F4A7C15) + start
    bits = (bits ^ _shift_right(bits, 30)) * _signed(0xBF58476D1CE4E5B9)
    bits = (bits ^ _shift_right(bits, 27)) * _signed(0x94D049BB133111EB)
    bits = bits ^ _shift_right(bits, 31)
    uniform = (_shift_right(bits, 11).double() + 0.5) / float(1 << 53)
    return -torch.log(-torch.log(uniform))


def _signed(constant: int) -> int:
    """The 64-bit pattern of `constant` as torch's signed type writes it; its products wrap as unsigned ones do."""
    return constant - (1 << 64)


def _shift_right(bits: torch.Tensor, count: int) -> torch.Tensor:
    """Shift without copying the sign."""
    return (bits >> count) & ((1 << (64 - count)) - 1)


def _not_finite() -> SequenceError:
    return SequenceError(
        "not_finite",
        "the model's output is not a number; the compute type overflows on this model. "
        "Run it with dtype bfloat16 or float32.",
    )


def _draw_token(row: torch.Tensor, sampling: Sampling, position: int) -> int:
    """Draw from `row` (float32 [vocabulary]) after temperature, top-k, top-p and min-p."""
    assert sampling.seed is not None, "the engine checks that a random sequence has a seed"
    scores, token_ids = _candidates(row.double() / sampling.temperature, sampling)
    if sampling.top_p < 1.0 and sampling.top_k is not None:
        keep = _nucleus(scores.double().softmax(-1), sampling.top_p)
        scores, token_ids = scores[:keep], token_ids[:keep]
    if sampling.min_p > 0.0:
        scores = scores.where(scores >= scores.max() + math.log(sampling.min_p), -math.inf)
    token_ids = token_ids.cpu()
    drawn = scores.double().cpu() + gumbel_noise(sampling.seed, position, token_ids)
    return int(token_ids[drawn.argmax()])


def _candidates(scores: torch.Tensor, sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor]:
    """The scores that can be drawn and their token ids; sorted by score where a filter needs that.

    Sorting a whole vocabulary costs more than the draw, so a top-p filter looks at growing parts of the best tokens
    until they hold enough of the mass.
    """
    vocabulary = scores.shape[-1]
    if sampling.top_k is not None:
        best = scores.topk(min(sampling.top_k, vocabulary))
        return best.values, best.indices
    if sampling.top_p == 1.0:
        return scores, torch.arange(vocabulary)
    total = scores.double().logsumexp(-1)
    size = 256
    while True:
        size = min(size * 4, vocabulary)
        best = scores.topk(size)
        probabilities = (best.values.double() - total).exp()
        if size == vocabulary or float(probabilities.sum()) >= sampling.top_p:
            keep = _nucleus(probabilities, sampling.top_p)
            return best.values[:keep], best.indices[:keep]


def _nucleus(probabilities: torch.Tensor, top_p: float) -> int:
    """How many of the sorted `probabilities` it takes to reach `top_p`; at least one."""
    before = probabilities.cumsum(-1) - probabilities
    return max(1, int((before < top_p).sum()))


def _logprobs(row: torch.Tensor, token: int, count: int | None) -> TokenLogprobs | None:
    if count is None:
        return None
    logs = row.log_softmax(-1)
    top: tuple[tuple[int, float], ...] = ()
    if count:
        values, indices = logs.topk(min(count, logs.shape[-1]))
        top = tuple(zip(indices.tolist(), values.tolist(), strict=True))
    return TokenLogprobs(token, float(logs[token]), top)
