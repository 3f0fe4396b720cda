"""What changes a sequence's logits before a token is drawn: penalties, biases, and the mask of its response format.

Owns these three and their order, for those rows only that have any; `sampler` draws. As the OpenAI API has it a bias is
added to the logit; a mask comes last, so that nothing brings back what the format forbids.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from lamella_engine.errors import SequenceError
from lamella_engine.grammar import STUCK, GrammarWalk
from lamella_engine.sequence_types import Sampling


@dataclass(frozen=True)
class Draw:
    """What the sampler must know of one sequence: its parameters, its tokens so far, and its format if it has one."""

    sampling: Sampling
    prompt_ids: list[int]
    generated_ids: list[int]
    walk: GrammarWalk | None = None

    @property
    def adjusts(self) -> bool:
        """Whether its logits are changed at all."""
        return self.walk is not None or bool(self.sampling.logit_bias) or _has_penalty(self.sampling)


def adjust(rows: torch.Tensor, draws: list[Draw]) -> list[SequenceError | None]:
    """Change `rows` (float32 [len(draws), vocabulary]) in place; for each row what is wrong with it, if anything."""
    for row, draw in zip(rows, draws, strict=True):
        if _has_penalty(draw.sampling):
            _penalise(row, draw)
        if draw.sampling.logit_bias:
            token_ids, biases = zip(*draw.sampling.logit_bias, strict=True)
            at = torch.tensor(token_ids, device=row.device)
            row.index_add_(0, at, torch.tensor(biases, dtype=row.dtype, device=row.device))
    return _mask(rows, draws)


def _mask(rows: torch.Tensor, draws: list[Draw]) -> list[SequenceError | None]:
    errors: list[SequenceError | None] = [None] * len(draws)
    places, masks = [], []
    for place, draw in enumerate(draws):
        if draw.walk is None:
            continue
        try:
            masks.append(draw.walk.bits())
            places.append(place)
        except SequenceError as error:
            errors[place] = error
    if not places:
        return errors
    bits = torch.stack(masks).to(rows.device)
    allowed = (bits[:, :, None] >> torch.arange(8, dtype=torch.uint8, device=rows.device)) & 1
    allowed = allowed.flatten(1)[:, : rows.shape[-1]].bool()
    masked = rows[places].masked_fill(~allowed, -math.inf)
    rows[places] = masked
    for place, is_left in zip(places, (masked.amax(-1) > -math.inf).tolist(), strict=True):
        if not is_left:
            errors[place] = SequenceError(STUCK, "the response format allows none of the model's tokens here")
    return errors


def _has_penalty(sampling: Sampling) -> bool:
    return sampling.repetition_penalty != 1.0 or sampling.presence_penalty != 0.0 or sampling.frequency_penalty != 0.0


def _penalise(row: torch.Tensor, draw: Draw) -> None:
    """The penalties, in place: repetition over prompt and generated tokens, the others over generated ones."""
    sampling = draw.sampling
    if sampling.repetition_penalty != 1.0:
        seen = torch.tensor(sorted({*draw.prompt_ids, *draw.generated_ids}), device=row.device)
        scores = row[seen]
        row[seen] = torch.where(scores < 0, scores * sampling.repetition_penalty, scores / sampling.repetition_penalty)
    if draw.generated_ids and (sampling.presence_penalty or sampling.frequency_penalty):
        tokens = torch.tensor(draw.generated_ids, device=row.device)
        seen, counts = torch.unique(tokens, return_counts=True)
        row[seen] -= sampling.presence_penalty + sampling.frequency_penalty * counts
