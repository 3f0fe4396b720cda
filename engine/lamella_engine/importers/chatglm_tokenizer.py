"""The tokenizers of ChatGLM2, ChatGLM3 (sentencepiece) and glm-4-9b (tiktoken), with the tokens every text begins with.

Owns the special tokens and chats of these families. The mark ``sop`` of ChatGLM2 and 3 is a token but no text; it is
written ``<sop>`` here, so that the letters in other words are not taken for it. Neighbours: `chatglm` (the model),
`sentencepiece_tokenizer`, `tiktoken_file`.
"""

from __future__ import annotations

from pathlib import Path

from tokenizers import processors

from lamella_engine.errors import CheckpointError
from lamella_engine.importers.imported import ConvertedTokenizer
from lamella_engine.importers.sentencepiece_tokenizer import PieceTokenizer
from lamella_engine.importers.tiktoken_file import looks_like_ranks, read_ranks, tiktoken_tokenizer
from lamella_engine.importers.tokenizer_hints import TokenizerHints
from lamella_engine.json_file import JsonFile

_MARKS = ("[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>")
_ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
_BEGIN = ("[gMASK]", "<sop>")
_PIECES_OF_FOURTH = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
_SPECIAL_OF_FOURTH = (
    "<|endoftext|>", *_MARKS, *_ROLES,
    "<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>",
)  # fmt: skip
_ONLY_ROUNDS = "{{ raise_exception('ChatGLM2 knows the roles user and assistant, in turn') }}"
CHAT_TEMPLATE_OF_SECOND = (
    "[gMASK]<sop>{% for message in messages %}"
    "{% if message['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') %}" + _ONLY_ROUNDS + "{% endif %}"
    "{% if message['role'] == 'user' %}[Round {{ loop.index0 // 2 + 1 }}]\n\n问：{{ message['content'] }}\n\n答："
    "{% else %}{{ message['content'] }}\n\n{% endif %}{% endfor %}"
)


def _template_by_roles(line_break: str) -> str:
    return (
        "[gMASK]<sop>{% for message in messages %}"
        "<|{{ 'observation' if message['role'] == 'tool' else message['role'] }}|>"
        + line_break
        + "{{ message['content'] }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )


CHAT_TEMPLATE_OF_THIRD = _template_by_roles("\n ")
CHAT_TEMPLATE_OF_FOURTH = _template_by_roles("\n")


def chatglm_tokenizer(config: JsonFile, directory: Path) -> ConvertedTokenizer | None:
    """Convert ``tokenizer.model`` of `directory`, whatever its format; None if there is none.

    Raises:
        CheckpointError: a file is damaged.
    """
    path = directory / "tokenizer.model"
    if not path.is_file():
        return None
    hints = TokenizerHints(directory, config)
    return _fourth(path, hints) if looks_like_ranks(path) else _second_or_third(path, hints, config)


def _fourth(path: Path, hints: TokenizerHints) -> ConvertedTokenizer:
    ranks = read_ranks(path)
    special = {text: token_id for token_id, (text, _) in hints.added_tokens.items()}
    special = special or {text: len(ranks) + index for index, text in enumerate(_SPECIAL_OF_FOURTH)}
    if missing := {"<|endoftext|>", *_BEGIN, *_ROLES} - special.keys():
        raise CheckpointError(f"the tokenizer files beside {path} lack the tokens {', '.join(sorted(missing))}")
    tokenizer = tiktoken_tokenizer(ranks, special, _PIECES_OF_FOURTH, is_nfc=False)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*_BEGIN, "$A"],
        pair=[*_BEGIN, "$A", "$B"],
        special_tokens=[(text, special[text]) for text in _BEGIN],
    )
    return ConvertedTokenizer(
        tokenizer,
        {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
        hints.chat_template or CHAT_TEMPLATE_OF_FOURTH,
        ("<|endoftext|>", "<|user|>", "<|observation|>"),
    )


def _second_or_third(path: Path, hints: TokenizerHints, config: JsonFile) -> ConvertedTokenizer | None:
    made = PieceTokenizer.read(path, hints, uses_added_tokens=False)
    assert made is not None, "the file is there"
    first = made.size
    name = config.text("_name_or_path", "").lower()
    named = {text for text, _ in hints.added_tokens.values()} | set(hints.additional_special_tokens)
    is_third = "chatglm3" in name or "<|user|>" in named
    for index, text in enumerate((*_MARKS, *(_ROLES if is_third else ()))):
        made.put(first + index, text, is_special=True)
    template = CHAT_TEMPLATE_OF_THIRD if is_third else CHAT_TEMPLATE_OF_SECOND if "chatglm2" in name else None
    own = hints.chat_template
    return made.finish(
        begins_with_bos=False,
        prefix=_BEGIN,
        chat_template=own.replace("[gMASK]sop", "[gMASK]<sop>") if own else template,
        end_tokens=("<|user|>", "<|observation|>") if is_third else (),
    )
