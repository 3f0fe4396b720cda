"""On a GPU: packed weights expand to the bits that a processor gets, without waiting, from a recorded graph as well."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from lamella_engine.formats import FORMATS, FULL_DTYPES, Format, bitsandbytes_kernels, find_format, kernels, nvrtc
from lamella_engine.formats.blockwise import Blockwise
from lamella_engine.formats.lossless import Lossless
from lamella_engine.formats.scales import scale_values

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(300),
]

SHAPES = [(37,), (1, 1), (5, 3), (7, 65), (64, 576), (4, 257), (3, 5, 130), (8, 96, 512), (2, 2, 3, 24), (1000, 4096)]
DEVICE = torch.device("cuda", 0)

every_format = pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS.keys())
every_type = pytest.mark.parametrize("dtype", FULL_DTYPES, ids=str)
multiplied = pytest.mark.parametrize("name", ["nf4", "fp4", "int8"])


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    """Everything here is about kernels: where they cannot be compiled, that has to show."""
    assert all(kernels.are_ready(DEVICE, dtype) for dtype in FULL_DTYPES)


def weights(shape: tuple[int, ...]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    spread = torch.logspace(-3, 1, shape[-1])
    return (torch.randn(shape, generator=generator) * spread).to(torch.bfloat16)


def moved(parts: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {suffix: part.to(DEVICE) for suffix, part in parts.items()}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.cpu().view(torch.uint8)


def on_cpu(format: Format, parts: dict[str, torch.Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    out = torch.empty(shape, dtype=dtype)
    format.decode(parts, out)
    return out


@every_format
@every_type
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_gpu_expands_to_the_same_bits(format: Format, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    parts = format.encode(weights(shape))
    expected = on_cpu(format, parts, shape, dtype)
    by_kernel, by_torch = (torch.full(shape, 7, dtype=dtype, device=DEVICE) for _ in range(2))

    format.decode(moved(parts), by_kernel)
    assert isinstance(format, Blockwise | Lossless)
    format.decode_with_torch(moved(parts), by_torch)

    assert torch.equal(bits(by_kernel), bits(expected))
    assert torch.equal(bits(by_torch), bits(expected))


@every_format
@pytest.mark.parametrize("shape", [(6, 9, 64), (6, 10, 200), (40, 576), (41, 3)], ids=str)
def test_rows_expand_alone_wherever_they_begin(format: Format, shape: tuple[int, ...]) -> None:
    parts = format.encode(weights(shape))
    whole = on_cpu(format, parts, shape, torch.bfloat16)
    device_parts = moved(parts)

    for start in range(1, shape[0]):
        out = torch.empty((1, *shape[1:]), dtype=torch.bfloat16, device=DEVICE)
        format.decode(format.slice_rows(device_parts, start, start + 1), out)
        assert torch.equal(bits(out), bits(whole[start : start + 1]))


def test_every_bit_pattern_comes_back_without_loss() -> None:
    patterns = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16)
    tensor = patterns[torch.randperm(65536, generator=torch.Generator().manual_seed(3))].view(torch.bfloat16)

    for shape in ((65536,), (256, 256), (8, 16, 512)):
        out = torch.empty(shape, dtype=torch.bfloat16, device=DEVICE)
        find_format("lossless").decode(moved(find_format("lossless").encode(tensor.view(shape))), out)
        assert torch.equal(bits(out), bits(tensor.view(shape)))


@every_format
def test_packing_on_a_gpu_is_as_good(format: Format) -> None:
    tensor = weights((64, 1024))

    parts = format.encode(tensor.to(DEVICE))
    out = torch.empty((64, 1024), device=DEVICE)
    format.decode(parts, out)

    expected = on_cpu(format, format.encode(tensor), (64, 1024), torch.float32)
    own, reference = (float((found.cpu() - tensor.float()).norm()) for found in (out, expected))
    assert own == pytest.approx(reference, rel=1e-3)
    if format.name == "lossless":
        assert all(torch.equal(part.cpu(), format.encode(tensor)[suffix]) for suffix, part in parts.items())


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    """An operation within that waits for the GPU raises; torch warns once that it does not find all of them."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@every_format
@every_type
def test_expanding_neither_waits_nor_allocates(format: Format, dtype: torch.dtype) -> None:
    parts = moved(format.encode(weights((256, 1024))))
    out = torch.empty((256, 1024), dtype=dtype, device=DEVICE)
    format.prepare(DEVICE, dtype)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()

    with waiting_is_an_error():
        format.decode(parts, out)

    assert torch.cuda.max_memory_allocated() == before


@every_format
def test_a_recorded_expansion_expands_what_its_parts_hold_later(format: Format) -> None:
    tensors = [weights((128, 768)), weights((128, 768)).flip(0).contiguous()]
    encoded = [format.encode(tensor) for tensor in tensors]
    room = {suffix: torch.zeros_like(part).to(DEVICE) for suffix, part in encoded[0].items()}
    out = torch.zeros((128, 768), dtype=torch.bfloat16, device=DEVICE)
    format.prepare(DEVICE, torch.bfloat16)
    graph = torch.cuda.CUDAGraph()

    with torch.cuda.graph(graph):
        format.decode(room, out)

    assert not out.any()
    for parts in encoded:
        for suffix, part in parts.items():
            assert part.shape == room[suffix].shape  # the same numbers in another order escape as often
            room[suffix].copy_(part)
        graph.replay()
        assert torch.equal(bits(out), bits(on_cpu(format, parts, (128, 768), torch.bfloat16)))


