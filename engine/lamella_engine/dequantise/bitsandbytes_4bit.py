"""bitsandbytes, four bits: nf4 and fp4 codes, two a byte, with an absolute maximum a block, which may be packed itself.

A weight's shape, type and block sizes are in a small JSON text that is stored as bytes beside it. The sixteen values
that the codes stand for are stored as well, so that nothing has to be known of them here.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import partial

import torch

from lamella_engine.dequantise.expansion import ExpandedTensor, PackedWeights
from lamella_engine.dequantise.scale_grid import row_parts
from lamella_engine.errors import CheckpointError, UnsupportedModel
from lamella_engine.safetensors_header import TensorEntry

_STATE = ".quant_state.bitsandbytes__"
_TYPES = ("nf4", "fp4")
_MAX_STATE_BYTES = 65_536
_STORED = frozenset({"uint8", "int8", "float16", "bfloat16", "float32"})


@dataclass(frozen=True)
class _State:
    """What the JSON text says; block sizes are counted in numbers. `nested_block` is 0 if maxima are not packed."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    block: int
    nested_block: int
    nested_offset: float


def linears(packed: PackedWeights) -> list[ExpandedTensor]:
    """Every weight that has a state of nf4 or fp4 beside it."""
    found = []
    for name in packed.tensors:
        weight, mark, kind = name.partition(_STATE)
        if mark:
            if kind not in _TYPES:
                raise UnsupportedModel(f"{weight!r} is packed as {kind!r}, of bitsandbytes nf4, fp4 and int8 are read")
            found.append(_linear(packed, weight, name))
    return found


def _linear(packed: PackedWeights, weight: str, state_name: str) -> ExpandedTensor:
    state = _read_state(packed, state_name)
    names = [weight, f"{weight}.absmax", f"{weight}.quant_map", state_name]
    if state.nested_block:
        names += [f"{weight}.nested_absmax", f"{weight}.nested_quant_map"]
    values, absmax, codes, _, *nested = (packed.entry(name, weight) for name in names)
    numbers = math.prod(state.shape)
    blocks = -(-numbers // state.block)
    if values.dtype not in _STORED or values.nbytes != -(-numbers // 2):
        raise _misfit(weight, f"{values.nbytes} bytes of {values.dtype} are not {numbers} numbers of four bits")
    if math.prod(absmax.shape) != blocks or codes.shape != (16,) or codes.dtype != "float32":
        raise _misfit(weight, f"{math.prod(absmax.shape)} maxima and {codes.shape} codes for {blocks} blocks")
    if absmax.dtype != ("uint8" if nested else "float32"):
        raise _misfit(weight, f"its maxima are of type {absmax.dtype}")
    if nested:
        _check_nested(weight, nested, -(-blocks // state.nested_block))
    return ExpandedTensor(weight, state.shape, tuple(names), partial(_run, packed, weight, state))


def _check_nested(weight: str, entries: list[TensorEntry], blocks: int) -> None:
    maxima, codes = entries
    if math.prod(maxima.shape) != blocks or codes.shape != (256,) or {maxima.dtype, codes.dtype} != {"float32"}:
        raise _misfit(weight, f"{math.prod(maxima.shape)} nested maxima for {blocks} nested blocks")


def _run(packed: PackedWeights, weight: str, state: _State) -> torch.Tensor:
    pairs = packed.read(weight).reshape(-1).view(torch.uint8)
    codes = packed.read(f"{weight}.quant_map")
    maxima = _maxima(packed, weight, state)
    numbers = math.prod(state.shape)
    result = torch.empty(numbers, dtype=packed.dtype)
    # Whole blocks at a time, the first of two numbers in the high half of its byte.
    for part in row_parts(maxima.shape[0], state.block):
        first, last = part.start * state.block, min(part.stop * state.block, numbers)
        bytes_of_part = pairs[first // 2 : -(-last // 2)]
        nibbles = torch.stack((bytes_of_part >> 4, bytes_of_part & 15), dim=-1).reshape(-1)[: last - first]
        of_number = maxima[part].repeat_interleave(state.block)[: last - first]
        result[first:last] = (codes[nibbles.to(torch.int32)] * of_number).to(state.dtype)
    return result.reshape(state.shape)


def _maxima(packed: PackedWeights, weight: str, state: _State) -> torch.Tensor:
    maxima = packed.read(f"{weight}.absmax").reshape(-1)
    if not state.nested_block:
        return maxima
    codes, nested = (packed.read(f"{weight}.{part}").reshape(-1) for part in ("nested_quant_map", "nested_absmax"))
    scales = nested.repeat_interleave(state.nested_block)[: maxima.shape[0]]
    return codes[maxima.to(torch.int32)] * scales + torch.tensor(state.nested_offset)


def _read_state(packed: PackedWeights, name: str) -> _State:
    entry = packed.tensors[name]
    if entry.dtype != "uint8" or entry.nbytes > _MAX_STATE_BYTES:
        raise _misfit(name, f"it is {entry.nbytes} bytes of {entry.dtype}, not a small JSON text")
    try:
        values = json.loads(bytes(packed.read(name).tolist()).decode())
        shape = tuple(int(side) for side in values["shape"])
        is_nested = "nested_blocksize" in values
        state = _State(
            shape,
            {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[values["dtype"]],
            int(values["blocksize"]),
            int(values["nested_blocksize"]) if is_nested else 0,
            float(values["nested_offset"]) if is_nested else 0.0,
        )
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _misfit(name, f"it is not the JSON text of a packed weight ({type(error).__name__}: {error})") from error
    if not shape or min(shape) < 1 or state.block < 2 or state.block % 2 or (is_nested and state.nested_block < 1):
        raise _misfit(name, f"it says shape {list(shape)} and blocks of {state.block}")
    return state


def _misfit(name: str, reason: str) -> CheckpointError:
    return CheckpointError(f"{name!r} is not packed as bitsandbytes packs: {reason}. Fetch the checkpoint again")
