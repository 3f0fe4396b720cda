"""bitsandbytes' kernels for four-bit codes: on processors, and on CUDA where no kernel of ours can be compiled.

Owns asking for the package (once, when first needed: importing it takes seconds) and the shapes its kernels want. It
multiplies a float32 code with a float32 scale and rounds once, as torch's operations here do. Neighbour: `blockwise`.
"""

from __future__ import annotations

import functools
import importlib
import logging
import math
import warnings

import torch

from lamella_engine.formats.block_kernel import BlockKernel
from lamella_engine.formats.format import row_chunks
from lamella_engine.formats.scales import BLOCK

_log = logging.getLogger(__name__)
_PACKAGE = "bitsandbytes"
_AT_ONCE = 1 << 20  # numbers: on a processor the kernels make a tensor of their own, which should stay in the cache


def prepare(kernel: BlockKernel) -> None:
    """Import the package, if it could be used."""
    if kernel.table:
        _is_installed()


def can_expand(kernel: BlockKernel, out: torch.Tensor) -> bool:
    """Whether `expand` takes it: four-bit codes on a processor or on CUDA, and the package is there."""
    return bool(kernel.table) and out.device.type in ("cpu", "cuda") and _is_installed()


def can_multiply(kernel: BlockKernel, x: torch.Tensor) -> bool:
    """Whether `multiply` takes it: it does on CUDA only, from contiguous input."""
    return x.device.type == "cuda" and x.is_contiguous() and can_expand(kernel, x)


def expand(kernel: BlockKernel, codes: torch.Tensor, scales: torch.Tensor, out: torch.Tensor) -> None:
    """Expand codes [rows, columns / 2] with float32 scales [rows, columns / 64] into `out` [rows, columns]."""
    if out.device.type == "cuda":
        torch.ops.bitsandbytes.dequantize_4bit.out(
            codes, scales, BLOCK, kernel.name, list(out.shape), out.dtype, out=out
        )  # fmt: skip
        return
    for chunk in row_chunks(out.shape[0], out.shape[1], _AT_ONCE):
        shape = list(out[chunk].shape)
        out[chunk] = torch.ops.bitsandbytes.dequantize_4bit(
            codes[chunk], scales[chunk], BLOCK, kernel.name, shape, out.dtype
        )


def multiply(
    kernel: BlockKernel, codes: torch.Tensor, scales: torch.Tensor, x: torch.Tensor, out: torch.Tensor
) -> None:
    """One row of input [..., columns] times the rows of a matrix; arguments as in `expand`."""
    row, columns = x.reshape(1, -1), x.shape[-1]
    shape = [math.prod(out.shape), columns]
    torch.ops.bitsandbytes.gemv_4bit.out(
        row, codes.view(-1, 1), shape, scales, _table(kernel, x.device), BLOCK, out=out.view(1, -1)
    )


@functools.cache
def _table(kernel: BlockKernel, device: torch.device) -> torch.Tensor:
    return torch.tensor(kernel.table, dtype=torch.float32, device=device)


@functools.cache
def _is_installed() -> bool:
    # It warns of what it lacks for uses that are not ours.
    package_log = logging.getLogger(_PACKAGE)
    level = package_log.level
    package_log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module(_PACKAGE)
    except (ImportError, OSError, RuntimeError) as error:
        _log.info("bitsandbytes is not used: %s", error)
        return False
    finally:
        package_log.setLevel(level)
    return hasattr(torch.ops.bitsandbytes, "dequantize_4bit")
