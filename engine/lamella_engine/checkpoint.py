"""A checkpoint as it comes from outside: where its tensors are and what its config says.

One small interface for safetensors directories (here) and GGUF files (`gguf_checkpoint`): tensors grouped by decoder
layer under the native names of transformers' module tree, read one group at a time.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import PretrainedConfig

from lamella_engine import architecture
from lamella_engine.architecture import Architecture
from lamella_engine.errors import CheckpointError, ModelNotFound, UnsupportedModel
from lamella_engine.safetensors_header import SafetensorsHeader, TensorEntry, read_header

ROOT_GROUP = -1  # tensors outside the decoder layers

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
SIDE_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "tekken.json",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip


class Checkpoint(Protocol):
    """A source of weights."""

    kind: str
    dtype: str  # torch dtype name of most weight bytes, as they will be stored

    def config(self) -> PretrainedConfig:
        """The model's config."""

    def names(self) -> tuple[str, ...]:
        """Source names of all tensors."""

    def nbytes(self, name: str) -> int:
        """Bytes that the tensor `name` takes in the source."""

    def files(self) -> tuple[Path, ...]:
        """The files that decide what the model computes: weights, and the config where it is a file of its own."""

    def save_side_files(self, directory: Path) -> None:
        """Copy config, generation config and tokenizer to `directory`."""

    def groups(self, built: Architecture, dtype: str | None) -> Mapping[int, GroupSource]:
        """The tensors of each decoder layer and of `ROOT_GROUP`, converted to `dtype` if given, to be read lazily."""


class GroupSource(Protocol):
    """The tensors of one layer, or of all that lies outside the layers."""

    def expected(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Native name within the group -> torch dtype name and shape, in the order `load` gives them."""

    def load(self) -> dict[str, torch.Tensor]:
        """Read and convert the tensors.

        Raises:
            CheckpointError: one is missing or has the wrong shape.
        """


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a checkpoint directory or a ``.gguf`` file.

    Raises:
        ModelNotFound: there is nothing at `path`.
        CheckpointError: what is there is no checkpoint, or a corrupt one.
    """
    if path.is_file() and path.suffix == ".gguf":
        from lamella_engine.gguf_checkpoint import GgufCheckpoint  # loads another library

        return GgufCheckpoint(path)
    if not path.is_dir():
        raise ModelNotFound(f"there is no checkpoint at {path}; give a directory with config.json, or a .gguf file")
    return SafetensorsCheckpoint(path)


def fingerprint(checkpoint: Checkpoint) -> str:
    """A hash that changes when the checkpoint's config, or the headers, sizes or times of its weight files change."""
    digest = hashlib.sha256()
    for path in sorted(checkpoint.files()):
        status = path.stat()
        digest.update(f"{path.name}:{status.st_size}:{status.st_mtime_ns}:".encode())
        with path.open("rb") as file:
            digest.update(file.read(1 << 20))
    return digest.hexdigest()


class SafetensorsCheckpoint:
    """A transformers checkpoint directory with one or several safetensors files, found through its index."""

    kind = "safetensors"

    def __init__(self, directory: Path) -> None:
        self.config_dir = directory
        _refuse_quantised(directory)
        self._entries: dict[str, tuple[SafetensorsHeader, TensorEntry]] = {}
        for header in _read_headers(directory):
            for name, entry in header.entries.items():
                self._entries[name] = (header, entry)
        sizes: dict[str, int] = {}
        for _, entry in self._entries.values():
            if entry.dtype.startswith(("float", "bfloat")):
                sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.nbytes
        if not sizes:
            raise CheckpointError(f"{directory} holds no floating-point weights")
        self.dtype = max(sizes, key=lambda dtype: sizes[dtype])

    def config(self) -> PretrainedConfig:
        """See `Checkpoint`."""
        return architecture.load_config(self.config_dir)

    def names(self) -> tuple[str, ...]:
        """See `Checkpoint`."""
        return tuple(self._entries)

    def nbytes(self, name: str) -> int:
        """See `Checkpoint`."""
        return self._entries[name][1].nbytes

    def files(self) -> tuple[Path, ...]:
        """See `Checkpoint`."""
        weights = {header.path: None for header, _ in self._entries.values()}
        return (self.config_dir / "config.json", *weights)

    def save_side_files(self, directory: Path) -> None:
        """See `Checkpoint`."""
        copy_side_files(self.config_dir, directory)

    def groups(self, built: Architecture, dtype: str | None) -> Mapping[int, GroupSource]:
        """See `Checkpoint`."""
        from lamella_engine.convert import hub_groups  # convert builds on this module

        return hub_groups(self, built, dtype)

    def entry(self, name: str) -> TensorEntry:
        """Type, shape and place of the tensor `name`."""
        return self._entries[name][1]

    def tensor(self, name: str) -> torch.Tensor:
        """Read one tensor into memory of its own."""
        header, entry = self._entries[name]
        data = bytearray(entry.nbytes)
        with header.path.open("rb") as file:
            file.seek(entry.begin)
            if file.readinto(data) != entry.nbytes:
                raise CheckpointError(f"{header.path} ended inside tensor {name!r}; it changed while being read")
        if not data:
            return torch.empty(entry.shape, dtype=getattr(torch, entry.dtype))
        flat: torch.Tensor = torch.frombuffer(data, dtype=getattr(torch, entry.dtype))
        return flat.reshape(entry.shape)


def copy_side_files(source: Path, directory: Path) -> None:
    """Copy the config and tokenizer files that exist in `source`."""
    for name in SIDE_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, directory / name)


def _read_headers(directory: Path) -> Iterable[SafetensorsHeader]:
    index = directory / INDEX_FILE
    if index.is_file():
        weight_map = _weight_map(index)
        headers = {name: read_header(directory / name) for name in sorted(set(weight_map.values()))}
        for tensor, name in weight_map.items():
            if tensor not in headers[name].entries:
                raise CheckpointError(f"{index} says that {tensor!r} is in {name}, where it is not. Fetch both again.")
        return headers.values()
    if (directory / SINGLE_FILE).is_file():
        return [read_header(directory / SINGLE_FILE)]
    if any(directory.glob("*.bin")) or any(directory.glob("*.pt*")):
        raise CheckpointError(
            f"{directory} holds pickled weights (.bin or .pt), which can run code when read and are not opened. "
            "Convert them first: load them once with transformers and save_pretrained, which writes safetensors."
        )
    raise CheckpointError(f"{directory} holds neither {INDEX_FILE} nor {SINGLE_FILE}")


def _weight_map(index: Path) -> dict[str, str]:
    try:
        listed: Any = json.loads(index.read_text())["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{index} is not a safetensors index. Fetch it again.") from error
    if not isinstance(listed, dict) or not listed:
        raise CheckpointError(f"{index} lists no tensors. Fetch it again.")
    for name in listed.values():
        if not isinstance(name, str) or os.path.basename(name) != name:
            raise CheckpointError(f"{index} names the file {name!r}, which is not inside the checkpoint")
    return listed


def _refuse_quantised(directory: Path) -> None:
    path = directory / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{directory} has no config.json; give the directory of a transformers checkpoint")
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON. Fetch it again.") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} is not a config. Fetch it again.")
    if quantised := config.get("quantization_config"):
        method = quantised.get("quant_method", "unknown") if isinstance(quantised, dict) else "unknown"
        raise UnsupportedModel(
            f"{directory} is quantised ({method}), which cannot be expanded; use the model's bf16 or fp16 checkpoint, "
            "or a GGUF file of it"
        )
