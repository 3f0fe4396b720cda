"""The text that ships, and windows over a text: every token once, with half a window before it."""

from __future__ import annotations

import hashlib
from itertools import pairwise
from pathlib import Path

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from lamella_engine.errors import CheckpointError, OptionError
from lamella_engine.quality_text import QualityText, Window, read_text, windows_of
from lamella_engine.texts import DEFAULT_DIGEST, DEFAULT_TEXT
from tests import tiny_models

ENOUGH = 10**6


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    return tiny_models.save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def beginning(tiny_llama_dir: Path) -> PreTrainedTokenizerFast:
    """A tokenizer that puts a token before every text and one behind it."""
    made = PreTrainedTokenizerFast.from_pretrained(tiny_llama_dir)
    begin, end = tiny_models.BEGIN, tiny_models.END
    made._tokenizer.post_processor = TemplateProcessing(
        single=f"{begin} $A {end}",
        special_tokens=[(token, made.convert_tokens_to_ids(token)) for token in (begin, end)],
    )
    return made


def scored(windows: list[Window]) -> list[int]:
    return [token for window in windows for token in window.targets]


def test_the_text_that_ships_is_the_one_that_was_measured() -> None:
    data = DEFAULT_TEXT.read_bytes()

    assert hashlib.sha256(data).hexdigest() == DEFAULT_DIGEST == read_text(None).digest
    assert len(data) <= 250_000
    assert data.isascii()
    assert b"gutenberg" not in data.lower()
    readme = (DEFAULT_TEXT.parent / "README.md").read_text()
    assert f"{len(data):,} bytes" in readme
    assert "public domain" in readme


@pytest.mark.parametrize("length", [200, 201, 217, 230, 231, 232])
@pytest.mark.parametrize("window", [16, 17, 64])
def test_every_token_behind_the_first_half_window_is_scored_once(
    length: int, window: int, tokenizer: PreTrainedTokenizerFast
) -> None:
    content = tokenizer.decode(tokenizer(read_text(None).content[:4000])["input_ids"][:length])
    ids = tokenizer(content)["input_ids"]

    windows = windows_of(QualityText("part", content), tokenizer, 448, window, ENOUGH)

    context = window - window // 2
    assert scored(windows) == ids[context:]
    for each in windows:
        assert len(each.token_ids) <= window - 1
        assert len(each.token_ids) - len(each.targets) + 1 == context
        assert each.token_ids[context:] == each.targets[:-1]
    assert all(len(first.token_ids) == window - 1 for first, _ in pairwise(windows))


def test_no_more_tokens_are_scored_than_asked_for(tokenizer: PreTrainedTokenizerFast) -> None:
    text = read_text(None)

    windows = windows_of(text, tokenizer, 448, 64, 333)

    assert scored(windows) == tokenizer(text.content[:6000])["input_ids"][32 : 32 + 333]


def test_windows_begin_with_what_every_text_begins_with(beginning: PreTrainedTokenizerFast) -> None:
    text = read_text(None)
    plain = beginning(text.content[:4000], add_special_tokens=False)["input_ids"]

    windows = windows_of(text, beginning, 448, 33, 320)

    begin = beginning.convert_tokens_to_ids(tiny_models.BEGIN)
    assert {window.token_ids[0] for window in windows} == {begin}
    assert windows[0].token_ids[1:] == tuple(plain[:31])
    assert scored(windows) == plain[16 : 16 + 320]


def test_a_text_of_long_tokens_is_looked_at_until_there_are_enough(tokenizer: PreTrainedTokenizerFast) -> None:
    content = f"{tiny_models.END}" * 50 + "<|assistant|>" * 400  # thirteen characters a token

    windows = windows_of(QualityText("long", content), tokenizer, 448, 32, 400)

    assert len(scored(windows)) == 400


def test_a_text_for_fewer_than_two_windows_says_what_would_do(tokenizer: PreTrainedTokenizerFast) -> None:
    text = QualityText("note.txt", "The river runs slowly past the mill.")

    with pytest.raises(
        OptionError, match=r"note\.txt has \d+ tokens, and two windows of 64 need 128.*--text.*--window"
    ):
        windows_of(text, tokenizer, 448, 64, ENOUGH)
    with pytest.raises(OptionError, match="has 0 tokens"):
        windows_of(QualityText("empty", ""), tokenizer, 448, 64, ENOUGH)


def test_tokens_that_the_model_does_not_know_are_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(CheckpointError, match=r"the model knows the tokens 0 to 99.*do not belong together"):
        windows_of(read_text(None), tokenizer, 100, 64, 400)


def test_a_file_is_read_as_text_and_nothing_else(tmp_path: Path) -> None:
    marked, binary = tmp_path / "marked.txt", tmp_path / "binary"
    marked.write_bytes("\ufeffnaïve".encode())
    binary.write_bytes(b"GGUF\xff\xfe\x00")

    assert read_text(marked).content == "naïve"
    with pytest.raises(OptionError, match=r"not text in UTF-8.*iconv"):
        read_text(binary)
