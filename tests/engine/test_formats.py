"""Packed formats: what is packed comes back, row by row and in every type, within the format's error or exactly."""

from __future__ import annotations

import functools
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lamella_engine.errors import CheckpointError, OptionError
from lamella_engine.formats import FORMATS, FULL_DTYPES, Format, find_format, packed_bytes, packing_error
from lamella_engine.formats.blockwise import Blockwise
from lamella_engine.formats.codes import FP4, NF4

SHAPES = [
    (37,), (1, 1), (5, 3), (7, 65), (9, 64), (9, 576), (4, 257), (3, 5, 130), (3, 8, 64), (2, 2, 3, 24), (700, 300),
]  # fmt: skip
LARGEST_ERROR = {"nf4": 0.0875, "fp4": 0.1145, "int8": 0.0062, "lossless": 0.0}
BYTES_A_NUMBER = {"nf4": 0.517, "fp4": 0.517, "int8": 1.017, "lossless": 1.42}

every_format = pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS.keys())
BLOCKWISE = {name: FORMATS[name] for name in ("nf4", "fp4", "int8")}
blockwise = pytest.mark.parametrize("format", BLOCKWISE.values(), ids=BLOCKWISE.keys())
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def weights(shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * 0.02).to(dtype)


def expand(format: Format, parts: dict[str, torch.Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    out = torch.full(shape, torch.nan, dtype=dtype)
    format.decode(parts, out)
    return out


@every_format
@every_shape
def test_what_is_packed_comes_back(format: Format, shape: tuple[int, ...]) -> None:
    tensor = weights(shape)

    parts = format.encode(tensor)
    back = expand(format, parts, shape, torch.float32)

    limit = 0.0 if format.name == "lossless" else 1.6 * LARGEST_ERROR[format.name]  # few numbers wander
    assert float((back - tensor.float()).norm()) <= limit * float(tensor.float().norm())


@every_format
@every_shape
def test_sizes_are_known_before_packing(format: Format, shape: tuple[int, ...]) -> None:
    specs = format.packed_parts(shape, torch.bfloat16)

    parts = format.encode(weights(shape))

    assert specs.keys() == parts.keys()
    for suffix, part in parts.items():
        assert part.dtype == specs[suffix].dtype
        assert part.is_contiguous()
        if format.has_fixed_size:
            assert tuple(part.shape) == specs[suffix].shape
            assert part.nbytes == specs[suffix].nbytes
        else:
            assert part.nbytes <= specs[suffix].nbytes


@every_format
@every_shape
def test_rows_expand_alone_as_they_do_in_the_whole(format: Format, shape: tuple[int, ...]) -> None:
    parts = format.encode(weights(shape))
    whole = expand(format, parts, shape, torch.bfloat16)
    entries = 1 if len(shape) == 1 else shape[0]

    for start, stop in {(0, 1), (entries - 1, entries), (entries // 3, entries), (0, max(1, entries // 2))}:
        taken = whole[start:stop] if len(shape) > 1 else whole
        rows = format.slice_rows(parts, start, stop)

        assert torch.equal(expand(format, rows, tuple(taken.shape), torch.bfloat16), taken)


@every_format
def test_every_expert_has_equally_many_bytes_at_its_own_place(format: Format) -> None:
    stack = weights((6, 10, 200))
    stack[2] *= 1000
    stack[4] = 0

    parts = format.encode(stack)

    assert all(part.shape[0] == 6 for part in parts.values())
    for expert in range(6):
        own = {suffix: part[expert : expert + 1].clone() for suffix, part in parts.items()}
        alone = expand(format, own, (1, 10, 200), torch.float32)
        assert torch.equal(alone, expand(format, parts, (6, 10, 200), torch.float32)[expert : expert + 1])
        assert (alone - stack[expert].float()).norm() <= 0.12 * stack[expert].float().norm()


@blockwise
@pytest.mark.parametrize("shape", [(33, 128), (5, 7, 40)], ids=str)
@pytest.mark.parametrize("source", FULL_DTYPES, ids=str)
def test_every_type_is_packed_and_results_are_rounded_once(
    format: Format, shape: tuple[int, ...], source: torch.dtype
) -> None:
    parts = format.encode(weights(shape, source))

    exact = expand(format, parts, shape, torch.float32)

    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(expand(format, parts, shape, dtype), exact.to(dtype))


@every_format
def test_error_and_size_are_those_promised(format: Format) -> None:
    tensor = weights((256, 4096))

    found = packing_error(format, tensor)

    assert 0.97 * LARGEST_ERROR[format.name] <= found.relative <= LARGEST_ERROR[format.name]
    assert found.full_bytes == tensor.nbytes
    assert found.packed_bytes == packed_bytes(format.encode(tensor)) <= BYTES_A_NUMBER[format.name] * tensor.numel()


def test_errors_of_several_weights_add_up() -> None:
    format = find_format("int8")
    first, second = weights((64, 128), seed=1), weights((64, 128), seed=2)

    both = packing_error(format, torch.cat((first, second)))
    added = packing_error(format, first).plus(packing_error(format, second))

    assert added.packed_bytes == both.packed_bytes
    assert added.relative == pytest.approx(both.relative, rel=1e-6)
    assert packing_error(format, torch.zeros(2, 64)).relative == 0


def test_error_is_measured_over_all_pieces_of_a_large_weight() -> None:
    format, vector = find_format("nf4"), weights((5_000_000,))

    found = packing_error(format, vector)

    assert found.squared_weight == pytest.approx(float(vector.double().square().sum()), rel=1e-6)
    assert found.relative <= LARGEST_ERROR["nf4"]


@pytest.mark.parametrize(("name", "table"), [("nf4", NF4), ("fp4", FP4)])
def test_four_bits_mean_what_the_tables_say(name: str, table: tuple[float, ...]) -> None:
    tensor = weights((3, 150), torch.float32)

    parts = find_format(name).encode(tensor)

    for row in range(3):
        for column in range(150):
            byte = int(parts["codes"][row, column // 2])
            code = byte & 15 if column % 2 else byte >> 4
            expected = table[code] * literal_scale(parts, row, column // 64)
            found = (
                expand(find_format(name), parts, (3, 150), torch.float32)[row, column] if column in (0, 149) else None
            )
            assert abs(expected - float(tensor[row, column])) <= 0.3 * float(tensor[row].abs().max())
            assert found is None or float(found) == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_eight_bits_are_whole_steps_of_a_scale() -> None:
    tensor = weights((3, 150), torch.float32)

    parts = find_format("int8").encode(tensor)

    back = expand(find_format("int8"), parts, (3, 150), torch.float32)
    for row in range(3):
        for column in range(150):
            scale = literal_scale(parts, row, column // 64)
            step = int(parts["codes"].view(torch.int8)[row, column])
            assert float(back[row, column]) == step * scale
            assert abs(step * scale - float(tensor[row, column])) <= 0.5001 * scale


def literal_scale(parts: dict[str, torch.Tensor], row: int, block: int) -> float:
    """The scale's definition, restated: exponent of the row plus three bits, then five bits of mantissa."""
    byte, exponent = int(parts["scales"][row, block]), int(parts["exponents"][row])
    return float((1 + (byte & 31) / 32) * 2.0 ** (exponent + (byte >> 5) - 127))


@blockwise
@pytest.mark.parametrize("size", [1e-30, 1e-8, 1.0, 1e4, 1e30])
def test_numbers_of_any_size_keep_their_precision(format: Format, size: float) -> None:
    tensor = weights((4, 192), torch.float32) * (50 * size)

    back = expand(format, format.encode(tensor), (4, 192), torch.float32)

    assert float((back / size - tensor / size).norm() / (tensor / size).norm()) < 1.3 * LARGEST_ERROR[format.name]


@blockwise
def test_zeros_stay_zeros_beside_anything(format: Format) -> None:
    tensor = weights((4, 256))
    tensor[1] = 0
    tensor[2, 64:128] = 0
    tensor[3, 5] = 0

    back = expand(format, format.encode(tensor), (4, 256), torch.bfloat16)

    assert not back[1].any()
    assert not back[2, 64:128].any()
    assert back[3, 5] == 0


@blockwise
def test_one_outlier_costs_its_own_block_only(format: Format) -> None:
    tensor = weights((1, 4096), torch.float32)
    tensor[0, 10] = 4.0  # 200 times a usual weight

    back = expand(format, format.encode(tensor), (1, 4096), torch.float32)

    assert float(back[0, 10]) == pytest.approx(4.0, rel=0.2)
    rest = slice(64, None)
    assert float((back - tensor)[0, rest].norm() / tensor[0, rest].norm()) < 1.1 * LARGEST_ERROR[format.name]


@blockwise
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_no_code_expresses_is_refused(format: Format, bad: float) -> None:
    tensor = weights((40, 100))
    tensor[39, 99] = bad

    with pytest.raises(CheckpointError, match=r"infinities or not-a-numbers.*full precision"):
        format.encode(tensor)


@every_format
@pytest.mark.parametrize(
    ("shape", "dtype", "reason"),
    [
        ((), torch.bfloat16, "single number.*leave it in full precision"),
        ((4, 0), torch.bfloat16, "holds nothing.*leave it in full precision"),
        ((4, 64), torch.int8, "not int8; leave the tensor as it is"),
        ((4, 64), torch.float8_e4m3fn, "not float8_e4m3fn"),
    ],
)
def test_what_cannot_be_packed_is_refused_with_the_alternative(
    format: Format, shape: tuple[int, ...], dtype: torch.dtype, reason: str
) -> None:
    with pytest.raises(OptionError, match=f"{format.name} packs .*{reason}"):
        format.check(shape, dtype)
    with pytest.raises(OptionError, match=reason):
        format.packed_parts(shape, dtype)
    with pytest.raises(OptionError, match=reason):
        format.encode(torch.zeros(shape, dtype=dtype))


@every_format
def test_a_place_that_does_not_fit_is_refused(format: Format) -> None:
    parts = format.encode(weights((8, 128)))

    for out in (torch.empty(8, 64), torch.empty(16, 64), torch.empty(8, 128, dtype=torch.float64)):
        with pytest.raises(ValueError, match=r"fit|expand into|no row"):
            format.decode(parts, out)
    with pytest.raises(ValueError, match="contiguous"):
        format.decode(parts, torch.empty(128, 8).t())


@every_format
def test_packing_leaves_the_weight_as_it_was_and_takes_any_layout(format: Format) -> None:
    tensor = weights((96, 80))
    before = tensor.clone()

    turned = format.encode(tensor.t())

    assert torch.equal(tensor, before)
    assert all(torch.equal(part, format.encode(tensor.t().contiguous())[suffix]) for suffix, part in turned.items())


@every_format
def test_expanding_touches_nothing_but_its_place(format: Format) -> None:
    room = torch.full((3, 20, 72), 7.0, dtype=torch.bfloat16)

    format.decode(format.encode(weights((20, 72))), room[1])

    assert bool((room[0] == 7).all())
    assert bool((room[2] == 7).all())
    assert not bool((room[1] == 7).any())


@pytest.mark.parametrize("name", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", FULL_DTYPES, ids=str)
def test_kernels_of_bitsandbytes_give_the_same_bits(name: str, dtype: torch.dtype) -> None:
    pytest.importorskip("bitsandbytes")
    format = find_format(name)
    assert isinstance(format, Blockwise)
    parts = format.encode(weights((300, 4096)))
    own = torch.empty(300, 4096, dtype=dtype)

    format.prepare(torch.device("cpu"), dtype)
    format.decode_with_torch(parts, own)

    assert torch.equal(expand(format, parts, (300, 4096), dtype).view(torch.uint8), own.view(torch.uint8))


@every_format
def test_without_a_kernel_a_product_is_refused_beforehand(format: Format) -> None:
    parts, x = format.encode(weights((16, 64))), torch.ones(1, 64, dtype=torch.bfloat16)

    format.prepare(x.device, x.dtype)

    assert not format.can_matvec(parts, x)
    with pytest.raises(ValueError, match="expand"):
        format.matvec(parts, x, torch.empty(1, 16, dtype=torch.bfloat16))


@pytest.mark.real_model
@pytest.mark.timeout(300)
@every_format
def test_a_real_layer_has_the_error_and_size_that_are_written_down(format: Format, smollm2_store: Path) -> None:
    (file,) = smollm2_store.rglob("layer-00010.safetensors")
    tensors = load_file(file)

    found = [packing_error(format, tensors[name].bfloat16()) for name in tensors if name.endswith("proj.weight")]

    whole = functools.reduce(lambda first, second: first.plus(second), found)
    assert len(found) == 7
    assert whole.relative <= 1.06 * LARGEST_ERROR[format.name]
    assert whole.packed_bytes <= {"lossless": 0.72, "int8": 0.509}.get(format.name, 0.259) * whole.full_bytes


def test_an_unknown_format_is_refused_with_the_known_ones() -> None:
    with pytest.raises(OptionError, match="'nf5' is no packed format; there are nf4, fp4, int8, lossless"):
        find_format("nf5")
