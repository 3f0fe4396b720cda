"""A GGUF file as a source of weights: config, tokenizer, and tensors expanded one by one.

Owns reading and expanding; names and value transforms are transformers' own, so that the weights are those of its full
load, bit for bit. `gguf_header` has checked the file before any library reads it.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import gguf
import numpy
import torch
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PretrainedConfig
from transformers.modeling_gguf_pytorch_utils import (
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
    load_gguf_checkpoint,
)

from lamella_engine.architecture import Architecture
from lamella_engine.checkpoint import read_bytes
from lamella_engine.errors import CheckpointError, ModelNotFound, UnsupportedModel
from lamella_engine.gguf_header import GgufHeader, GgufTensor, read_gguf_header
from lamella_engine.safetensors_header import TensorEntry
from lamella_engine.weight_source import Conversion, TensorShape

logger = logging.getLogger(__name__)

T = TypeVar("T")
_Array = numpy.ndarray[Any, Any]
_EXPAND_BYTES = 1 << 24  # expanded at a time


class GgufCheckpoint:
    """A GGUF file whose header has been checked."""

    def __init__(self, header: GgufHeader) -> None:
        self._header = header
        self.path = header.path
        self._values: Mapping[str, Any] | None = None

    @classmethod
    def open(cls, path: Path) -> GgufCheckpoint:
        """Check the header of the GGUF file `path`.

        Raises:
            ModelNotFound: no such file.
            CheckpointError: the file is corrupt.
            UnsupportedModel: it holds blocks of a type that cannot be expanded.
        """
        if not path.is_file():
            raise ModelNotFound(f"there is no GGUF file {path}")
        header = read_gguf_header(path)
        for block_type in {tensor.block_type for tensor in header.tensors.values()}:
            _check_expandable(path, block_type)
        return cls(header)

    @property
    def fingerprint(self) -> str:
        """Differs for another model in the same place, and after the file was written again."""
        try:
            stat = self.path.stat()
        except OSError as error:
            raise CheckpointError(f"cannot read {self.path}: {error.strerror or error}") from error
        return hashlib.sha256(f"{self._header.sha256} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()

    @property
    def dtype(self) -> str:
        """What the blocks expand to."""
        return "float32"

    @property
    def packing(self) -> str:
        """The block type of most of its bytes."""
        bytes_by_type: Counter[str] = Counter()
        for tensor in self._header.tensors.values():
            bytes_by_type[tensor.block_type.name] += tensor.nbytes
        return f"gguf, {' and '.join(name for name, _ in bytes_by_type.most_common(1))}"

    @property
    def weight_files(self) -> tuple[Path, ...]:
        """The file itself."""
        return (self.path,)

    @property
    def num_tensors(self) -> int:
        """How many tensors the file holds."""
        return len(self._header.tensors)

    @property
    def companion_bytes(self) -> int:
        """Upper bound of config and tokenizer files: the vocabulary is nearly all of the header."""
        return 4 * self._header.header_bytes + 65_536

    def load_config(self) -> PretrainedConfig:
        """The config that the metadata describe; weights expand to float32."""
        config = self._through_transformers("config", self._make_config)
        config.dtype = torch.float32
        return config

    def _make_config(self) -> PretrainedConfig:
        values = self._config_values()
        return type(AutoConfig.for_model(values["model_type"])).from_dict(dict(values))

    def _config_values(self) -> Mapping[str, Any]:
        """The metadata under transformers' names; parsed once, since a large vocabulary takes seconds."""
        if self._values is None:
            self._values = load_gguf_checkpoint(str(self.path))["config"]
        return self._values

    def conversions(self, built: Architecture) -> list[Conversion]:
        """One step per native tensor; experts that are fused take several file tensors."""
        values = self._through_transformers("metadata", self._config_values)
        processor = TENSOR_PROCESSORS.get(self._header.architecture, TensorProcessor)(config=values)
        tree = _NameTree(built.model, built.model.base_model_prefix)
        names: dict[str, str] = self._through_transformers(
            "tensor names", lambda: get_gguf_hf_weights_map(tree, processor)
        )
        if "rope_freqs.weight" in self._header.tensors:
            logger.warning("%s has scaled rotary frequencies, which are not applied: long contexts suffer", self.path)
        native: dict[str, torch.Tensor] = built.model.state_dict()
        sources: defaultdict[str, list[GgufTensor]] = defaultdict(list)
        for name, tensor in self._header.tensors.items():
            target = names.get(name) or names.get(name.removesuffix(".weight")) or name
            sources[target].append(tensor)

        def process(weights: _Array, name: str, made: dict[str, torch.Tensor]) -> Any:
            parameters = {"tensors": made}
            return processor.process(weights=weights, name=name, tensor_key_mapping=names, parsed_parameters=parameters)

        return [self._conversion(target, tuple(tensors), native, process) for target, tensors in sources.items()]

    def find(self, tensor: str) -> tuple[Path, TensorEntry] | None:
        """See `WeightSource`; its numbers are all in forms of their own."""
        return None

    def write_companions(self, directory: Path, config: PretrainedConfig) -> None:
        """Write what the metadata hold as the files of a transformers checkpoint."""
        config.save_pretrained(directory)
        GenerationConfig.from_model_config(config).save_pretrained(directory)
        tokenizer = self._through_transformers(
            "tokenizer", lambda: AutoTokenizer.from_pretrained(self.path.parent, gguf_file=self.path.name)
        )
        tokenizer.save_pretrained(directory)

    def _conversion(
        self,
        target: str,
        tensors: tuple[GgufTensor, ...],
        native: dict[str, torch.Tensor],
        process: Callable[[_Array, str, dict[str, torch.Tensor]], Any],
    ) -> Conversion:
        def run() -> dict[str, torch.Tensor]:
            made: dict[str, torch.Tensor] = {}
            for tensor in tensors:
                result = process(self._expand(tensor), tensor.name, made)
                if result.name is not None:
                    made[target] = torch.from_numpy(numpy.ascontiguousarray(result.weights))
            return made

        elements = sum(math.prod(tensor.shape) for tensor in tensors)
        shape = tensors[0].shape
        if target in native and native[target].numel() == elements:
            shape = tuple(native[target].shape)
        return Conversion((TensorShape(target, "float32", shape),), tuple(tensor.name for tensor in tensors), run)

    def _expand(self, tensor: GgufTensor) -> _Array:
        """The tensor's values as float32, a few rows at a time: blocks never reach over the end of a row."""
        columns = tensor.shape[-1] if tensor.shape else 1
        rows = math.prod(tensor.shape) // columns
        row_bytes = tensor.nbytes // rows
        values = numpy.empty((rows, columns), dtype=numpy.float32)
        step = max(1, _EXPAND_BYTES // values[0].nbytes)
        for first in range(0, rows, step):
            last = min(first + step, rows)
            raw = read_bytes(self.path, tensor.start + first * row_bytes, (last - first) * row_bytes)
            values[first:last] = gguf.dequantize(raw.numpy().reshape(-1, row_bytes), tensor.block_type)
        return values.reshape(tensor.shape)

    def _through_transformers(self, what: str, call: Callable[[], T]) -> T:
        try:
            return call()
        except Exception as error:
            if isinstance(error, NotImplementedError) or "not supported" in str(error):
                raise UnsupportedModel(
                    f"GGUF files of the architecture {self._header.architecture!r} are not read yet ({self.path}): "
                    f"{error}. Use the model's safetensors checkpoint."
                ) from error
            raise CheckpointError(
                f"the {what} of {self.path} cannot be used: {type(error).__name__}: {error}. The file is damaged, or "
                "made by another program than is known here."
            ) from error


class _NameTree:
    """What transformers' name mapping looks at: a model and, one level below, its base model.

    Given the model itself it would build the same table once per module, which takes longer than all the rest.
    """

    def __init__(self, module: torch.nn.Module, base_model_prefix: str) -> None:
        self.config: Any = getattr(module, "config", None)
        self._module = module
        self._prefix = base_model_prefix

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self._module.state_dict()

    def named_children(self) -> list[tuple[str, _NameTree]]:
        base = getattr(self._module, self._prefix, None) if self._prefix else None
        return [(self._prefix, _NameTree(base, ""))] if isinstance(base, torch.nn.Module) else []


def _check_expandable(path: Path, block_type: gguf.GGMLQuantizationType) -> None:
    _, block_bytes = gguf.GGML_QUANT_SIZES[block_type]
    try:
        gguf.dequantize(numpy.zeros((1, block_bytes), dtype=numpy.uint8), block_type)
    except NotImplementedError as error:
        raise UnsupportedModel(
            f"{path} holds tensors of type {block_type.name}, which cannot be expanded; use another quantisation"
        ) from error
