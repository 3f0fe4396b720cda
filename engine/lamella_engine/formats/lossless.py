"""lossless: bfloat16 in about 0.71 of its bytes, bit for bit.

A number's sign and mantissa are a byte. Its exponent is a code of three bits into the seven commonest exponents of its
matrix; the eighth code escapes to a list of bytes in the order of the numbers. A count for each 256 numbers says how
many escapes came before, so a number is found without reading what precedes its 256. How many escape shows when a
weight is packed (2 to 5 in a hundred of trained weights), and so does the size: weights whose exponents are spread
widely can come out larger than they were, and whoever packs compares `packed_bytes`.
"""

from __future__ import annotations

import math

import torch

from lamella_engine.errors import OptionError
from lamella_engine.formats import kernels
from lamella_engine.formats.format import (
    Format,
    Parts,
    PartSpec,
    Shape,
    check_out,
    check_weight,
    leading,
    row_chunks,
)
from lamella_engine.formats.lossless_bits import (
    CODE_BITS,
    ESCAPE,
    Codebook,
    code_bytes,
    pack_codes,
    put_together,
    take_apart,
)

MANTISSAS, CODES, STARTS, ESCAPES, BOOK = "mantissas", "codes", "starts", "escapes", "book"
COUNTED = 256
"""Numbers of a row that share a count of the escapes before them."""
_DECODED_AT_ONCE = {"cpu": 1 << 18, "cuda": 1 << 23}  # numbers
_ENCODED_AT_ONCE = 1 << 20


