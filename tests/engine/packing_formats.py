"""Packs the linear layers of a tiny checkpoint as published quantised ones are, and says what they are worth.

Written from the formats' descriptions, number by number, with nothing from the engine: each function returns the stored
tensors of one weight and the values that they stand for.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy
import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
Settings = dict[str, object]


class Packed(NamedTuple):
    """`stored` by the end of its name (after the module's path and a dot), and the `value` of the whole weight."""

    stored: Tensors
    value: torch.Tensor


def is_linear(name: str, tensor: torch.Tensor) -> bool:
    """True for the projections of the layers; embedding, norms, routers and head are left alone."""
    return tensor.dim() == 2 and name.endswith("_proj.weight")


def repack(
    source: Path,
    target: Path,
    settings: Settings | None,
    pack: Callable[[torch.Tensor], Packed],
    *,
    dtype: torch.dtype = torch.bfloat16,
    chosen: Callable[[str, torch.Tensor], bool] = is_linear,
) -> Path:
    """Write `source` to `target` packed, and to ``target-plain`` with the values that the packed tensors stand for."""
    plain = plain_twin(target)
    packed_tensors, plain_tensors = Tensors(), Tensors()
    for name, tensor in load_file(source / "model.safetensors").items():
        if not chosen(name, tensor):
            packed_tensors[name] = plain_tensors[name] = tensor.to(dtype)
            continue
        packed = pack(tensor.float())
        path = name.removesuffix("weight")
        packed_tensors |= {path + end: value.contiguous() for end, value in packed.stored.items()}
        plain_tensors[name] = packed.value.to(dtype).contiguous()
    config = json.loads((source / "config.json").read_text()) | {"dtype": str(dtype).removeprefix("torch.")}
    for directory, tensors in ((target, packed_tensors), (plain, plain_tensors)):
        directory.mkdir(parents=True)
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        for file in source.iterdir():
            if file.name not in ("model.safetensors", "config.json"):
                (directory / file.name).write_bytes(file.read_bytes())
    (plain / "config.json").write_text(json.dumps(config))
    told = config if settings is None else config | {"quantization_config": settings}
    (target / "config.json").write_text(json.dumps(told))
    return target


def plain_twin(target: Path) -> Path:
    return target.with_name(f"{target.name}-plain")


def fp8_blocks(weight: torch.Tensor, rows: int, columns: int, scale: str = "weight_scale_inv") -> Packed:
    """float8 in blocks, the last ones cut short."""
    grid = torch.empty(-(-weight.shape[0] // rows), -(-weight.shape[1] // columns))
    stored, value = torch.empty(weight.shape, dtype=torch.float8_e4m3fn), torch.empty(weight.shape)
    for i in range(grid.shape[0]):
        for j in range(grid.shape[1]):
            block = (slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns))
            grid[i, j] = weight[block].abs().max() / 448.0
            stored[block] = (weight[block] / grid[i, j]).to(torch.float8_e4m3fn)
            value[block] = stored[block].float() * grid[i, j]
    return Packed({"weight": stored, scale: grid}, value)


def fp8_tensor(weight: torch.Tensor, scale: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Packed:
    """float8 under one scale, stored with `shape`."""
    factor = (weight.abs().max() / 448.0).to(dtype)
    stored = (weight / factor.float()).to(torch.float8_e4m3fn)
    value = (stored.float() * factor.float()).to(dtype)
    return Packed({"weight": stored, scale: factor.reshape(shape)}, value)


def fp8_rows(weight: torch.Tensor, scale: str, dtype: torch.dtype = torch.float32) -> Packed:
    """float8, a scale a row."""
    factors = (weight.abs().amax(1, keepdim=True) / 448.0).to(dtype)
    stored = (weight / factors.float()).to(torch.float8_e4m3fn)
    return Packed({"weight": stored, scale: factors}, (stored.float() * factors.float()).to(dtype))


def as_words(numbers: numpy.ndarray, bits: int) -> torch.Tensor:
    """Rows of small numbers as rows of 32-bit words: one long binary number a row, its lowest digits first."""
    width = -(-numbers.shape[1] * bits // 32)
    words = numpy.zeros((numbers.shape[0], width), dtype=numpy.uint32)
    for row in range(numbers.shape[0]):
        whole = 0
        for place, number in enumerate(numbers[row].tolist()):
            whole |= int(number) << (place * bits)
        words[row] = [(whole >> (32 * word)) & 0xFFFFFFFF for word in range(width)]
    return torch.from_numpy(words.view(numpy.int32))


def grouped(
    weight: torch.Tensor, bits: int, size: int, *, groups: torch.Tensor | None = None
) -> tuple[Tensors, torch.Tensor]:
    """Whole numbers with a scale and a zero point a group of inputs: ``q``, ``scales`` [out, groups], ``zeros``."""
    most = (1 << bits) - 1
    of_input = torch.arange(weight.shape[1]) // size if groups is None else groups
    count = int(of_input.max()) + 1
    q = torch.empty(weight.shape, dtype=torch.int64)
    value = torch.empty(weight.shape)
    scales, zeros = torch.empty(weight.shape[0], count), torch.empty(weight.shape[0], count, dtype=torch.int64)
    for group in range(count):
        inside = (of_input == group).nonzero().flatten()
        part = weight[:, inside]
        low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
        scales[:, group] = ((high - low) / most).half().float()
        zeros[:, group] = (-low / scales[:, group]).round().clamp(0, most).long()
        numbers = ((part / scales[:, group, None]).round().long() + zeros[:, group, None]).clamp(0, most)
        q[:, inside] = numbers
        value[:, inside] = (numbers - zeros[:, group, None]).float() * scales[:, group, None]
    return {"q": q, "scales": scales, "zeros": zeros}, value


def gptq(weight: torch.Tensor, bits: int, size: int, *, act_order: bool = False, first_version: bool = True) -> Packed:
    inputs = weight.shape[1]
    order = torch.arange(inputs) // size
    if act_order:
        order = order[torch.randperm(inputs, generator=torch.Generator().manual_seed(inputs))]
    parts, value = grouped(weight, bits, size, groups=order)
    zeros = (parts["zeros"] - int(first_version)) % (1 << bits)
    stored = {
        "qweight": as_words(parts["q"].numpy(), bits).t(),
        "qzeros": as_words(zeros.t().numpy(), bits),
        "scales": parts["scales"].t().half(),
        "g_idx": order.to(torch.int32),
    }
    return Packed(stored, value)


def awq(weight: torch.Tensor, size: int) -> Packed:
    parts, value = grouped(weight, 4, size)

    def interleaved(numbers: torch.Tensor) -> torch.Tensor:
        """[rows, outputs]: in each eight, first the even ones, then the odd ones."""
        eights = numbers.reshape(numbers.shape[0], -1, 8)
        return torch.cat([eights[..., 0::2], eights[..., 1::2]], dim=-1).reshape(numbers.shape)

    stored = {
        "qweight": as_words(interleaved(parts["q"].t()).numpy(), 4),
        "qzeros": as_words(interleaved(parts["zeros"].t()).numpy(), 4),
        "scales": parts["scales"].t().half(),
    }
    return Packed(stored, value)


def packed_whole(weight: torch.Tensor, bits: int, size: int, *, symmetric: bool, dtype: torch.dtype) -> Packed:
    """compressed-tensors' pack-quantized: signed numbers moved up by half their range."""
    half = 1 << (bits - 1)
    columns = weight.reshape(weight.shape[0], -1, size)
    if symmetric:
        scales = (columns.abs().amax(2) / (half - 0.5)).to(dtype)
        zeros = torch.zeros(scales.shape, dtype=torch.int64)
    else:
        low, high = columns.amin(2).clamp(max=0), columns.amax(2).clamp(min=0)
        scales = ((high - low) / (2 * half - 1)).to(dtype)
        zeros = (-half - low / scales.float()).round().clamp(-half, half - 1).long()
    signed = ((columns / scales.float()[..., None]).round().long() + zeros[..., None]).clamp(-half, half - 1)
    value = ((signed - zeros[..., None]).float() * scales.float()[..., None]).to(dtype).reshape(weight.shape)
    stored = {
        "weight_packed": as_words((signed + half).reshape(weight.shape).numpy(), bits),
        "weight_scale": scales,
        "weight_shape": torch.tensor(weight.shape),
    }
    if not symmetric:
        stored["weight_zero_point"] = as_words((zeros + half).t().numpy(), bits).t()
    return Packed(stored, value)


NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip


def bnb_4bit(weight: torch.Tensor, *, nested: bool, block: int = 64, nested_block: int = 256) -> Packed:
    codes = torch.tensor(NF4)
    flat = weight.reshape(-1)
    blocks = [flat[first : first + block] for first in range(0, flat.numel(), block)]
    maxima = torch.stack([part.abs().max() for part in blocks])
    state: Settings = {
        "quant_type": "nf4", "blocksize": block, "dtype": "bfloat16", "shape": list(weight.shape),
    }  # fmt: skip
    stored: Tensors = {}
    if nested:
        offset = maxima.mean()
        nested_codes = torch.linspace(-1, 1, 256)
        chunks = [(maxima - offset)[first : first + nested_block] for first in range(0, len(blocks), nested_block)]
        scales = torch.stack([chunk.abs().max() for chunk in chunks])
        indices = torch.cat(
            [
                (chunk[:, None] / scale - nested_codes).abs().argmin(1)
                for chunk, scale in zip(chunks, scales, strict=True)
            ]
        )
        of_block = torch.arange(len(blocks)) // nested_block
        maxima = nested_codes[indices] * scales[of_block] + offset
        stored |= {"absmax": indices.to(torch.uint8), "nested_absmax": scales, "nested_quant_map": nested_codes}
        state |= {"nested_blocksize": nested_block, "nested_dtype": "float32", "nested_offset": offset.item()}
    else:
        stored["absmax"] = maxima
    numbers = torch.cat(
        [(part[:, None] / top - codes).abs().argmin(1) for part, top in zip(blocks, maxima, strict=True)]
    )
    value = codes[numbers] * maxima.repeat_interleave(block)[: flat.numel()]
    text = numpy.frombuffer(json.dumps(state).encode(), dtype=numpy.uint8).copy()
    stored |= {"quant_map": codes, "quant_state.bitsandbytes__nf4": torch.from_numpy(text)}
    halves = numbers.reshape(-1, 2)
    packed = (halves[:, 0] * 16 + halves[:, 1]).to(torch.uint8).reshape(-1, 1)
    return Packed(
        {"weight": packed} | {f"weight.{end}": part for end, part in stored.items()}, value.reshape(weight.shape)
    )


def bnb_8bit(weight: torch.Tensor) -> Packed:
    maxima = weight.abs().amax(1)
    numbers = (weight * (127.0 / maxima[:, None])).round().to(torch.int8)
    value = numbers.float() * maxima[:, None] * (1 / 127)
    return Packed({"weight": numbers, "SCB": maxima, "weight_format": torch.tensor(0, dtype=torch.uint8)}, value)


FP4_STEPS = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def mxfp4(experts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[experts, in, out] -> blocks [experts, out, groups, 16], scales [experts, out, groups], and their values."""
    count, inputs, outputs = experts.shape
    values = experts.transpose(1, 2).reshape(count, outputs, inputs // 32, 32)
    exponents = torch.floor(torch.log2(values.abs().amax(-1).clamp(min=1e-20))) - 2
    scaled = values / torch.exp2(exponents)[..., None]
    steps = torch.tensor(FP4_STEPS)
    codes = (scaled.abs()[..., None] - steps).abs().argmin(-1)
    worth = steps[codes] * scaled.sign() * torch.exp2(exponents)[..., None]
    codes = codes + 8 * (scaled < 0)
    blocks = (codes[..., 0::2] + 16 * codes[..., 1::2]).to(torch.uint8)
    return blocks, (exponents + 127).to(torch.uint8), worth.reshape(count, outputs, inputs).transpose(1, 2)
