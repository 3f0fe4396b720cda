"""How fast packed weights expand, beside a plain copy of the same output bytes in the same run.

    python -m benchmarks.formats --device cuda --json FILE
    python -m benchmarks.formats --device cpu --rows 2048 --columns 2048

Packs a random normal matrix (or one of a safetensors file, with --weights) in every format and expands it by each
means that this machine has: the formats' own choice, torch's operations, bitsandbytes. Several copies take turns, so
that no cache holds them. Figures are medians; GB/s are those of the expanded bytes, as the copy's are of the copied
ones. At one row of input, products with packed weights stand beside the product with full ones.
"""

from __future__ import annotations

import argparse
import math
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from benchmarks.json_file import write_json
from benchmarks.machine import Bystanders, machine_facts
from lamella_engine.formats import FORMATS, Format, Parts, bitsandbytes_kernels, packing_error
from lamella_engine.formats.blockwise import Blockwise
from lamella_engine.formats.lossless import Lossless
from lamella_engine.formats.scales import BLOCK, scale_values

OUT_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
Means = dict[str, Callable[[Parts, torch.Tensor], None]]


def main(argv: list[str] | None = None) -> int:
    """Measure everything and say it."""
    arguments = _parser().parse_args(argv)
    device, dtype = torch.device(arguments.device), OUT_DTYPES[arguments.dtype]
    weight = _weight(arguments)
    bystanders = Bystanders()
    timer = _Timer(device, arguments.repeats)
    copies = max(2, math.ceil(arguments.working_set / weight.nbytes))
    results: dict[str, Any] = {
        "command": f"python -m benchmarks.formats {shlex.join(argv or sys.argv[1:])}",
        "machine": machine_facts(arguments.json.parent if arguments.json else Path.cwd(), arguments.device),
        "threads": torch.get_num_threads(),
        "shape": list(weight.shape),
        "out": arguments.dtype,
        "copies": copies,
        "copy": _copy(weight.to(dtype), copies, timer),
        "product_full": _full_product(weight.to(dtype), copies, timer),
        "formats": {name: _measure(format, weight, dtype, copies, timer) for name, format in FORMATS.items()},
    }
    results["others_busy_cores"] = bystanders.busy_cores()
    _say(results)
    if arguments.json:
        write_json(arguments.json, results)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="How fast packed weights expand.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=14336)
    parser.add_argument("--sigma", type=float, default=0.02, help="of the random weights")
    parser.add_argument("--weights", nargs=2, metavar=("FILE", "TENSOR"), help="a matrix of a safetensors file instead")
    parser.add_argument("--dtype", choices=OUT_DTYPES, default="bfloat16", help="what weights expand to")
    parser.add_argument("--repeats", type=int, default=20, help="timings of each figure")
    parser.add_argument("--working-set", type=int, default=512 << 20, help="bytes of full weights that take turns")
    parser.add_argument("--json", type=Path, help="write all figures here")
    return parser


def _weight(arguments: argparse.Namespace) -> torch.Tensor:
    if arguments.weights:
        path, name = arguments.weights
        with safe_open(path, "pt", device=arguments.device) as file:
            tensor: torch.Tensor = file.get_tensor(name)
        return tensor.to(torch.bfloat16)
    generator = torch.Generator(arguments.device).manual_seed(0)
    shape = (arguments.rows, arguments.columns)
    numbers = torch.randn(shape, generator=generator, device=arguments.device)
    numbers *= arguments.sigma
    return numbers.to(torch.bfloat16)


class _Timer:
    """Seconds of one call; on CUDA the device's own, of a recorded graph, so that launching is not what counts."""

    def __init__(self, device: torch.device, repeats: int) -> None:
        self._is_cuda = device.type == "cuda"
        self._repeats = repeats

    def seconds(self, calls: list[Callable[[], None]]) -> float:
        """The median over rounds of the mean over `calls`; the first two rounds do not count."""
        run = self._recorded(calls) if self._is_cuda else lambda: _call_all(calls)
        rounds = [self._round(run) for _ in range(self._repeats + 2)]
        return statistics.median(rounds[2:]) / len(calls)

    def _round(self, run: Callable[[], None]) -> float:
        if not self._is_cuda:
            began = time.perf_counter()
            run()
            return time.perf_counter() - began
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call] # torch's
        start.record()
        run()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    @staticmethod
    def _recorded(calls: list[Callable[[], None]]) -> Callable[[], None]:
        _call_all(calls)  # whatever is made at the first call is made now
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            _call_all(calls)
        replay: Callable[[], None] = graph.replay
        return replay


