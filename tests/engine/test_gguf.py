"""GGUF files: weights as transformers expands them, all the store needs from one file, and no damaged one used."""

from __future__ import annotations

import random
import re
import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

from lamella_engine import ShardStore, architecture
from lamella_engine.errors import CheckpointError, ModelError, UnsupportedModel
from lamella_engine.gguf_checkpoint import GgufCheckpoint
from lamella_engine.gguf_header import read_gguf_header
from tests import tiny_gguf
from tests.engine.shards import stored_weights

COUNTS_AT = 8  # tensor count, then metadata count, 8 bytes each


@pytest.fixture(scope="module")
def tiny_gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gguf.save_llama_gguf(tmp_path_factory.mktemp("gguf") / "tiny.Q8_0.gguf")


@pytest.fixture(scope="module")
def header_bytes(tiny_gguf_file: Path) -> int:
    return read_gguf_header(tiny_gguf_file).header_bytes


def _full_load(path: Path) -> torch.nn.Module:
    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    return model


def _assert_equals_full_load(path: Path, store: Path) -> None:
    model = ShardStore(store).ensure("tiny", source=path)

    stored, full = stored_weights(model), _full_load(path)
    tied = full.all_tied_weights_keys
    expected = {name: value for name, value in full.state_dict().items() if name not in tied}
    assert stored.keys() == expected.keys()
    assert [name for name, value in expected.items() if not torch.equal(stored[name], value)] == []


def test_weights_equal_a_full_load(tiny_gguf_file: Path, tmp_path: Path) -> None:
    _assert_equals_full_load(tiny_gguf_file, tmp_path)


def test_a_lossless_file_gives_back_the_checkpoint(tmp_path: Path) -> None:
    path = tiny_gguf.save_llama_gguf(tmp_path / "tiny.gguf", quantisation=gguf.GGMLQuantizationType.F32)
    store = ShardStore(tmp_path / "store")

    from_gguf = stored_weights(store.ensure("gguf", source=path))

    original = stored_weights(store.ensure("original", source=tmp_path / "llama-source"))
    assert [name for name, value in original.items() if not torch.equal(from_gguf[name], value)] == []


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0"])
def test_every_block_type_expands_like_a_full_load(kind: str, tmp_path: Path) -> None:
    path = tiny_gguf.save_llama_gguf(tmp_path / "tiny.gguf", quantisation=gguf.GGMLQuantizationType[kind])

    _assert_equals_full_load(path, tmp_path / "store")


def test_stacked_experts_equal_a_full_load(tmp_path: Path) -> None:
    _assert_equals_full_load(tiny_gguf.save_moe_gguf(tmp_path / "moe.gguf"), tmp_path / "store")


def test_config_is_that_of_transformers(tiny_gguf_file: Path) -> None:
    config = GgufCheckpoint.open(tiny_gguf_file).load_config().to_dict()

    expected = AutoConfig.from_pretrained(tiny_gguf_file.parent, gguf_file=tiny_gguf_file.name).to_dict()
    assert [name for name in expected.keys() | config.keys() if config.get(name) != expected.get(name)] in (
        ["dtype", "_name_or_path"],
        ["_name_or_path", "dtype"],
    )


def test_the_store_alone_has_config_tokenizer_and_end_tokens(tiny_gguf_file: Path, tmp_path: Path) -> None:
    model = ShardStore(tmp_path).ensure("tiny", source=tiny_gguf_file)

    tokenizer = AutoTokenizer.from_pretrained(model.directory, local_files_only=True)
    expected = AutoTokenizer.from_pretrained(tiny_gguf_file.parent / "llama-source")
    text = "The river runs, naïve façade 🍎 — 89.\n"
    assert tokenizer(text, add_special_tokens=False).input_ids == expected(text, add_special_tokens=False).input_ids
    chat = [{"role": "user", "content": text}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == expected.apply_chat_template(chat, tokenize=False)
    assert GenerationConfig.from_pretrained(model.directory, local_files_only=True).eos_token_id == 2
    assert architecture.load_config(model.directory).num_hidden_layers == 4


def test_weights_are_stored_in_the_dtype_asked_for(tiny_gguf_file: Path, tmp_path: Path) -> None:
    model = ShardStore(tmp_path).ensure("tiny", source=tiny_gguf_file, dtype="bfloat16")

    full = _full_load(tiny_gguf_file).state_dict()
    stored = stored_weights(model)
    assert model.dtype == "bfloat16"
    assert all(torch.equal(value, full[name].bfloat16()) for name, value in stored.items())


def test_a_gguf_path_is_a_model_and_a_changed_file_is_another(tmp_path: Path) -> None:
    path = tiny_gguf.save_llama_gguf(tmp_path / "tiny.gguf")
    store = ShardStore(tmp_path / "store")
    first = store.ensure(path)
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)

    second = store.ensure(path)

    assert re.fullmatch(r"tiny-[0-9a-f]{8}", first.name)
    assert first.name == second.name
    assert first.directory != second.directory


