"""A transformers checkpoint directory: config, tokenizer files, and weights in one or many safetensors files.

Owns reading single tensors; `weight_files` finds and checks the files, `dequantise` expands packed tensors, `convert`
gives all of them their native names. Tensors are read, not mapped: a file that shrinks while it is read is an error
here and not a crash.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import torch
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from lamella_engine import architecture, convert, dequantise
from lamella_engine.dequantise import CONFIG_KEYS, Expansion, PackedWeights
from lamella_engine.errors import CheckpointError, ModelNotFound, UnsupportedModel
from lamella_engine.importers import companions
from lamella_engine.importers.imported import ImportedModel
from lamella_engine.importers.registry import find_import
from lamella_engine.importers.tensor_conversions import rule_conversions
from lamella_engine.safetensors_header import TensorEntry
from lamella_engine.weight_files import CONFIG_FILE, INDEX_FILE, SINGLE_FILE, find_weights, why_no_config
from lamella_engine.weight_source import Conversion

__all__ = [
    "COMPANIONS",
    "CONFIG_FILE",
    "INDEX_FILE",
    "SINGLE_FILE",
    "DirectoryCheckpoint",
    "WeightFiles",
    "fingerprint_of",
    "read_bytes",
]

COMPANIONS = (
    CONFIG_FILE,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "qwen.tiktoken",
)
_MAX_READ_BYTES = 1 << 30
_PACKED_ENDS = (".qweight", ".weight_packed", "_proj_blocks", ".weight.absmax", ".weight_scale_inv")

WeightFiles = tuple[tuple[Path, str], ...]


class DirectoryCheckpoint:
    """A checkpoint directory whose headers have been checked.

    Args:
        path: the directory; config and tokenizer files lie in it.
        files: its weight files, each with a digest that differs for other contents.
        tensors: by name, the file that holds it and its place there.
        expand_to: torch dtype name that packed tensors expand to; None means the config's, else bfloat16.
    """

    def __init__(
        self,
        path: Path,
        files: WeightFiles,
        tensors: Mapping[str, tuple[Path, TensorEntry]],
        expand_to: str | None = None,
    ) -> None:
        self.path = path
        self._files = files
        self._stored = tensors
        self._expand_to = expand_to

    @classmethod
    def open(cls, path: Path, *, expand_to: str | None = None) -> DirectoryCheckpoint:
        """Find and check the files of the checkpoint directory `path`.

        Raises:
            ModelNotFound: no such directory.
            CheckpointError: a file is missing, corrupt or of a kind that is not read.
        """
        if not path.is_dir():
            raise ModelNotFound(f"there is no checkpoint directory {path}")
        if not (path / CONFIG_FILE).is_file():
            raise CheckpointError(why_no_config(path))
        headers, tensors = find_weights(path)
        return cls(path, tuple((header.path, header.sha256) for header in headers), tensors, expand_to)

    @property
    def weight_files(self) -> tuple[Path, ...]:
        """The files that hold its weights."""
        return tuple(path for path, _ in self._files)

    @property
    def fingerprint(self) -> str:
        """Differs for another model in the same place, and after any of the files was written again."""
        return fingerprint_of(self.path, self._files)

    @cached_property
    def tensors(self) -> Mapping[str, TensorEntry]:
        """Every tensor under its unquantised name; what was packed has no place in a file (start 0)."""
        stored = {name: entry for name, (_, entry) in self._stored.items()}
        expansion = self._expansion
        if expansion is None:
            return stored
        dtype = str(expansion.dtype).removeprefix("torch.")
        itemsize = expansion.dtype.itemsize
        expanded = {
            tensor.name: TensorEntry(tensor.name, dtype, tensor.shape, 0, math.prod(tensor.shape) * itemsize)
            for tensor in expansion.expanded.values()
        }
        return {name: stored[name] for name in expansion.kept} | expanded

    @property
    def packing(self) -> str | None:
        """How its weights arrive, in words, if they are packed; else None."""
        return None if self._expansion is None else self._expansion.description

    @property
    def dtype(self) -> str:
        """Torch dtype name of most of the weights' bytes, of those that they expand to where they are packed."""
        bytes_by_dtype: Counter[str] = Counter()
        for entry in self.tensors.values():
            bytes_by_dtype[entry.dtype] += entry.nbytes
        return bytes_by_dtype.most_common(1)[0][0] if bytes_by_dtype else "float32"

    @property
    def num_tensors(self) -> int:
        """How many tensors the files hold, packed ones expanded."""
        return len(self.tensors)

    @property
    def companion_bytes(self) -> int:
        """Size of config and tokenizer files in bytes, at most."""
        copied = sum((self.path / name).stat().st_size for name in self._companions())
        return copied if self._imported is None else companions.written_bytes(copied)

    def load_config(self) -> PretrainedConfig:
        """The model's config, as if it had never been quantised.

        Raises:
            UnsupportedModel: it is quantised in a way that is not read.
            CheckpointError: packed tensors are missing or do not fit its settings.
        """
        config = architecture.load_config(self.path)
        if self._expansion is not None:
            config.dtype = self._expansion.dtype
        dequantise.forget_settings(config)
        return config

    def conversions(self, built: architecture.Architecture) -> list[Conversion]:
        """The steps from hub names to native names; see `convert`, and `importers` for foreign families."""
        if self._expansion is not None and any(isinstance(module, Conv1D) for module in built.model.modules()):
            raise UnsupportedModel(
                f"{self.path} is quantised, and {built.family} models store their projections the other way round than "
                "the packed formats do; use the model's unquantised checkpoint"
            )
        if self._imported is not None:
            return rule_conversions(self._imported.rules, self.tensors, self.read)
        return convert.hub_conversions(built, self.tensors, self.read)

    def find(self, tensor: str) -> tuple[Path, TensorEntry] | None:
        """See `WeightSource`; packed tensors have no place."""
        is_plain = self._expansion is None or tensor in self._expansion.kept
        return self._stored.get(tensor) if is_plain else None

    def write_companions(self, directory: Path, config: PretrainedConfig) -> None:
        """Copy config and tokenizer files as they are, less the settings of a packing that the shards do not have.

        Those of a foreign family are converted; see `importers`.
        """
        if self._imported is not None:
            companions.write(self._imported, self.path, directory, config)
            return
        for name in self._companions():
            shutil.copyfile(self.path / name, directory / name)
        if self._settings is not None:
            _forget_packing(directory / CONFIG_FILE, self._expansion.dtype if self._expansion else None)

    def read(self, name: str) -> torch.Tensor:
        """Read the tensor `name` into memory of its own, expanded if it is packed.

        Raises:
            CheckpointError: the file cannot be read or has become shorter, or packed values make no sense.
        """
        if self._expansion is not None and name in self._expansion.expanded:
            return self._expansion.expanded[name].run()
        return self._read_stored(name)

    @cached_property
    def _imported(self) -> ImportedModel | None:
        return find_import(self.path)

    @cached_property
    def _settings(self) -> Mapping[str, object] | None:
        return dequantise.find_settings(architecture.load_config(self.path), self.path)

    @cached_property
    def _expansion(self) -> Expansion | None:
        if self._settings is None:
            self._check_unpacked()
            return None
        config = architecture.load_config(self.path)
        stored = {name: entry for name, (_, entry) in self._stored.items()}
        dtype = getattr(torch, self._expand_to) if self._expand_to else dequantise.expanded_dtype(config)
        try:
            found = dequantise.open_expansion(PackedWeights(self._settings, stored, self._read_stored, dtype))
        except UnsupportedModel as error:
            raise UnsupportedModel(f"{self.path}: {error}") from error
        return found if found.expanded else None

    def _check_unpacked(self) -> None:
        packed = next((name for name in self._stored if name.endswith(_PACKED_ENDS)), None)
        if packed is not None:
            raise CheckpointError(
                f"{self.path} holds packed tensors, such as {packed!r}, and neither its config.json nor a file beside "
                "it says how they are packed; fetch config.json (and quantize_config.json, if there is one) again"
            )

    def _read_stored(self, name: str) -> torch.Tensor:
        path, entry = self._stored[name]
        return read_bytes(path, entry.start, entry.nbytes).view(getattr(torch, entry.dtype)).view(entry.shape)

    def _companions(self) -> list[str]:
        return _companions(self.path)


