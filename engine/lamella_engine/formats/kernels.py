"""Lamella's own CUDA kernels for packed weights: compiled once a device and type of result, then started.

Owns which kernels are ready and the arguments they take; `kernels.cu` is what they do, `nvrtc` how they are compiled.
Where they cannot be compiled, that is said once in the log, and the formats expand by other means.
"""

from __future__ import annotations

import importlib.resources
import logging
import threading

import torch

from lamella_engine.formats.block_kernel import BlockKernel
from lamella_engine.formats.codes import FP4, NF4
from lamella_engine.formats.nvrtc import Argument, Kernel, KernelError, compile_kernels

_log = logging.getLogger(__name__)

OUT_MACROS = {torch.bfloat16: "OUT_BF16", torch.float16: "OUT_FP16", torch.float32: "OUT_FP32"}
SIGNATURES = {
    "expand_nf4": 7,
    "expand_fp4": 7,
    "expand_int8": 7,
    "expand_lossless": 11,
    "multiply_nf4": 7,
    "multiply_fp4": 7,
    "multiply_int8": 7,
}
_THREADS = 256
_WARP = 32
_IN_A_WARP = 256  # numbers, eight a thread
_MAX_THREADS = 0xFFFF_FFFF  # the kernels count threads in 32 bits
_WIDE, _WIDE_CODES = 16, 8  # bytes of numbers and of codes that are moved in one piece

_lock = threading.Lock()
_ready: dict[tuple[int, torch.dtype], dict[str, Kernel] | None] = {}  # None: cannot be compiled, said already


def source() -> str:
    """The text of the kernels."""
    return importlib.resources.files(__package__).joinpath("kernels.cu").read_text(encoding="utf-8")


def macros(dtype: torch.dtype) -> dict[str, str]:
    """What the source is compiled with for results of `dtype`."""
    tables = {name: ",".join(f"{number!r}f" for number in table) for name, table in (("NF4", NF4), ("FP4", FP4))}
    return {OUT_MACROS[dtype]: "1", **{f"{name}_TABLE": text for name, text in tables.items()}}


def prepare(device: torch.device, dtype: torch.dtype) -> None:
    """Compile the kernels for results of `dtype`, if that has not been tried."""
    if device.type == "cuda":
        _kernels(device, dtype)


def are_ready(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether there are kernels for results of `dtype` on `device`; compiles them if that has not been tried."""
    return device.type == "cuda" and dtype in OUT_MACROS and _kernels(device, dtype) is not None


def expand_blocks(
    kernel: BlockKernel, codes: torch.Tensor, scales: torch.Tensor, exponents: torch.Tensor, out: torch.Tensor
) -> None:
    """Expand a blockwise format into `out` [rows, columns]."""
    rows, columns = out.shape
    eights = rows * -(-columns // 8)
    assert eights <= _MAX_THREADS
    arguments: list[Argument] = [codes, scales, exponents, out, eights, columns, int(_is_wide(columns, codes, out))]
    _launch(f"expand_{kernel.name}", eights, arguments, out)


def expand_lossless(
    mantissas: torch.Tensor,
    codes: torch.Tensor,
    starts: torch.Tensor,
    escapes: torch.Tensor,
    books: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Expand the parts of `lossless` into `out` [matrices, rows, columns]."""
    matrices, rows, columns = out.shape
    warps = matrices * rows * -(-columns // _IN_A_WARP)
    assert warps * _WARP <= _MAX_THREADS
    counts = [warps, columns, rows, escapes.shape[-1], int(_is_wide(columns, mantissas, out))]
    _launch("expand_lossless", warps * _WARP, [mantissas, codes, starts, escapes, books, out, *counts], out)


def can_multiply(codes: torch.Tensor, x: torch.Tensor) -> bool:
    """Whether `multiply` takes a matrix and an input."""
    return x.is_contiguous() and _is_wide(x.shape[-1], codes, x)


def multiply(
    kernel: BlockKernel,
    codes: torch.Tensor,
    scales: torch.Tensor,
    exponents: torch.Tensor,
    x: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Multiply the one row of `x` with each row of a matrix, into `out`."""
    rows, columns = codes.shape[0], x.shape[-1]
    _launch(f"multiply_{kernel.name}", rows * _WARP, [codes, scales, exponents, x, out, rows, columns], out)


def _launch(name: str, threads: int, arguments: list[Argument], out: torch.Tensor) -> None:
    for part in arguments:
        if isinstance(part, torch.Tensor) and not (part.is_contiguous() and part.device == out.device):
            raise ValueError(
                f"{name} takes contiguous tensors on {out.device}, not {list(part.shape)} on {part.device}"
            )
    kernels = _kernels(out.device, out.dtype)
    assert kernels is not None
    kernels[name].launch(-(-threads // _THREADS), _THREADS, arguments, out.device)


def _kernels(device: torch.device, dtype: torch.dtype) -> dict[str, Kernel] | None:
    key = (torch.cuda.current_device() if device.index is None else device.index, dtype)
    if key in _ready:
        return _ready[key]
    with _lock:
        if key not in _ready:
            _ready[key] = _compile(torch.device("cuda", key[0]), dtype)
        return _ready[key]


def _compile(device: torch.device, dtype: torch.dtype) -> dict[str, Kernel] | None:
    try:
        return compile_kernels(source(), SIGNATURES, macros(dtype), device)
    except KernelError as error:
        _log.warning("packed weights expand by torch's own operations on %s, which is slower: %s", device, error)
        return None


def _is_wide(columns: int, codes: torch.Tensor, numbers: torch.Tensor) -> bool:
    """Whether eight numbers can be moved in one piece, to or from every row."""
    return columns % 8 == 0 and codes.data_ptr() % _WIDE_CODES == 0 and numbers.data_ptr() % _WIDE == 0