def _call_all(calls: list[Callable[[], None]]) -> None:
    for call in calls:
        call()


def _copy(full: torch.Tensor, copies: int, timer: _Timer) -> dict[str, float]:
    sources = [full.clone() for _ in range(copies)]
    out = torch.empty_like(full)
    seconds = timer.seconds([lambda source=source: out.copy_(source) for source in sources])  # type: ignore[misc] # bound
    return {"seconds": seconds, "gb_per_s": full.nbytes / seconds / 1e9}


def _full_product(full: torch.Tensor, copies: int, timer: _Timer) -> dict[str, float]:
    sources = [full.clone() for _ in range(copies)]
    x = torch.ones((1, full.shape[1]), dtype=full.dtype, device=full.device)
    out = torch.empty((1, full.shape[0]), dtype=full.dtype, device=full.device)
    seconds = timer.seconds([_bind(torch.mm, x, source.t(), out) for source in sources])
    return {"seconds": seconds}


def _bind(
    mm: Callable[..., torch.Tensor], x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor
) -> Callable[[], None]:
    def call() -> None:
        mm(x, weight, out=out)

    return call


def _measure(format: Format, weight: torch.Tensor, dtype: torch.dtype, copies: int, timer: _Timer) -> dict[str, Any]:
    format.prepare(weight.device, dtype)
    began = time.perf_counter()
    parts = format.encode(weight)
    if weight.device.type == "cuda":
        torch.cuda.synchronize()
    encode_s = time.perf_counter() - began
    error = packing_error(format, weight)
    sets = [{suffix: part.clone() for suffix, part in parts.items()} for _ in range(copies)]
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    found: dict[str, Any] = {
        "relative_error": error.relative,
        "bytes_a_number": error.packed_bytes / weight.numel(),
        "of_bf16": error.packed_bytes / error.full_bytes,
        "encode_numbers_per_s": weight.numel() / encode_s,
        "decode": {},
    }
    for name, expand in _means(format, out).items():
        calls: list[Callable[[], None]] = [lambda own=own, expand=expand: expand(own, out) for own in sets]  # type: ignore[misc] # bound
        seconds = timer.seconds(calls)
        found["decode"][name] = {"seconds": seconds, "gb_per_s": out.nbytes / seconds / 1e9}
    x = torch.ones((1, weight.shape[1]), dtype=dtype, device=weight.device)
    if format.can_matvec(parts, x):
        row = torch.empty((1, weight.shape[0]), dtype=dtype, device=weight.device)
        calls = [lambda own=own: format.matvec(own, x, row) for own in sets]  # type: ignore[misc] # bound
        found["product"] = {"seconds": timer.seconds(calls)}
    return found


def _means(format: Format, out: torch.Tensor) -> Means:
    """Every way to expand that there is here; the first is the one that is used."""
    means: Means = {"used": format.decode}
    if isinstance(format, Blockwise | Lossless):
        means["torch"] = format.decode_with_torch
    if isinstance(format, Blockwise) and out.shape[1] % BLOCK == 0:
        kernel = format.kernel
        if bitsandbytes_kernels.can_expand(kernel, out):
            means["bitsandbytes"] = lambda parts, into: bitsandbytes_kernels.expand(
                kernel, parts["codes"], scale_values(parts["scales"], parts["exponents"][:, None]), into
            )
    return means


def _say(results: dict[str, Any]) -> None:
    copy, full = results["copy"], results["product_full"]
    print(f"{results['machine']['gpu'] or results['machine']['cpu']}, {results['shape']} to {results['out']}")
    print(f"copy: {copy['gb_per_s']:.1f} GB/s; product with full weights at one row: {full['seconds'] * 1e6:.1f} us")
    for name, found in results["formats"].items():
        speeds = ", ".join(f"{means} {speed['gb_per_s']:.1f}" for means, speed in found["decode"].items())
        product = f"; product {found['product']['seconds'] * 1e6:.1f} us" if "product" in found else ""
        print(
            f"{name:>9}: {found['of_bf16']:.4f} of bf16, error {found['relative_error']:.5f}; "
            f"expands at GB/s: {speeds}{product}; packs {found['encode_numbers_per_s'] / 1e6:.0f} M numbers/s"
        )


if __name__ == "__main__":
    sys.exit(main())
