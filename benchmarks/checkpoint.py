"""The checkpoint everybody loads: a random Llama of any size, written at the disk's speed, or a GGUF exported.

Owns the shape, the weights and the files; knows nothing of who loads them. One safetensors file a module (embedding,
each layer, norm, head) beside an index, config, generation config and a byte tokenizer, as a hub would serve it.
Neighbours: `sweep` asks for it, `peers` and `lamella_run` load it.

    python -m benchmarks.checkpoint DIR --layers 16 --hidden 4096 --ffn 14336      a random Llama
    python -m benchmarks.checkpoint DIR --gguf FILE.gguf                           a GGUF as safetensors
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import struct
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch

STANDARD_DEVIATION = 0.02  # transformers' `initializer_range`
CONTEXT_TOKENS = 4096
SEED = 0
STAMP = "benchmark-shape.json"
INDEX = "model.safetensors.index.json"
_HEADER_ALIGNMENT = 4096
_CHUNK_NUMBERS = 1 << 24  # drawn at once by one thread
_WRITE_BYTES = 1 << 24
_DTYPES = {"bfloat16": (torch.bfloat16, "BF16"), "float16": (torch.float16, "F16"), "float32": (torch.float32, "F32")}


@dataclass(frozen=True)
class LlamaShape:
    """The size of a random Llama; untied head, weights normal with deviation 0.02, norms 1."""

    layers: int
    hidden: int
    ffn: int
    vocab: int
    heads: int
    kv_heads: int
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        for name in ("layers", "hidden", "ffn", "vocab", "heads", "kv_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least 1")
        if self.dtype not in _DTYPES:
            raise ValueError(f"--dtype is {self.dtype!r}; use one of {', '.join(_DTYPES)}")
        if self.hidden % self.heads or self.heads % self.kv_heads or (self.hidden // self.heads) % 2:
            raise ValueError(
                f"--heads {self.heads} and --kv-heads {self.kv_heads} do not divide --hidden {self.hidden} into even "
                "heads; use for example --hidden 4096 --heads 32 --kv-heads 8"
            )
        if self.vocab < 512:
            raise ValueError(f"--vocab is {self.vocab}; the byte tokenizer needs at least 512")

    @property
    def nbytes(self) -> int:
        """Bytes of all weights."""
        return sum(math.prod(shape) for _, tensors in self.modules() for _, shape in tensors) * self.itemsize

    @property
    def itemsize(self) -> int:
        """Bytes of one number."""
        return _DTYPES[self.dtype][0].itemsize

    def modules(self) -> Iterator[tuple[str, list[tuple[str, tuple[int, ...]]]]]:
        """Every module that gets a file, with its tensors (native names) and their shapes, in forward order."""
        kv_width = self.hidden // self.heads * self.kv_heads
        layer: dict[str, tuple[int, ...]] = {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (kv_width, self.hidden),
            "self_attn.v_proj": (kv_width, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.ffn, self.hidden),
            "mlp.up_proj": (self.ffn, self.hidden),
            "mlp.down_proj": (self.hidden, self.ffn),
            "input_layernorm": (self.hidden,),
            "post_attention_layernorm": (self.hidden,),
        }
        yield "embedding", [("model.embed_tokens.weight", (self.vocab, self.hidden))]
        for index in range(self.layers):
            yield f"layer {index}", [(f"model.layers.{index}.{name}.weight", shape) for name, shape in layer.items()]
        yield "norm", [("model.norm.weight", (self.hidden,))]
        yield "head", [("lm_head.weight", (self.vocab, self.hidden))]


class _ModuleFile(NamedTuple):
    path: Path
    tensors: list[tuple[str, tuple[int, ...]]]
    offset: int  # in numbers, where in the circle of random numbers the module begins


def build_checkpoint(shape: LlamaShape, directory: Path) -> Path:
    """Write the random Llama of `shape` into `directory`, unless it is there already; returns the directory.

    The numbers are drawn once (as many as the largest module has, seeded) and every module reads that circle from
    another place, so that layers differ and writing costs no more than the disk does.

    Raises:
        OSError: the disk is full or not writable.
    """
    stamp = directory / STAMP
    if stamp.is_file() and json.loads(stamp.read_text()) == asdict(shape):
        return directory
    if directory.exists():
        shutil.rmtree(directory)
    directory.mkdir(parents=True)
    free = shutil.disk_usage(directory).free
    if free < shape.nbytes * 1.02:
        raise OSError(
            f"{directory} has {free / 1e9:.1f} GB free and the checkpoint needs {shape.nbytes / 1e9:.1f} GB; "
            "name another --work-dir or a smaller model"
        )
    modules = list(shape.modules())
    largest = max(sum(math.prod(size) for _, size in tensors if len(size) > 1) for _, tensors in modules)
    numbers = _random_bytes(largest, shape.dtype)
    step = largest // len(modules) | 1  # odd, so that no two modules' rows lie alike
    files = [
        _ModuleFile(directory / f"model-{place + 1:05d}-of-{len(modules):05d}.safetensors", tensors, place * step)
        for place, (_, tensors) in enumerate(modules)
    ]
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        for written in [pool.submit(_write_module, file, numbers, shape) for file in files]:
            written.result(timeout=3600)
    _write_side_files(shape, files, directory)
    stamp.write_text(json.dumps(asdict(shape)))
    return directory


def export_gguf(gguf: Path, directory: Path) -> Path:
    """Write a GGUF's model, expanded, as float32 safetensors with config and tokenizer into `directory`."""
    if (directory / STAMP).is_file() and json.loads((directory / STAMP).read_text()) == _gguf_stamp(gguf):
        return directory
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        str(gguf.parent),
        gguf_file=gguf.name,
        quantization_config=transformers.GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    directory.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(directory)
    transformers.AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name).save_pretrained(directory)
    (directory / STAMP).write_text(json.dumps(_gguf_stamp(gguf)))
    return directory


