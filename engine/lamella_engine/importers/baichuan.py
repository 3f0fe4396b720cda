"""Baichuan-7B and Baichuan2-7B run as Llama; Baichuan2's head rows are divided by their length, once, at import.

The 13B models have linear position biases instead of rotary positions, beside parts that no native class with such
biases has: they are refused. Neighbours: `imported`, `tensor_rules`, `sentencepiece_tokenizer`.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from transformers import LlamaConfig

from lamella_engine.importers.imported import ConvertedTokenizer, ImportedModel, llama_values, refuse, require
from lamella_engine.importers.sentencepiece_tokenizer import PieceTokenizer
from lamella_engine.importers.tensor_rules import TensorRule, drop, rename, split_rows, unit_rows
from lamella_engine.importers.tokenizer_hints import TokenizerHints
from lamella_engine.json_file import JsonFile

FIRST, SECOND = "Baichuan v1", "Baichuan2"
_CLASS_OF_FIRST = "BaiChuanForCausalLM"
_VOCABULARY_OF_FIRST, _VOCABULARY_OF_SECOND = 64000, 125696
_WIDTH_OF_13B = 5120


def import_baichuan(config: JsonFile) -> ImportedModel:
    """Map a Baichuan 7B config of either generation.

    Raises:
        CheckpointError: a value is missing or of the wrong kind.
        UnsupportedModel: a 13B model, or it cannot be told which generation it is.
    """
    if not config.has("max_position_embeddings") or config.whole("hidden_size") == _WIDTH_OF_13B:
        raise refuse(
            config,
            "Baichuan 13B",
            "its attention has linear position biases (ALiBi), and no class of transformers computes them beside "
            "Baichuan's other parts (a 13B model is known by its width, or by a config without "
            "max_position_embeddings)",
            "Use Baichuan2-7B.",
        )
    family = _generation(config)
    hidden = config.whole("hidden_size")
    if family == SECOND:
        require(config, family, "tie_word_embeddings", config.flag("tie_word_embeddings", False), False)
    native = LlamaConfig(
        **llama_values(config, family),
        attention_bias=False,
        mlp_bias=False,
        max_position_embeddings=config.whole("max_position_embeddings"),
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    return ImportedModel(family, native, _rules(hidden, family), partial(_tokenizer, config))


def _generation(config: JsonFile) -> str:
    """Whether the head is plain or of unit rows: by the class that the config names, and by the vocabulary."""
    architectures = config.values.get("architectures")
    named = architectures[0] if isinstance(architectures, list) and architectures else None
    vocabulary = config.whole("vocab_size")
    by_class = None if named is None else FIRST if named == _CLASS_OF_FIRST else SECOND
    by_vocabulary = {_VOCABULARY_OF_FIRST: FIRST, _VOCABULARY_OF_SECOND: SECOND}.get(vocabulary)
    found = by_class or by_vocabulary
    if found is None or (by_vocabulary or found) != found:
        raise refuse(
            config,
            "Baichuan",
            f"its class {named!r} and its vocabulary of {vocabulary} do not say whether it is Baichuan-7B or "
            "Baichuan2-7B, whose heads differ",
            f"Set 'architectures' in config.json to ['{_CLASS_OF_FIRST}'] for the first or ['BaichuanForCausalLM'] for "
            "the second, with its own vocab_size.",
        )
    return found


def _rules(hidden: int, family: str) -> tuple[TensorRule, ...]:
    attention = tuple(rf"\1{part}_proj.weight" for part in "qkv")
    head = unit_rows if family == SECOND else rename
    return (
        split_rows(r"(model\.layers\.\d+\.self_attn\.)W_pack\.weight", attention, (hidden, hidden, hidden)),
        head(r"lm_head\.weight", "lm_head.weight"),
        drop(r".*\.inv_freq"),
    )


def _tokenizer(config: JsonFile, directory: Path) -> ConvertedTokenizer | None:
    hints = TokenizerHints(directory, config)
    made = PieceTokenizer.read(directory / "tokenizer.model", hints)
    if made is None:
        return None
    generation = JsonFile(directory / "generation_config.json")
    user, assistant = (made.token(generation.token_id(f"{role}_token_id")) for role in ("user", "assistant"))
    template = None
    if user is not None and assistant is not None:
        made.mark_special(user, assistant)
        template = chat_template(user, assistant)
    return made.finish(begins_with_bos=hints.flag("add_bos_token", True), chat_template=hints.chat_template or template)


def chat_template(user: str, assistant: str) -> str:
    """The family's chat: a system text first, if any, then each turn behind its mark."""
    return (
        "{% for message in messages %}"
        f"{{% if message['role'] == 'user' %}}{user}"
        f"{{% elif message['role'] == 'assistant' %}}{assistant}"
        "{% elif message['role'] != 'system' or not loop.first %}"
        "{{ raise_exception('Baichuan knows the roles user and assistant, and system at the beginning') }}{% endif %}"
        "{{ message['content'] }}{% endfor %}"
        f"{{% if add_generation_prompt %}}{assistant}{{% endif %}}"
    )