def fingerprint_of(path: Path, files: WeightFiles) -> str:
    """What `DirectoryCheckpoint.fingerprint` is for a checkpoint in `path` with those weight files.

    Raises:
        CheckpointError: one of them cannot be read.
    """
    digest = hashlib.sha256()
    try:
        for file, content in files:
            stat = file.stat()
            digest.update(f"{file.name} {content} {stat.st_size} {stat.st_mtime_ns}\n".encode())
        for name in _companions(path):
            digest.update(f"{name} {hashlib.sha256((path / name).read_bytes()).hexdigest()}\n".encode())
    except OSError as error:
        raise CheckpointError(f"cannot read {error.filename}: {error.strerror or error}") from error
    return digest.hexdigest()


def read_bytes(path: Path, start: int, nbytes: int) -> torch.Tensor:
    """Read `nbytes` bytes of `path` from `start` on, as a uint8 tensor.

    Raises:
        CheckpointError: the file cannot be read or ends before.
    """
    buffer = torch.empty(nbytes, dtype=torch.uint8)
    view = memoryview(buffer.numpy())  # type: ignore[arg-type] # numpy arrays are buffers
    done = 0
    try:
        with path.open("rb", buffering=0) as file:
            while done < nbytes:
                count = os.preadv(file.fileno(), [view[done : done + _MAX_READ_BYTES]], start + done)
                if count == 0:
                    raise CheckpointError(f"{path} ends {nbytes - done} bytes early; it was changed while it was read")
                done += count
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    return buffer


def _companions(path: Path) -> list[str]:
    return [name for name in COMPANIONS if (path / name).is_file()]


def _forget_packing(config_path: Path, dtype: torch.dtype | None) -> None:
    values = json.loads(config_path.read_text(encoding="utf-8"))
    for owner in (values, values.get("text_config")):
        if isinstance(owner, dict):
            for key in CONFIG_KEYS:
                owner.pop(key, None)
            if dtype is not None:
                owner.pop("torch_dtype", None)
                owner["dtype"] = str(dtype).removeprefix("torch.")
    config_path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
