"""Packed formats of weights: fewer bytes to move, expanded on the device that computes.

In the order data flows through them:

- `format`: the interface, and how a tensor is seen.
- `registry`: all formats, by name.
- `blockwise`: what `four_bit` (nf4, fp4) and `int8` share; `scales` and `codes` are their numbers.
- `lossless`, `lossless_bits`: bfloat16 in fewer bytes, bit for bit.
- `kernels`, `nvrtc`, `kernels.cu`: the CUDA kernels, compiled at run time; `block_kernel` says which one is meant.
- `bitsandbytes_kernels`: that package's kernels, where ours cannot be compiled.
- `calibrated_rounding`: four-bit codes chosen for what a layer is given.
- `error`: how much a format changes a weight.

Tensors in, tensors out: nothing here knows of shards, streams or models. `quant_spec` beside this package says which
tensor of a model gets which format; `dequantise` reads checkpoints that others packed.
"""

from lamella_engine.formats.error import PackingError, packing_error
from lamella_engine.formats.format import FULL_DTYPES, Format, Parts, PartSpec, packed_bytes
from lamella_engine.formats.registry import CALIBRATED_FORMATS, FORMATS, find_format

__all__ = [
    "CALIBRATED_FORMATS",
    "FORMATS",
    "FULL_DTYPES",
    "Format",
    "PackingError",
    "PartSpec",
    "Parts",
    "find_format",
    "packed_bytes",
    "packing_error",
]