def _refused(path: Path, store: Path, reason: str) -> None:
    with pytest.raises((CheckpointError, UnsupportedModel), match=reason) as caught:
        ShardStore(store).ensure("tiny", source=path)
    assert str(path) in str(caught.value)
    assert not list(store.rglob("*.safetensors"))
    assert not (store / "tiny").exists()


def _patched(source: Path, target: Path, *patches: tuple[int, bytes]) -> Path:
    raw = bytearray(source.read_bytes())
    for offset, data in patches:
        raw[offset : offset + len(data)] = data
    target.write_bytes(raw)
    return target


@pytest.mark.parametrize(
    ("offset", "data", "reason"),
    [
        (0, b"GGML", "does not begin with 'GGUF'"),
        (0, b"PK\3\4", "does not begin with 'GGUF'"),
        (4, struct.pack("<I", 1), "of version 1"),
        (4, struct.pack("<I", 77), "of version 77"),
        (4, struct.pack(">I", 3), "big-endian"),
        (COUNTS_AT, struct.pack("<Q", 0), "holds no tensor"),
        (COUNTS_AT, struct.pack("<Q", 2**63), "claims 9223372036854775808 tensors"),
        (COUNTS_AT, struct.pack("<Q", 10**7), "claims 10000000 tensors"),
        (COUNTS_AT + 8, struct.pack("<Q", 2**64 - 1), "metadata entries"),
        (COUNTS_AT + 8, struct.pack("<Q", 10**6), "metadata entries"),
        (COUNTS_AT + 16, struct.pack("<Q", 2**63), "runs past the end"),
    ],
)
def test_a_wrong_start_is_refused_with_the_reason(
    offset: int, data: bytes, reason: str, tiny_gguf_file: Path, tmp_path: Path
) -> None:
    path = _patched(tiny_gguf_file, tmp_path / "bad.gguf", (offset, data))

    _refused(path, tmp_path / "store", reason)


def _tensor_info_at(path: Path, name: str) -> int:
    """Where the dimensions of the tensor `name` begin in the file."""
    encoded = name.encode()
    return path.read_bytes().index(struct.pack("<Q", len(encoded)) + encoded) + 8 + len(encoded)


@pytest.mark.parametrize(
    ("delta", "data", "reason"),
    [
        (0, struct.pack("<I", 9), "claims 9 dimensions"),
        (0, struct.pack("<I", 2**31), "dimensions"),
        (4, struct.pack("<Q", 0), "has shape"),
        (4, struct.pack("<Q", 63), "has shape"),
        (4, struct.pack("<Q", 2**40), "it was cut|not its place"),
        (20, struct.pack("<I", 250), "unknown type 250"),
        (24, struct.pack("<Q", 2**40), "it was cut|not its place"),
        (24, struct.pack("<Q", 0), "not its place"),
        (24, struct.pack("<Q", 7), "not its place"),
    ],
)
def test_a_tensor_out_of_place_is_refused(
    delta: int, data: bytes, reason: str, tiny_gguf_file: Path, tmp_path: Path
) -> None:
    at = _tensor_info_at(tiny_gguf_file, "blk.1.ffn_up.weight")
    path = _patched(tiny_gguf_file, tmp_path / "bad.gguf", (at + delta, data))

    _refused(path, tmp_path / "store", reason)


