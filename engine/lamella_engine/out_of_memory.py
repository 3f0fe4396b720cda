"""Which errors say that memory was short, on the device or on the host.

Knows the words of torch and its libraries; `engine` asks it what to do about a sweep that failed.
"""

from __future__ import annotations

import torch

_WORDS = (
    "out of memory",  # the driver's, through torch's AcceleratorError
    "can't allocate memory",  # torch's allocator on a CPU, a plain RuntimeError
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the same work may succeed with less of it at once."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS)


def free_what_is_cached(device: torch.device) -> None:
    """Give back what the allocator of `device` keeps for later, whose pieces may be too small for what comes."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
