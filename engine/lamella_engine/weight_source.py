"""What a place that weights come from has to offer, whatever its file format."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Protocol

import torch
from transformers import PretrainedConfig

from lamella_engine.architecture import Architecture
from lamella_engine.safetensors_header import TensorEntry


class SourceKind(StrEnum):
    """Where a model's shards were built from."""

    DIRECTORY = "directory"
    GGUF = "gguf"
    HUB = "hub"


@dataclass(frozen=True)
class TensorShape:
    """A tensor to come: its native name in the module tree, torch dtype name and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Conversion:
    """One step from source tensors to native ones; nothing is read before `run` is called.

    Attributes:
        targets: what `run` returns, by native name.
        sources: names in the source files, for messages.
        run: reads and converts; may use about twice the memory of its result.
        is_copy: the one target is the one source, byte for byte, under whatever name.
    """

    targets: tuple[TensorShape, ...]
    sources: tuple[str, ...]
    run: Callable[[], Mapping[str, torch.Tensor]]
    is_copy: bool = False


class WeightSource(Protocol):
    """A checkpoint whose headers have been checked and whose tensors can be read one by one."""

    @property
    def path(self) -> Path:
        """The directory or file it lies in."""

    @property
    def fingerprint(self) -> str:
        """Hex digest of headers, sizes, change times and small files: differs for another model in the same place."""

    @property
    def dtype(self) -> str:
        """Torch dtype name of most of its bytes (of what they expand to, for packed formats)."""

    @property
    def packing(self) -> str | None:
        """The packed format that its weights arrive in, in words; None if they are plain numbers."""

    @property
    def weight_files(self) -> tuple[Path, ...]:
        """The files that hold its weights."""

    @property
    def num_tensors(self) -> int:
        """How many tensors the source files hold."""

    @property
    def companion_bytes(self) -> int:
        """What `write_companions` will write at most, in bytes."""

    def load_config(self) -> PretrainedConfig:
        """The model's config."""

    def conversions(self, architecture: Architecture) -> list[Conversion]:
        """Every step that makes native tensors of `architecture`, in any order, with exact shapes."""

    def find(self, tensor: str) -> tuple[Path, TensorEntry] | None:
        """The file that holds a source tensor as plain numbers, and its place there; None if none does."""

    def write_companions(self, directory: Path, config: PretrainedConfig) -> None:
        """Write config, generation config and tokenizer files into `directory`."""