@pytest.mark.parametrize("kind", [gguf.GGMLQuantizationType.I32, gguf.GGMLQuantizationType.I16])
def test_blocks_that_cannot_be_expanded_are_refused(
    kind: gguf.GGMLQuantizationType, tiny_gguf_file: Path, tmp_path: Path
) -> None:
    at = _tensor_info_at(tiny_gguf_file, "output_norm.weight")
    path = _patched(tiny_gguf_file, tmp_path / "bad.gguf", (at + 12, struct.pack("<I", kind)))

    _refused(path, tmp_path / "store", kind.name)


def test_every_truncation_of_the_header_is_refused(tiny_gguf_file: Path, header_bytes: int, tmp_path: Path) -> None:
    whole = tiny_gguf_file.read_bytes()
    path = tmp_path / "cut.gguf"

    for length in [*range(0, 200), *range(200, header_bytes, 97), header_bytes, len(whole) - 64]:
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="not a whole GGUF file"):
            read_gguf_header(path)


def test_random_damage_to_the_header_never_raises_anything_else(
    tiny_gguf_file: Path, header_bytes: int, tmp_path: Path
) -> None:
    whole = tiny_gguf_file.read_bytes()
    path = tmp_path / "bad.gguf"
    draw = random.Random(0)

    for _ in range(300):
        places = [draw.randrange(header_bytes) for _ in range(draw.randint(1, 3))]
        path.write_bytes(whole)
        _patched(path, path, *((place, bytes([draw.randrange(256)])) for place in places))
        try:
            header = read_gguf_header(path)
        except CheckpointError:
            continue
        assert all(tensor.start + tensor.nbytes <= len(whole) for tensor in header.tensors.values())


def test_damage_that_the_header_check_cannot_see_is_an_error_of_the_model_or_harmless(
    tiny_gguf_file: Path, header_bytes: int, tmp_path: Path
) -> None:
    whole = tiny_gguf_file.read_bytes()
    draw = random.Random(1)
    store = ShardStore(tmp_path / "store")

    for attempt in range(12):
        path = tmp_path / f"bad{attempt}.gguf"
        place = draw.randrange(24, min(header_bytes, 900))
        _patched(tiny_gguf_file, path, (place, bytes([whole[place] ^ (1 << draw.randrange(8))])))
        try:
            store.ensure(f"m{attempt}", source=path)
        except ModelError:
            assert not (store.root / f"m{attempt}").exists()


def test_a_part_of_a_split_model_says_to_join_the_parts(tmp_path: Path) -> None:
    path = tmp_path / "tiny-00001-of-00002.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint16("split.count", 2)
    writer.add_tensor("token_embd.weight", torch.zeros(4, 64).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    _refused(path, tmp_path / "store", "one of 2 parts.*llama-gguf-split --merge")


def _written(path: Path, architecture_name: str, fill: Callable[[gguf.GGUFWriter], None]) -> Path:
    writer = gguf.GGUFWriter(path, architecture_name)
    fill(writer)
    writer.add_tensor("token_embd.weight", torch.zeros(4, 64).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_an_unknown_architecture_is_refused_as_unsupported(tmp_path: Path) -> None:
    path = _written(tmp_path / "odd.gguf", "no-such-architecture", lambda writer: writer.add_block_count(1))

    with pytest.raises(UnsupportedModel, match="no-such-architecture"):
        ShardStore(tmp_path / "store").ensure("odd", source=path)


@pytest.mark.parametrize("layers", [0, 2**31, 4_000_000_000])
def test_an_absurd_number_of_layers_is_refused_at_once(layers: int, tmp_path: Path) -> None:
    path = _written(tmp_path / "odd.gguf", "llama", lambda writer: writer.add_block_count(layers))

    _refused(path, tmp_path / "store", "claims|cannot be used")


def test_a_missing_tensor_is_named(tiny_gguf_file: Path, tmp_path: Path) -> None:
    renamed = (b"blk.1.ffn_up.weight", b"blk.1.ffn_xy.weight")
    at = tiny_gguf_file.read_bytes().index(renamed[0])
    path = _patched(tiny_gguf_file, tmp_path / "bad.gguf", (at, renamed[1]))

    with pytest.raises(CheckpointError, match=r"lacks 1 of .* model\.layers\.1\.mlp\.up_proj\.weight"):
        ShardStore(tmp_path / "store").ensure("tiny", source=path)

    assert not (tmp_path / "store" / "tiny").exists()
