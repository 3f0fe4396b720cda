"""lossless: every bit comes back, whatever the numbers are; weights as they are trained come out smaller."""

from __future__ import annotations

import pytest
import torch

from lamella_engine.errors import OptionError
from lamella_engine.formats import find_format, packed_bytes
from lamella_engine.formats.lossless import fill_by_count, fill_in_order
from lamella_engine.formats.lossless_bits import Codebook, pack_codes, put_together, take_apart

LOSSLESS = find_format("lossless")


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.int16)


def round_trip(tensor: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(tensor)
    LOSSLESS.decode(LOSSLESS.encode(tensor), out)
    return out


@pytest.mark.parametrize("shape", [(65536,), (256, 256), (512, 128), (8, 16, 512), (1024, 64)], ids=str)
def test_every_bit_pattern_comes_back(shape: tuple[int, ...]) -> None:
    patterns = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16)
    order = torch.randperm(65536, generator=torch.Generator().manual_seed(3))
    tensor = patterns[order].view(torch.bfloat16).view(shape)

    assert torch.equal(bits(round_trip(tensor)), bits(tensor))


@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, float("nan"), float("-inf"), 1e-40, -3.3e38])
def test_constant_weights_come_back_without_escapes(value: float) -> None:
    tensor = torch.full((5, 300), value, dtype=torch.bfloat16)

    parts = LOSSLESS.encode(tensor)

    assert parts["escapes"].numel() == 1
    assert torch.equal(bits(round_trip(tensor)), bits(tensor))


@pytest.mark.parametrize("columns", [1, 7, 8, 9, 255, 256, 257, 511, 513])
def test_escapes_are_found_wherever_rows_end(columns: int) -> None:
    generator = torch.Generator().manual_seed(columns)
    exponents = torch.randint(0, 255, (40, columns), generator=generator)
    tensor = torch.ldexp(torch.ones(40, columns), exponents - 127).to(torch.bfloat16)

    parts = LOSSLESS.encode(tensor)

    assert parts["escapes"].numel() > 0.5 * tensor.numel()
    assert torch.equal(bits(round_trip(tensor)), bits(tensor))
    for row in (0, 1, 39):
        out = torch.empty(1, columns, dtype=torch.bfloat16)
        LOSSLESS.decode(LOSSLESS.slice_rows(parts, row, row + 1), out)
        assert torch.equal(bits(out), bits(tensor[row : row + 1]))


@pytest.mark.parametrize("sigma", [0.003, 0.01, 0.02, 0.05, 1.0])
def test_normally_distributed_weights_shrink_to_less_than_three_quarters(sigma: float) -> None:
    generator = torch.Generator().manual_seed(0)
    tensor = (torch.randn(512, 4096, generator=generator) * sigma).to(torch.bfloat16)

    assert packed_bytes(LOSSLESS.encode(tensor)) <= 0.715 * tensor.nbytes


def test_pruned_weights_have_a_code_for_zero() -> None:
    generator = torch.Generator().manual_seed(0)
    tensor = torch.randn(256, 1024, generator=generator)
    tensor[torch.rand(tensor.shape, generator=generator) < 0.5] = 0
    tensor = tensor.to(torch.bfloat16)

    assert packed_bytes(LOSSLESS.encode(tensor)) <= 0.73 * tensor.nbytes
    assert torch.equal(bits(round_trip(tensor)), bits(tensor))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_wider_results_are_exact_where_they_can_be(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    tensor = torch.randn(64, 300, generator=generator).to(torch.bfloat16)
    out = torch.empty(64, 300, dtype=dtype)

    LOSSLESS.decode(LOSSLESS.encode(tensor), out)

    assert torch.equal(out, tensor.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_types_are_refused_with_the_alternative(dtype: torch.dtype) -> None:
    with pytest.raises(OptionError, match=r"lossless packs bfloat16, and this tensor is float.*choose int8"):
        LOSSLESS.check((4, 64), dtype)


def test_a_matrix_too_large_to_count_is_refused() -> None:
    with pytest.raises(OptionError, match=r"31 bits.*choose int8"):
        LOSSLESS.check((1 << 17, 1 << 15), torch.bfloat16)

    LOSSLESS.check((64, 1 << 15, 1 << 15), torch.bfloat16)


def test_large_matrices_expand_the_same_in_pieces() -> None:
    generator = torch.Generator().manual_seed(0)
    tensor = torch.randn(1500, 1000, generator=generator).to(torch.bfloat16)  # more than is packed or expanded at once

    assert torch.equal(bits(round_trip(tensor)), bits(tensor))


@pytest.mark.parametrize("first", [0, 5])
def test_counting_escapes_gives_the_same_as_copying_them_in_order(first: int) -> None:
    generator = torch.Generator().manual_seed(0)
    exponents = torch.randint(0, 256, (30, 50), dtype=torch.uint8, generator=generator)
    is_escape = torch.rand(30, 50, generator=generator) < 0.1
    escapes = torch.randint(0, 256, (int(is_escape.sum()) + first,), dtype=torch.uint8, generator=generator)

    counted = fill_by_count(exponents, is_escape, escapes, torch.tensor(first, dtype=torch.int32))

    assert torch.equal(counted, fill_in_order(exponents, is_escape, escapes, torch.tensor(first)))
    assert torch.equal(counted[is_escape], escapes[first:])
    assert torch.equal(counted[~is_escape], exponents[~is_escape])


def test_signs_mantissas_and_exponents_are_what_they_are_called() -> None:
    numbers = torch.tensor([1.0, -1.5, 0.0, -0.0, 2.0**-126], dtype=torch.bfloat16)

    mantissas, exponents = take_apart(numbers)

    assert mantissas.tolist() == [0, 0x80 | 0x40, 0, 0x80, 0]
    assert exponents.tolist() == [127, 127, 0, 0, 1]
    assert torch.equal(bits(put_together(mantissas, exponents)), bits(numbers))


def test_a_codebook_gives_each_code_its_exponent() -> None:
    book = torch.tensor([250, 3, 77, 0, 128, 255, 1, 0], dtype=torch.uint8)
    codes = torch.randint(0, 8, (4, 43), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

    exponents, is_escape = Codebook(book).exponents(pack_codes(codes))

    assert torch.equal(is_escape[:, :43], codes == 7)
    assert torch.equal(exponents[:, :43][codes != 7], book[codes.long()][codes != 7])
