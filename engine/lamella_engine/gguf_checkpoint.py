"""A GGUF file as a checkpoint: its blocks are expanded exactly, one tensor at a time.

Config, tokenizer, names and value transforms are those of transformers' own GGUF support, so that the weights equal
its full load bit for bit.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy
import torch
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PretrainedConfig
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

from lamella_engine.architecture import Architecture
from lamella_engine.checkpoint import ROOT_GROUP, GroupSource
from lamella_engine.convert import GroupNames, native_groups
from lamella_engine.errors import CheckpointError, UnsupportedModel

_BLOCK = re.compile(r"blk\.(\d+)\.")
_READ_ERRORS = (ValueError, KeyError, IndexError, TypeError, OverflowError, MemoryError, UnicodeError, struct.error)


class GgufGroup:
    """The tensors of one group of a GGUF file; see `checkpoint.GroupSource`."""

    def __init__(
        self,
        processor: TensorProcessor,
        name_map: dict[str, str],
        names: GroupNames,
        tensors: list[gguf.ReaderTensor],
    ) -> None:
        self._processor = processor
        self._name_map = name_map
        self._names = names
        self._tensors = tensors

    def expected(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """See `GroupSource`."""
        return {
            short: (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
            for short, (_, tensor) in self._names.tensors.items()
        }

    def load(self) -> dict[str, torch.Tensor]:
        """See `GroupSource`."""
        found: dict[str, torch.Tensor] = {}
        for tensor in self._tensors:
            try:
                values = gguf.dequantize(tensor.data, tensor.tensor_type)
            except (NotImplementedError, *_READ_ERRORS) as error:
                raise CheckpointError(
                    f"GGUF tensor {tensor.name!r} of type {tensor.tensor_type.name} cannot be expanded: {error}"
                ) from error
            processed = self._processor.process(
                values, tensor.name, tensor_key_mapping=self._name_map, parsed_parameters={"tensors": found}
            )
            if processed.name in self._name_map:
                found[self._name_map[processed.name]] = torch.from_numpy(numpy.array(processed.weights))
        dtypes = {full: str(t.dtype).removeprefix("torch.") for full, t in self._names.tensors.values()}
        return self._names.collect(found, dtypes)


class GgufCheckpoint:
    """One ``.gguf`` file with the weights of a whole model."""

    kind = "gguf"
    dtype = "float32"  # what the blocks expand to without loss

    def __init__(self, path: Path) -> None:
        self._path = path
        self._reader = _open(path)
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}

    def config(self) -> PretrainedConfig:
        """See `Checkpoint`."""
        try:
            return AutoConfig.from_pretrained(self._path.parent, gguf_file=self._path.name, local_files_only=True)
        except (OSError, NotImplementedError, *_READ_ERRORS) as error:
            raise UnsupportedModel(f"transformers cannot read the model in {self._path}: {error}") from error

    def names(self) -> tuple[str, ...]:
        """See `Checkpoint`."""
        return tuple(self._tensors)

    def nbytes(self, name: str) -> int:
        """See `Checkpoint`."""
        return int(self._tensors[name].n_bytes)

    def files(self) -> tuple[Path, ...]:
        """See `Checkpoint`."""
        return (self._path,)

    def save_side_files(self, directory: Path) -> None:
        """See `Checkpoint`."""
        config = self.config()
        config.save_pretrained(directory)
        GenerationConfig.from_model_config(config).save_pretrained(directory)
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                self._path.parent, gguf_file=self._path.name, local_files_only=True
            )
        except (OSError, NotImplementedError, *_READ_ERRORS) as error:
            raise CheckpointError(f"the tokenizer in {self._path} cannot be read: {error}") from error
        tokenizer.save_pretrained(directory)

    def groups(self, built: Architecture, dtype: str | None) -> Mapping[int, GroupSource]:
        """See `Checkpoint`."""
        architecture_name = str(self._reader.fields["general.architecture"].contents())
        processor = TENSOR_PROCESSORS.get(architecture_name, TensorProcessor)(config=built.model.config.to_dict())
        try:
            name_map = get_gguf_hf_weights_map(built.model, processor)
        except (NotImplementedError, *_READ_ERRORS) as error:
            raise UnsupportedModel(f"transformers cannot name the tensors of {self._path}: {error}") from error
        tensors: dict[int, list[Any]] = {index: [] for index in (ROOT_GROUP, *range(len(built.layers)))}
        for tensor in self._tensors.values():
            match = _BLOCK.match(tensor.name)
            tensors.setdefault(int(match[1]) if match else ROOT_GROUP, []).append(tensor)
        present = {full for name, full in name_map.items() if name in self._tensors}
        groups = native_groups(built, present, dtype)
        return {index: GgufGroup(processor, name_map, names, tensors[index]) for index, names in groups.items()}


def _open(path: Path) -> gguf.GGUFReader:
    try:
        reader = gguf.GGUFReader(path)
        fields = reader.fields["general.architecture"].contents()
        file_bytes = path.stat().st_size
        ends = [int(tensor.data_offset + tensor.n_bytes) for tensor in reader.tensors]
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except _READ_ERRORS as error:
        raise CheckpointError(f"{path} is not a sound GGUF file: {error}. Fetch it again.") from error
    if not isinstance(fields, str) or not ends:
        raise CheckpointError(f"{path} is not a sound GGUF file: it names no architecture or no tensors")
    if max(ends) > file_bytes:
        raise CheckpointError(f"{path} is truncated: its tensors need {max(ends)} bytes, it has {file_bytes}")
    return reader
