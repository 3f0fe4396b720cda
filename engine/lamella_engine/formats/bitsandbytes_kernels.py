"""bitsandbytes' kernels for four-bit codes, where that package is installed and no kernel of ours can be compiled.

Owns asking for the package (once, when first needed: importing it takes seconds) and the shapes its kernels want. It
multiplies a float32 code with a float32 scale and rounds once, as torch's operations here do. Neighbour: `blockwise`.
"""

from __future__ import annotations

import functools
import importlib
import logging
import math

import torch

from lamella_engine.formats.block_kernel import BlockKernel
from lamella_engine.formats.scales import BLOCK

_log = logging.getLogger(__name__)


def can_expand(kernel: BlockKernel, out: torch.Tensor) -> bool:
    """Whether `expand` takes it: four-bit codes on CUDA, the package and its library for this device."""
    return bool(kernel.table) and out.device.type == "cuda" and _is_installed()


def can_multiply(kernel: BlockKernel, x: torch.Tensor) -> bool:
    """Whether `multiply` takes it."""
    return can_expand(kernel, x)


def expand(kernel: BlockKernel, codes: torch.Tensor, scales: torch.Tensor, out: torch.Tensor) -> None:
    """Expand codes [rows, columns / 2] with float32 scales [rows, columns / 64] into `out` [rows, columns]."""
    torch.ops.bitsandbytes.dequantize_4bit.out(
        codes, scales, BLOCK, kernel.name, list(out.shape), out.dtype, out=out
    )  # fmt: skip


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
    try:
        importlib.import_module("bitsandbytes")
    except (ImportError, OSError, RuntimeError) as error:
        _log.info("bitsandbytes is not used: %s", error)
        return False
    return hasattr(torch.ops.bitsandbytes, "dequantize_4bit")
