"""A transformers checkpoint directory: config, tokenizer files, and weights in one or many safetensors files.

Owns finding and checking the files and reading single tensors; `convert` gives them their native names. Files are
found through the index, never by their names. Tensors are read, not mapped: a file that shrinks while it is read is an
error here and not a crash.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import PretrainedConfig

from lamella_engine import architecture, convert
from lamella_engine.errors import CheckpointError, ModelNotFound, UnsupportedModel
from lamella_engine.safetensors_header import SafetensorsHeader, TensorEntry, read_header
from lamella_engine.weight_source import Conversion

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILE = "config.json"
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
)
_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.00.pth")
_MAX_READ_BYTES = 1 << 30


class DirectoryCheckpoint:
    """A checkpoint directory whose headers have been checked."""

    def __init__(self, path: Path, headers: tuple[SafetensorsHeader, ...]) -> None:
        self.path = path
        self._headers = headers
        self.tensors: Mapping[str, tuple[Path, TensorEntry]] = {
            name: (header.path, entry) for header in headers for name, entry in header.tensors.items()
        }

    @classmethod
    def open(cls, path: Path) -> DirectoryCheckpoint:
        """Find and check the files of the checkpoint directory `path`.

        Raises:
            ModelNotFound: no such directory.
            CheckpointError: a file is missing, corrupt or of a kind that is not read.
        """
        if not path.is_dir():
            raise ModelNotFound(f"there is no checkpoint directory {path}")
        if not (path / CONFIG_FILE).is_file():
            raise CheckpointError(f"{path} has no {CONFIG_FILE}; give the directory of a transformers checkpoint")
        if (path / SINGLE_FILE).is_file():
            return cls(path, (read_header(path / SINGLE_FILE),))
        if (path / INDEX_FILE).is_file():
            return cls(path, _indexed_headers(path))
        raise CheckpointError(_why_no_weights(path))

    @property
    def fingerprint(self) -> str:
        """Differs for another model in the same place, and after any of the files was written again."""
        digest = hashlib.sha256()
        try:
            for header in self._headers:
                stat = header.path.stat()
                digest.update(f"{header.path.name} {header.sha256} {stat.st_size} {stat.st_mtime_ns}\n".encode())
            for name in self._companions():
                digest.update(f"{name} {hashlib.sha256((self.path / name).read_bytes()).hexdigest()}\n".encode())
        except OSError as error:
            raise CheckpointError(f"cannot read {error.filename}: {error.strerror or error}") from error
        return digest.hexdigest()

    @property
    def dtype(self) -> str:
        """Torch dtype name of most of the weights' bytes."""
        bytes_by_dtype: Counter[str] = Counter()
        for _, entry in self.tensors.values():
            bytes_by_dtype[entry.dtype] += entry.nbytes
        return bytes_by_dtype.most_common(1)[0][0] if bytes_by_dtype else "float32"

    @property
    def num_tensors(self) -> int:
        """How many tensors the files hold."""
        return len(self.tensors)

    @property
    def companion_bytes(self) -> int:
        """Size of config and tokenizer files in bytes."""
        return sum((self.path / name).stat().st_size for name in self._companions())

    def load_config(self) -> PretrainedConfig:
        """The model's config; checkpoints with quantised weights are refused."""
        config = architecture.load_config(self.path)
        quantization = getattr(config, "quantization_config", None)
        if quantization:
            method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
            raise UnsupportedModel(
                f"{self.path} is quantised with {method}, which is not read yet; "
                "use the model's unquantised checkpoint or a GGUF file"
            )
        return config

    def conversions(self, built: architecture.Architecture) -> list[Conversion]:
        """The steps from hub names to native names; see `convert`."""
        return convert.hub_conversions(built, {name: entry for name, (_, entry) in self.tensors.items()}, self.read)

    def write_companions(self, directory: Path, config: PretrainedConfig) -> None:
        """Copy config and tokenizer files as they are."""
        for name in self._companions():
            shutil.copyfile(self.path / name, directory / name)

    def read(self, name: str) -> torch.Tensor:
        """Read the tensor `name` into memory of its own.

        Raises:
            CheckpointError: the file cannot be read or has become shorter.
        """
        path, entry = self.tensors[name]
        return read_bytes(path, entry.start, entry.nbytes).view(getattr(torch, entry.dtype)).view(entry.shape)

    def _companions(self) -> list[str]:
        return [name for name in COMPANIONS if (self.path / name).is_file()]


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


def _indexed_headers(path: Path) -> tuple[SafetensorsHeader, ...]:
    index = path / INDEX_FILE
    weight_map = _weight_map(index)
    headers = []
    for file_name in sorted(set(weight_map.values())):
        if Path(file_name).name != file_name or file_name in (".", ".."):
            raise CheckpointError(f"{index} names the file {file_name!r}, which is not a plain file name")
        if not (path / file_name).is_file():
            raise CheckpointError(f"{path / file_name} is missing, though {INDEX_FILE} names it; fetch it again")
        headers.append(read_header(path / file_name))
    found = {name: header.path.name for header in headers for name in header.tensors}
    absent = [name for name, file_name in weight_map.items() if found.get(name) != file_name]
    if absent:
        raise CheckpointError(
            f"{index} names {len(absent)} tensors that their files do not hold, such as {absent[0]!r} in "
            f"{weight_map[absent[0]]}; the files do not belong together, fetch them again"
        )
    return tuple(headers)


def _weight_map(index: Path) -> dict[str, str]:
    try:
        parsed = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{index} cannot be read as JSON: {error}") from error
    weight_map = parsed.get("weight_map") if isinstance(parsed, dict) else None
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{index} has no 'weight_map' from tensor names to file names; fetch it again")
    return weight_map


def _why_no_weights(path: Path) -> str:
    pickled = [name for name in _PICKLED if (path / name).exists()]
    if pickled:
        return (
            f"{path} has its weights in {pickled[0]}, a pickle, which could run code and is not read; convert it with "
            "transformers on a machine that trusts it: AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
        )
    ggufs = sorted(file.name for file in path.glob("*.gguf"))
    if ggufs:
        return f"{path} holds GGUF files; name the file itself, such as {path / ggufs[0]}"
    return f"{path} has neither {SINGLE_FILE} nor {INDEX_FILE}; a checkpoint in safetensors or GGUF form is needed"