@every_format
def test_launches_go_to_the_current_stream(format: Format) -> None:
    parts = format.encode(weights((512, 4096)))
    expected = on_cpu(format, parts, (512, 4096), torch.bfloat16)
    stream = torch.cuda.Stream()
    room = {suffix: torch.zeros_like(part).to(DEVICE) for suffix, part in parts.items()}
    out = torch.empty((512, 4096), dtype=torch.bfloat16, device=DEVICE)
    pinned = {suffix: part.pin_memory() for suffix, part in parts.items()}
    torch.cuda.synchronize()

    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # the copies come late: a launch elsewhere would expand zeros
        for suffix, part in pinned.items():
            room[suffix].copy_(part, non_blocking=True)
        format.decode(room, out)
    stream.synchronize()

    assert torch.equal(bits(out), bits(expected))


def test_a_thread_that_never_used_the_gpu_can_launch() -> None:
    format = find_format("nf4")
    parts = format.encode(weights((64, 512)))
    device_parts, out = moved(parts), torch.empty((64, 512), dtype=torch.bfloat16, device=DEVICE)
    failures: list[BaseException] = []

    def expand() -> None:
        try:
            format.decode(device_parts, out)
        except BaseException as error:
            failures.append(error)
            raise

    thread = threading.Thread(target=expand)
    thread.start()
    thread.join(timeout=60)
    torch.cuda.synchronize()

    assert not failures
    assert torch.equal(bits(out), bits(on_cpu(format, parts, (64, 512), torch.bfloat16)))


@multiplied
@every_type
@pytest.mark.parametrize("shape", [(1, 8), (5, 64), (33, 200), (576, 1536), (1000, 4096)], ids=str)
def test_a_product_with_packed_weights_is_that_with_expanded_ones(
    name: str, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    format = find_format(name)
    generator = torch.Generator().manual_seed(1)
    parts = format.encode((torch.randn(shape, generator=generator) * 0.02).to(torch.bfloat16))
    x = torch.randn((1, 1, shape[1]), generator=generator).to(dtype)
    expected = x.double().view(-1) @ on_cpu(format, parts, shape, torch.float32).double().T
    out = torch.empty((1, 1, shape[0]), dtype=dtype, device=DEVICE)

    device_parts = moved(parts)
    assert format.can_matvec(device_parts, x.to(DEVICE))
    format.matvec(device_parts, x.to(DEVICE), out)

    size = float(expected.abs().max())
    places = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 1e-5}[dtype]
    assert float((out.cpu().double().view(-1) - expected).abs().max()) <= places * size


@multiplied
def test_products_that_have_no_kernel_are_known_beforehand(name: str) -> None:
    format = find_format(name)
    parts = moved(format.encode(weights((16, 72))))

    assert format.can_matvec(parts, torch.ones(1, 72, device=DEVICE))
    for x in (torch.ones(2, 72), torch.ones(1, 64), torch.ones(1, 72, dtype=torch.float64)):
        assert not format.can_matvec(parts, x.to(DEVICE))
    odd = moved(format.encode(weights((16, 71))))
    assert not format.can_matvec(odd, torch.ones(1, 71, device=DEVICE))
    assert not format.can_matvec(moved(format.encode(weights((2, 16, 64)))), torch.ones(1, 64, device=DEVICE))


@pytest.mark.parametrize("name", ["nf4", "fp4"])
@every_type
def test_bitsandbytes_gives_the_same_bits_and_products(name: str, dtype: torch.dtype) -> None:
    pytest.importorskip("bitsandbytes")
    format = find_format(name)
    assert isinstance(format, Blockwise)
    parts = format.encode(weights((96, 1024)))
    on_gpu = moved(parts)
    scales = scale_values(on_gpu["scales"], on_gpu["exponents"][:, None])
    out, product = torch.empty((96, 1024), dtype=dtype, device=DEVICE), torch.empty((1, 96), dtype=dtype, device=DEVICE)
    x = torch.randn((1, 1024), generator=torch.Generator().manual_seed(2)).to(dtype).to(DEVICE)

    assert bitsandbytes_kernels.can_expand(format.kernel, out)
    assert bitsandbytes_kernels.can_multiply(format.kernel, x)
    bitsandbytes_kernels.expand(format.kernel, on_gpu["codes"], scales, out)
    bitsandbytes_kernels.multiply(format.kernel, on_gpu["codes"], scales, x, product)

    assert torch.equal(bits(out), bits(on_cpu(format, parts, (96, 1024), dtype)))
    expected = x.cpu().double() @ on_cpu(format, parts, (96, 1024), torch.float32).double().T
    limit = {torch.bfloat16: 0.02, torch.float16: 0.005, torch.float32: 1e-4}[dtype]
    assert float((product.cpu().double() - expected).abs().max()) <= limit * float(expected.abs().max())


@pytest.mark.parametrize("capability", [75, 80, 86, 89, 90, 120, 999])
def test_the_kernels_compile_for_every_generation(capability: int) -> None:
    for dtype in FULL_DTYPES:
        image = nvrtc.compile_image(kernels.source(), capability, kernels.macros(dtype))
        assert all(name.encode() in image for name in kernels.SIGNATURES)


def test_source_that_does_not_compile_is_refused_with_the_compilers_words() -> None:
    with pytest.raises(nvrtc.KernelError, match="does not compile"):
        nvrtc.compile_image("this is no program", 90, {})
