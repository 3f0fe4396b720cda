"""Reads and checks the header of a GGUF file, before anything else of the file is trusted.

Owns the format's rules (magic, counts, types, places), so that the libraries that read the file afterwards only ever
see one that is whole. Keeps no metadata but what decides whether the file can be used; reads no tensor.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from lamella_engine.errors import CheckpointError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_HEADER_BYTES = 1 << 30
MAX_DIMENSIONS = 4
_DEFAULT_ALIGNMENT = 32
_SMALLEST_TENSOR_INFO = 24  # empty name, no dimension, type, offset
_SMALLEST_METADATA = 13  # empty key, type, one byte
_STRING, _ARRAY = 8, 9
_SCALARS: Mapping[int, str] = MappingProxyType(
    {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
)
_KEPT = frozenset({"general.architecture", "general.alignment", "split.count"})


@dataclass(frozen=True)
class GgufTensor:
    """One tensor: shape in torch order, block type, and its bytes from the file's start."""

    name: str
    shape: tuple[int, ...]
    block_type: GGMLQuantizationType
    start: int
    nbytes: int


@dataclass(frozen=True)
class GgufHeader:
    """A checked header.

    Attributes:
        path: the file.
        architecture: ``general.architecture``, such as ``llama``.
        tensors: by name; all inside the file, none overlapping.
        header_bytes: where the data begins.
        sha256: of everything before the data, in hex.
    """

    path: Path
    architecture: str
    tensors: Mapping[str, GgufTensor]
    header_bytes: int
    sha256: str


def read_gguf_header(path: Path) -> GgufHeader:
    """Read and check the header of `path`.

    Raises:
        CheckpointError: the file cannot be read, is not a whole GGUF file, or is one of several parts.
    """
    try:
        with path.open("rb") as file:
            return _Parser(path, file).header()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error


