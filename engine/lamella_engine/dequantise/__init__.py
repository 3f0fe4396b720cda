"""Quantised checkpoints read as if they were not: packed tensors expanded one at a time, to the type that computes.

In the order data flows through them:

- `settings`: the quantisation settings of a config, read strictly.
- `expansion`: what a format turns into what, before anything is read.
- `methods`: which format a checkpoint has; anything else is refused with the reason.
- `float8`, `compressed_tensors`, `mxfp4`, `gptq`, `awq`, `bitsandbytes_4bit`, `bitsandbytes_8bit`: one file a format.
- `scale_grid`, `bit_packing`: the arithmetic that they share.

`checkpoint` asks for an expansion and serves its tensors under the names of the unquantised checkpoint, so that
`convert` and everything after it knows of no packed format.
"""

from lamella_engine.dequantise.expansion import ExpandedTensor, Expansion, PackedWeights
from lamella_engine.dequantise.methods import (
    CONFIG_KEYS,
    check_settings,
    expanded_dtype,
    find_settings,
    forget_settings,
    open_expansion,
)

__all__ = [
    "CONFIG_KEYS",
    "ExpandedTensor",
    "Expansion",
    "PackedWeights",
    "check_settings",
    "expanded_dtype",
    "find_settings",
    "forget_settings",
    "open_expansion",
]
