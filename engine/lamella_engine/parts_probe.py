"""Whether a family's prompts may be read in several steps, found by reading some both ways.

Families differ in what a step of several tokens makes of the state before it: most go on from it, some forget it, some
compute a single token by another formula. What is written on a family says nothing of it, so a narrow copy reads
prompts whole and in parts, and its logits decide. Called by `architecture`; `narrow_copy` makes the copies.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedModel

from lamella_engine.errors import EngineError
from lamella_engine.narrow_copy import NOT_MADE_FOR, BuildTree, Tree, give_weights, narrow_tree, shortened
from lamella_engine.sequence_state import SequenceState, StateForward
from lamella_engine.state_size import kept_in_modules
from lamella_engine.stepwise import SideBySide

logger = logging.getLogger(__name__)

# Of the largest logit, in float32: rounding gives up to 3e-5 in a few layers, another formula 6e-4 and more, a state
# that is forgotten 0.1 and more.
TOLERANCE = 1e-4
_VISIBLE = 100 * TOLERANCE  # what other tokens before the last few must change, or the copy would not show a difference
_TOKENS = 150
# In blocks of 64, which many families compute in; odd ones, single ones, and boundaries shortly before the end, where
# nothing of what should have been carried over has faded.
_PARTS = ((64, 64, 22), (7, 1, 138, 4), (1, 127, 19, 2, 1))
_NEAR = 4  # tokens behind the last boundary of all
_NEW_TOKENS = (5, 3)  # what comes behind the prompt, one by one


def parts_agree(model: PreTrainedModel, layers: nn.ModuleList, build: BuildTree) -> bool:
    """Whether reading in parts gives the logits of reading at once, but for rounding; False where that is not known.

    Args:
        model: on the meta device, with `layers` its decoder's; it is left as it was.
        build: makes the module tree of a config, on the meta device.
    """
    if not StateForward(model, torch.device("meta")).keeps_state:
        return False  # it computes everything again in every step, so the last part takes as much as the whole
    tree = narrow_tree(model, layers, build)
    short = None if tree is None else shortened(tree, build)
    if tree is None or short is None:
        logger.debug("%s: no narrow copy can be made", model.config.model_type)
        return False
    try:
        return all(_agrees(copy, seed) for copy, seed in ((short, 0), (short, 1), (tree, 2)))
    except (*NOT_MADE_FOR, EngineError) as error:
        logger.debug("%s: the narrow copy does not run: %s", model.config.model_type, error)
        return False


def _agrees(tree: Tree, seed: int) -> bool:
    model, layers = tree
    reader = _Reader(model, layers, seed)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, reader.vocabulary, (_TOKENS,), generator=generator).tolist()
    others = torch.randint(3, reader.vocabulary, (_TOKENS,), generator=generator).tolist()
    whole = reader.read(ids, [_TOKENS])
    if _deviation(reader.read(others[:-_NEAR] + ids[-_NEAR:], [_TOKENS]), whole) < _VISIBLE:
        return False
    return all(_deviation(reader.read(ids, parts), whole) < TOLERANCE for parts in _PARTS)


def _deviation(logits: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, by the largest logit; infinite where something is no number."""
    difference = float((logits - expected).abs().max() / expected.abs().max())
    return difference if difference >= 0 else float("inf")


class _Reader:
    """A narrow copy with weights, read by as a sweep does it."""

    def __init__(self, model: PreTrainedModel, layers: nn.ModuleList, seed: int) -> None:
        for layer in layers:
            layer.__dict__.pop("forward", None)  # of another reader
        model.to("meta")
        in_modules = kept_in_modules(model, layers)
        give_weights(model, seed)
        self.vocabulary = int(model.config.get_text_config(decoder=True).vocab_size)
        self._forward = StateForward(model, torch.device("cpu"))
        self._side_by_side = SideBySide(layers, None, in_modules)

    def read(self, ids: Sequence[int], parts: Sequence[int]) -> torch.Tensor:
        """Logits behind the last of `ids`, read in `parts`, and behind each of a few more tokens."""
        state = SequenceState()
        rows = []
        start = 0
        with torch.inference_mode():
            for count in parts:
                logits = self._step(state, ids[start : start + count])
                start += count
            rows.append(logits)
            rows += [self._step(state, [token_id]) for token_id in _NEW_TOKENS]
        return torch.stack(rows)

    def _step(self, state: SequenceState, ids: Sequence[int]) -> torch.Tensor:
        step = (state, partial(self._forward, state, ids))
        return self._side_by_side.run([step], lambda index: None, lambda index: None)[0].float()