class _Parser:
    """Reads forward through one file; every length is checked against what the file still has."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path = path
        self._file = file
        self._file_bytes = path.stat().st_size
        self._position = 0
        self._digest = hashlib.sha256()

    def header(self) -> GgufHeader:
        tensor_count, metadata_count = self._counts()
        metadata = self._metadata(metadata_count)
        architecture = metadata.get("general.architecture")
        alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if not isinstance(architecture, str) or not architecture:
            raise self._corrupt("it does not say its architecture")
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise self._corrupt(f"its alignment is {alignment!r}, not a power of two")
        if metadata.get("split.count", 1) not in (0, 1):
            raise CheckpointError(
                f"{self._path} is one of {metadata['split.count']} parts of a model; join them first "
                "(llama-gguf-split --merge FIRST_PART WHOLE_FILE)"
            )
        infos = [self._tensor_info() for _ in range(tensor_count)]
        data_start = -(-self._position // alignment) * alignment
        tensors = self._placed(infos, data_start, alignment)
        return GgufHeader(self._path, architecture, MappingProxyType(tensors), data_start, self._digest.hexdigest())

    def _corrupt(self, reason: str) -> CheckpointError:
        return CheckpointError(f"{self._path} is not a whole GGUF file: {reason}. Fetch the file again.")

    def _take(self, nbytes: int) -> bytes:
        if self._position + nbytes > min(self._file_bytes, MAX_HEADER_BYTES):
            raise self._corrupt(f"its header runs past the end at byte {self._position}")
        data = self._file.read(nbytes)
        if len(data) != nbytes:
            raise self._corrupt(f"it ends at byte {self._position + len(data)}")
        self._position += nbytes
        self._digest.update(data)
        return data

    def _number(self, form: str) -> int:
        value: int = struct.unpack("<" + form, self._take(struct.calcsize("<" + form)))[0]
        return value

    def _text(self) -> str:
        raw = self._take(self._number("Q"))
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise self._corrupt(f"a text at byte {self._position - len(raw)} is not UTF-8") from error

    def _counts(self) -> tuple[int, int]:
        if self._file_bytes < 24 or self._take(4) != MAGIC:
            raise self._corrupt("it does not begin with 'GGUF'" if self._file_bytes >= 24 else "it is too short")
        version = self._number("I")
        if version not in VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            what = "big-endian" if swapped in VERSIONS else f"of version {version}"
            raise CheckpointError(f"{self._path} is {what}; little-endian GGUF of versions 2 and 3 is read")
        tensor_count, metadata_count = self._number("Q"), self._number("Q")
        room = self._file_bytes - self._position
        if tensor_count * _SMALLEST_TENSOR_INFO + metadata_count * _SMALLEST_METADATA > room:
            raise self._corrupt(
                f"it claims {tensor_count} tensors and {metadata_count} metadata entries, more than {room} bytes hold"
            )
        if not tensor_count:
            raise self._corrupt("it holds no tensor")
        return tensor_count, metadata_count

    def _metadata(self, count: int) -> dict[str, object]:
        kept: dict[str, object] = {}
        seen: set[str] = set()
        for _ in range(count):
            key = self._text()
            if key in seen:
                raise self._corrupt(f"its metadata key {key[:80]!r} occurs twice")
            seen.add(key)
            value = self._value(self._number("I"))
            if key in _KEPT:
                kept[key] = value
        return kept

    def _value(self, kind: int) -> object:
        if kind in _SCALARS:
            return self._number(_SCALARS[kind])
        if kind == _STRING:
            return self._text()
        if kind == _ARRAY:
            self._skip_array()
            return None
        raise self._corrupt(f"a metadata value at byte {self._position} has the unknown type {kind}")

    def _skip_array(self) -> None:
        kind, count = self._number("I"), self._number("Q")
        if kind in _SCALARS:
            self._take(count * struct.calcsize("<" + _SCALARS[kind]))
        elif kind == _STRING:
            if count * 8 > self._file_bytes - self._position:
                raise self._corrupt(f"an array at byte {self._position} claims {count} texts")
            for _ in range(count):
                self._text()
        else:
            raise self._corrupt(f"an array at byte {self._position} has elements of type {kind}")

    def _tensor_info(self) -> GgufTensor:
        name = self._text()
        dimensions = self._number("I")
        if dimensions > MAX_DIMENSIONS:
            raise self._corrupt(f"tensor {name[:80]!r} claims {dimensions} dimensions")
        shape = tuple(reversed([self._number("Q") for _ in range(dimensions)]))
        kind, offset = self._number("I"), self._number("Q")
        try:
            block_type = GGMLQuantizationType(kind)
        except ValueError as error:
            raise CheckpointError(f"{self._path}: tensor {name[:80]!r} has the unknown type {kind}") from error
        block_elements, block_bytes = GGML_QUANT_SIZES[block_type]
        elements = math.prod(shape)
        if not elements or (shape[-1] if shape else 1) % block_elements:
            raise self._corrupt(f"tensor {name[:80]!r} has shape {list(shape)}, not rows of {block_type.name} blocks")
        return GgufTensor(name, shape, block_type, offset, elements // block_elements * block_bytes)

    def _placed(self, infos: list[GgufTensor], data_start: int, alignment: int) -> dict[str, GgufTensor]:
        tensors: dict[str, GgufTensor] = {}
        end = 0
        for info in sorted(infos, key=lambda tensor: tensor.start):
            name = info.name
            if name in tensors:
                raise self._corrupt(f"tensor {name[:80]!r} occurs twice")
            if info.start % alignment or info.start < end:
                raise self._corrupt(f"tensor {name[:80]!r} lies at {info.start}, which is not its place")
            end = info.start + info.nbytes
            if data_start + end > self._file_bytes:
                raise self._corrupt(
                    f"tensor {name[:80]!r} ends at byte {data_start + end}, the file at {self._file_bytes}: it was cut"
                )
            tensors[name] = GgufTensor(name, info.shape, info.block_type, data_start + info.start, info.nbytes)
        return tensors