def weight_files(directory: Path) -> list[Path]:
    """The files that hold the weights of a checkpoint.

    Raises:
        FileNotFoundError: there are none.
    """
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(
            f"{directory} holds no safetensors files; name a checkpoint directory, or a .gguf file, with --model"
        )
    return files


def tensor_bytes(directory: Path) -> dict[str, int]:
    """Bytes of every tensor in a checkpoint, by name."""
    sizes: dict[str, int] = {}
    for path in weight_files(directory):
        with path.open("rb") as file:
            header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        for name, entry in header.items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                sizes[name] = end - begin
    return sizes


def _gguf_stamp(gguf: Path) -> dict[str, int | str]:
    stat = gguf.stat()
    return {"gguf": str(gguf.resolve()), "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def _random_bytes(count: int, dtype: str) -> memoryview:
    """`count` normal numbers in `dtype` as bytes; chunks are seeded apart, so threads change nothing."""
    numbers = torch.empty(count, dtype=_DTYPES[dtype][0])

    def draw(start: int) -> None:
        generator = torch.Generator().manual_seed(SEED + start)
        part = numbers[start : start + _CHUNK_NUMBERS]
        part.copy_(torch.randn(len(part), generator=generator).mul_(STANDARD_DEVIATION))

    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        for drawn in [pool.submit(draw, start) for start in range(0, count, _CHUNK_NUMBERS)]:
            drawn.result(timeout=600)
    return memoryview(numbers.view(torch.uint8).numpy())  # type: ignore[arg-type] # numpy arrays are buffers


def _write_module(file: _ModuleFile, numbers: memoryview, shape: LlamaShape) -> None:
    itemsize, place = shape.itemsize, file.offset * shape.itemsize % len(numbers)
    ones = torch.ones(shape.hidden, dtype=_DTYPES[shape.dtype][0]).view(torch.uint8).numpy().tobytes()
    with file.path.open("wb", buffering=0) as out:
        _write_whole(out.fileno(), memoryview(_header(file.tensors, shape)))
        for _, size in file.tensors:
            if len(size) == 1:
                _write_whole(out.fileno(), memoryview(ones))
                continue
            left = math.prod(size) * itemsize
            while left:
                part = numbers[place : place + min(left, _WRITE_BYTES)]
                _write_whole(out.fileno(), part)
                left, place = left - len(part), (place + len(part)) % len(numbers)
        os.fsync(out.fileno())


def _write_whole(file: int, data: memoryview) -> None:
    while data:
        data = data[os.write(file, data) :]


def _header(tensors: list[tuple[str, tuple[int, ...]]], shape: LlamaShape) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, size in tensors:
        begin, end = end, end + math.prod(size) * shape.itemsize
        entries[name] = {"dtype": _DTYPES[shape.dtype][1], "shape": list(size), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    length = -(-(len(text) + 8) // _HEADER_ALIGNMENT) * _HEADER_ALIGNMENT - 8
    return struct.pack("<Q", length) + text.ljust(length)


def _write_side_files(shape: LlamaShape, files: list[_ModuleFile], directory: Path) -> None:
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    weight_map = {name: file.path.name for file in files for name, _ in file.tensors}
    index = {"metadata": {"total_size": shape.nbytes}, "weight_map": weight_map}
    (directory / INDEX).write_text(json.dumps(index, indent=1))
    transformers.LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=CONTEXT_TOKENS,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        architectures=["LlamaForCausalLM"],
        dtype=shape.dtype,
    ).save_pretrained(directory)
    transformers.GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0).save_pretrained(directory)
    specials = ["<pad>", "<s>", "</s>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: number for number, piece in enumerate(specials + alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(directory)


def add_shape_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that describe a `LlamaShape`; the defaults are a 7.5 GB model."""
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--ffn", type=int, default=14336)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--dtype", default="bfloat16", choices=sorted(_DTYPES))


def shape_from(arguments: argparse.Namespace) -> LlamaShape:
    """The shape the options of `add_shape_arguments` ask for.

    Raises:
        ValueError: such a model cannot be.
    """
    return LlamaShape(
        layers=arguments.layers,
        hidden=arguments.hidden,
        ffn=arguments.ffn,
        vocab=arguments.vocab,
        heads=arguments.heads,
        kv_heads=arguments.kv_heads,
        dtype=arguments.dtype,
    )


def main() -> int:
    """Write one checkpoint and print its directory; 2 on options that cannot work."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("--gguf", type=Path, help="export this file instead of writing random weights")
    add_shape_arguments(parser)
    arguments = parser.parse_args()
    try:
        if arguments.gguf:
            print(export_gguf(arguments.gguf, arguments.directory))
        else:
            print(build_checkpoint(shape_from(arguments), arguments.directory))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
