"""Four-bit codes chosen for what a layer is given: each rounding's error is made up for by the numbers after it.

Owns the arithmetic of one matrix. A row ``w`` is to be replaced by codes ``q`` such that ``(w - q) M (w - q)`` is
small, with ``M`` the second moments of the layer's inputs over a text: then the outputs change little, rather than the
weights. Columns are rounded one after the other, and what a column has lost is added, as ``M`` says, to those that are
not rounded yet (GPTQ; Frantar, Ashkboos, Hoefler and Alistarh, "GPTQ: Accurate post-training quantization for
generative pre-trained transformers", 2022). Those with the largest inputs come first, while many are left that can
make up for them. The stored form is that of `four_bit`: expanding knows nothing of this. `layer_inputs` measures the
moments.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lamella_engine.errors import CheckpointError
from lamella_engine.formats.blockwise import CODES
from lamella_engine.formats.four_bit import FourBit, pack_codes
from lamella_engine.formats.scales import BLOCK, EXPONENTS, SCALES, blocks_in, kept_bits, row_exponents, scale_values


@dataclass(frozen=True)
class SpanFeedback:
    """How errors of one span of a matrix's columns are made up for; all on one device.

    Attributes:
        order: int64 [columns], the columns as they are rounded, those with the largest inputs first.
        root: float32 [columns, columns], upper triangular, rows and columns in that order.
        moments: float32 [columns], the mean square of each column's input, in the matrix's own order.
    """

    order: torch.Tensor
    root: torch.Tensor
    moments: torch.Tensor

    def to(self, device: torch.device) -> SpanFeedback:
        """The same on another device."""
        return SpanFeedback(self.order.to(device), self.root.to(device), self.moments.to(device))


Feedback = tuple[SpanFeedback, ...]
"""For each span of a matrix's columns."""

SPAN = 8192
"""Columns at most that make up for each other; a wider matrix has several such spans, so that moments stay small."""
_AT_ONCE = 64  # columns that make up for each other one by one, before all that follow do at once
_DAMPING = 0.01  # of the moments' mean, added to all: directions that the text hardly shows are not trusted
_MORE_DAMPING = (1, 10, 100, 1000)  # where rounding errors of the moments leave them without a root


def spans_of(columns: int) -> list[slice]:
    """The columns of a matrix in spans of nearly equal size, each but the last a multiple of 64."""
    count = -(-columns // SPAN)
    step = -(-blocks_in(columns) // count) * BLOCK
    return [slice(first, min(first + step, columns)) for first in range(0, columns, step)]


def encode_calibrated(format: FourBit, weight: torch.Tensor, feedback: Feedback) -> dict[str, torch.Tensor]:
    """Pack a matrix for what it is given.

    Args:
        format: nf4 or fp4.
        weight: [rows, columns], on the device that packs.
        feedback: for each of `spans_of` the columns, `feedback_of` their inputs' moments.

    Returns:
        The parts, as `Blockwise.encode` makes them.

    Raises:
        CheckpointError: the weight holds infinities or not-a-numbers.
    """
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight.to(torch.float32), (0, -columns % BLOCK))
    format.check_finite(padded)
    kept = kept_bits(padded.view(rows, -1, BLOCK).abs().amax(dim=-1), is_rounded_up=False)
    exponents = row_exponents(kept)
    codes = torch.empty_like(padded, dtype=torch.uint8)
    scales = torch.empty_like(kept, dtype=torch.uint8)
    for span, given in zip(spans_of(columns), feedback, strict=True):
        whole = slice(span.start, span.start + len(given.order))
        blocks = slice(whole.start // BLOCK, whole.stop // BLOCK)
        own = given.to(weight.device)
        numbers = padded[:, whole].view(rows, -1, BLOCK)
        chosen = format.choose_scales(numbers, kept[:, blocks], exponents, own.moments.view(1, -1, BLOCK))
        scales[:, blocks] = chosen
        codes[:, whole] = _rounded_span(format, padded[:, whole], own, scale_values(chosen, exponents))
    packed = pack_codes(codes.view(rows, -1, BLOCK))[:, : format.code_bytes(columns)].contiguous()
    return {CODES: packed, SCALES: scales, EXPONENTS: exponents.to(torch.uint8).view(rows)}


def _rounded_span(format: FourBit, weight: torch.Tensor, feedback: SpanFeedback, scale: torch.Tensor) -> torch.Tensor:
    """The codes of `weight` [rows, columns] under the `scale` of its blocks [rows, blocks], like `weight`."""
    codes = torch.empty_like(weight, dtype=torch.uint8)
    numbers, scale = weight[:, feedback.order], scale[:, feedback.order // BLOCK]
    root, diagonal = feedback.root, feedback.root.diagonal()
    for first in range(0, weight.shape[1], _AT_ONCE):
        some = slice(first, first + _AT_ONCE)
        own, own_root = numbers[:, some], root[some, some]
        errors = torch.empty_like(own)
        for column in range(own.shape[1]):
            code, value = format.round_to_codes(own[:, column], scale[:, first + column])
            codes[:, first + column] = code
            errors[:, column] = (own[:, column] - value) / diagonal[first + column]
            own[:, column + 1 :].addr_(errors[:, column], own_root[column, column + 1 :], alpha=-1)
        numbers[:, some.stop :].addmm_(errors, root[some, some.stop :], alpha=-1)
    return codes[:, torch.argsort(feedback.order)]


def feedback_of(moments: torch.Tensor) -> SpanFeedback:
    """How errors of one span of columns are made up for: the triangular root of the inverse of its moments.

    Args:
        moments: float32 [columns, columns], the mean of ``x x^T`` over the inputs.

    Returns:
        Of a size that is a multiple of 64; columns that are not there stand alone.

    Raises:
        CheckpointError: the moments are no usable numbers.
    """
    size = len(moments)
    whole = torch.zeros(*(2 * [-(-size // BLOCK) * BLOCK]), dtype=torch.float32, device=moments.device)
    whole[:size, :size] = moments
    diagonal = whole.diagonal()
    mean = float(diagonal[:size].mean()) or 1.0
    diagonal[diagonal == 0] = mean  # an input that is always zero says nothing of its column
    squares = diagonal.clone()
    order = torch.argsort(squares, descending=True, stable=True)
    whole = whole[order][:, order]
    for factor in _MORE_DAMPING:
        whole.diagonal().copy_(squares[order] + _DAMPING * factor * mean)
        root, failed = torch.linalg.cholesky_ex(whole)
        if not bool(failed):
            upper: torch.Tensor
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(root), upper=True)
            if not bool(failed) and bool(torch.isfinite(upper).all()):
                return SpanFeedback(order, upper, squares)
    raise CheckpointError(
        "the inputs of a layer over the calibration text are no usable numbers; the checkpoint is damaged, or the "
        "model computes in too narrow a type: leave 'calibrated' out"
    )