class Lossless(Format):
    """Exponents as codes of three bits."""

    name = "lossless"
    has_fixed_size = False

    def check(self, shape: Shape, dtype: torch.dtype) -> None:
        """See `Format.check`."""
        check_weight(self.name, shape, dtype)
        if dtype != torch.bfloat16:
            raise OptionError(
                f"lossless packs bfloat16, and this tensor is {str(dtype).removeprefix('torch.')}, of whose longer "
                "mantissas nothing can be saved; choose int8, or leave it in full precision"
            )
        if math.prod(shape[-2:]) >= 1 << 31:
            raise OptionError(
                f"lossless counts the escapes of a matrix in 31 bits, and one of shape {list(shape[-2:])} could have "
                "more; choose int8, or leave it in full precision"
            )

    def packed_parts(self, shape: Shape, dtype: torch.dtype) -> dict[str, PartSpec]:
        """See `Format.packed_parts`."""
        self.check(shape, dtype)
        lead, columns = leading(shape), shape[-1]
        matrices = shape[:-2]
        return {
            MANTISSAS: PartSpec((*lead, columns), torch.uint8),
            CODES: PartSpec((*lead, code_bytes(columns)), torch.uint8),
            STARTS: PartSpec((*lead, -(-columns // COUNTED)), torch.int32),
            ESCAPES: PartSpec((*matrices, math.prod(shape[-2:])), torch.uint8),
            BOOK: PartSpec((*matrices, 1 << CODE_BITS), torch.uint8),
        }

    def encode(self, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """See `Format.encode`."""
        shape = tuple(tensor.shape)
        parts = {
            suffix: torch.empty(spec.shape, dtype=spec.dtype, device=tensor.device)
            for suffix, spec in self.packed_parts(shape, tensor.dtype).items()
            if suffix != ESCAPES
        }
        rows, columns = leading(shape)[-1], shape[-1]
        places = {
            suffix: part.view(-1, part.shape[-1]) if suffix == BOOK else part.view(-1, rows, part.shape[-1])
            for suffix, part in parts.items()
        }
        numbers = tensor.reshape(-1, rows, columns)
        escapes = [
            _encode_matrix(matrix, {suffix: place[index] for suffix, place in places.items()})
            for index, matrix in enumerate(numbers)
        ]
        # At least one, so that no part is empty; padded, so that every matrix has equally many bytes.
        most = max(1, *(listed.numel() for listed in escapes))
        padded = [torch.nn.functional.pad(listed, (0, most - listed.numel())) for listed in escapes]
        return parts | {ESCAPES: torch.stack(padded).view(*shape[:-2], most)}

    def decode(self, parts: Parts, out: torch.Tensor) -> None:
        """See `Format.decode`."""
        mantissas, into = _matrices(parts[MANTISSAS], out)
        if kernels.are_ready(out.device, out.dtype):
            kernels.expand_lossless(mantissas, parts[CODES], parts[STARTS], parts[ESCAPES], parts[BOOK], into)
        else:
            self.decode_with_torch(parts, out)

    def decode_with_torch(self, parts: Parts, out: torch.Tensor) -> None:
        """As `decode`, by torch's own operations only: some rows at a time, on any device."""
        mantissas, into = _matrices(parts[MANTISSAS], out)
        matrices, rows, columns = mantissas.shape
        codes = parts[CODES].view(matrices, rows, -1)
        starts, escapes = parts[STARTS].view(matrices, rows, -1), parts[ESCAPES].view(matrices, -1)
        books = parts[BOOK].view(matrices, -1)
        is_cpu = out.device.type == "cpu"
        at_once, fill = _DECODED_AT_ONCE["cpu" if is_cpu else "cuda"], fill_in_order if is_cpu else fill_by_count
        for index in range(matrices):
            book = Codebook(books[index])
            for chunk in row_chunks(rows, columns, at_once):
                exponents, is_escape = book.exponents(codes[index, chunk])
                exponents, is_escape = exponents[:, :columns], is_escape[:, :columns]
                exponents = fill(exponents, is_escape, escapes[index], starts[index, chunk.start, 0])
                into[index, chunk] = put_together(mantissas[index, chunk], exponents)

    def slice_rows(self, parts: Parts, start: int, stop: int) -> dict[str, torch.Tensor]:
        """See `Format.slice_rows`."""
        # Rows of one matrix share its book and its list of escapes: their counts lead to the right place of it.
        shared = (ESCAPES, BOOK) if parts[BOOK].dim() == 1 else ()
        return {suffix: part if suffix in shared else part[start:stop] for suffix, part in parts.items()}

    def shared_parts(self, shape: Shape) -> tuple[str, ...]:
        """See `Format.shared_parts`; rows of one matrix share what belongs to matrices, a vector is one row."""
        if len(shape) > 2:
            return ()
        return (ESCAPES, BOOK) if len(shape) == 2 else (MANTISSAS, CODES, STARTS, ESCAPES, BOOK)

    def take_rows(self, parts: Parts, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """See `Format.take_rows`; the device is asked how many escapes these rows have."""
        starts, escapes = parts[STARTS], parts[ESCAPES]
        ends = torch.nn.functional.pad(starts[1:, 0], (0, 1), value=escapes.numel())
        firsts, counts = starts[rows, 0], (ends - starts[:, 0])[rows]
        befores = counts.cumsum(0, dtype=torch.int32) - counts
        # Where each escape that is kept lies in the list: as far behind its row's first one as it is in the new list.
        total = int(counts.sum())
        shift = (firsts - befores).repeat_interleave(counts, output_size=total)
        kept = escapes[torch.arange(total, device=rows.device) + shift]
        return {
            MANTISSAS: parts[MANTISSAS].index_select(0, rows),
            CODES: parts[CODES].index_select(0, rows),
            STARTS: starts[rows] - (firsts - befores)[:, None],
            ESCAPES: kept if total else escapes[:1],
            BOOK: parts[BOOK],
        }

    def prepare(self, device: torch.device, dtype: torch.dtype) -> None:
        """See `Format.prepare`."""
        kernels.prepare(device, dtype)

    def can_matvec(self, parts: Parts, x: torch.Tensor) -> bool:
        """See `Format.can_matvec`."""
        return False

    def matvec(self, parts: Parts, x: torch.Tensor, out: torch.Tensor) -> None:
        """See `Format.matvec`."""
        raise ValueError("lossless weights are multiplied after they are expanded")


def _matrices(mantissas: torch.Tensor, out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both as [matrices, rows, columns]."""
    check_out(out, tuple(mantissas.shape))
    rows, columns = mantissas.shape[-2:]
    return mantissas.view(-1, rows, columns), out.view(-1, rows, columns)


def _encode_matrix(numbers: torch.Tensor, places: Parts) -> torch.Tensor:
    """Pack [rows, columns] into `places`; the escapes."""
    book, code_of = _choose_book(numbers)
    places[BOOK].copy_(book)
    rows, columns = numbers.shape
    found, before = [], 0
    for chunk in row_chunks(rows, columns, _ENCODED_AT_ONCE):
        mantissas, exponents = take_apart(numbers[chunk].contiguous())
        codes = code_of[exponents.to(torch.int32)]
        is_escape = codes == ESCAPE
        places[MANTISSAS][chunk] = mantissas
        places[CODES][chunk] = pack_codes(codes)
        counts = torch.nn.functional.pad(is_escape, (0, -columns % COUNTED)).view(codes.shape[0], -1, COUNTED).sum(-1)
        ends = counts.view(-1).cumsum(0) + before
        places[STARTS][chunk] = (ends - counts.view(-1)).view(counts.shape).to(torch.int32)
        found.append(exponents[is_escape])
        before = int(ends[-1])
    return torch.cat(found)


def _choose_book(numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The commonest exponents in rising order, uint8 [8], and the code of each exponent, uint8 [256]."""
    counts = torch.zeros(256, dtype=torch.int64, device=numbers.device)
    for chunk in row_chunks(numbers.shape[0], numbers.shape[1], _ENCODED_AT_ONCE):
        _, exponents = take_apart(numbers[chunk].contiguous())
        counts += torch.bincount(exponents.reshape(-1).to(torch.int32), minlength=256)
    commonest = counts.sort(descending=True, stable=True).indices[:ESCAPE].sort().values
    code_of = torch.full((256,), ESCAPE, dtype=torch.uint8, device=numbers.device)
    code_of[commonest] = torch.arange(ESCAPE, dtype=torch.uint8, device=numbers.device)
    return torch.nn.functional.pad(commonest, (0, 1)).to(torch.uint8), code_of


def fill_in_order(
    exponents: torch.Tensor, is_escape: torch.Tensor, escapes: torch.Tensor, first: torch.Tensor
) -> torch.Tensor:
    """Exponents with their escapes, copied one behind the other; asks the device for a number, so for processors only.

    Args:
        exponents, is_escape: [rows, columns].
        escapes: the list of the matrix.
        first: where in the list the first one of these rows is.
    """
    listed = escapes[int(first) :]
    return exponents.masked_scatter(is_escape, listed) if listed.numel() else exponents


def fill_by_count(
    exponents: torch.Tensor, is_escape: torch.Tensor, escapes: torch.Tensor, first: torch.Tensor
) -> torch.Tensor:
    """As `fill_in_order`, waiting for nothing: each number counts the escapes before it."""
    place = is_escape.reshape(-1).cumsum(0, dtype=torch.int32).view(is_escape.shape) + (first - 1)
    place.clamp_(0, escapes.numel() - 1)
    return torch.where(is_escape, escapes[place], exponents)
