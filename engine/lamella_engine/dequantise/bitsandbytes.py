"""bitsandbytes: which of its two formats a checkpoint has is told by the tensors, weight by weight."""

from __future__ import annotations

from lamella_engine.dequantise import bitsandbytes_4bit, bitsandbytes_8bit, settings
from lamella_engine.dequantise.expansion import Expansion, PackedWeights, expansion
from lamella_engine.dequantise.settings import Settings


def describe(values: Settings) -> str:
    """Check the settings of bitsandbytes and say what they mean."""
    if settings.flag(values, "load_in_8bit"):
        return "bitsandbytes, int8"
    if settings.flag(values, "load_in_4bit"):
        return f"bitsandbytes, {settings.text(values, 'bnb_4bit_quant_type', default='fp4')}"
    return "bitsandbytes"


def expand(packed: PackedWeights) -> Expansion:
    """Expand whatever has the state of a four-bit or the maxima of an eight-bit weight beside it."""
    tensors = [*bitsandbytes_4bit.linears(packed), *bitsandbytes_8bit.linears(packed)]
    return expansion(packed, describe(packed.settings), tensors)
