"""QWen v1 (QWen-1.8B, 7B, 14B, 72B and their chats) runs as Qwen2.

One projection makes queries, keys and values, with a bias; of the two halves of the feed-forward, ``w2`` is the gate.
Beyond ``seq_length`` the family rescales rotary frequencies and attention with the length of the whole text, which no
native class does: the context ends there. Neighbours: `imported`, `tensor_rules`, `tiktoken_file`.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from transformers import Qwen2Config

from lamella_engine.importers.imported import (
    MAX_LAYERS,
    ConvertedTokenizer,
    ImportedModel,
    common_values,
    head_width,
    refuse,
    require,
)
from lamella_engine.importers.tensor_rules import TensorRule, drop, rename, split_rows
from lamella_engine.importers.tiktoken_file import read_ranks, tiktoken_tokenizer
from lamella_engine.json_file import JsonFile

FAMILY = "QWen v1"
VOCABULARY_FILE = "qwen.tiktoken"
_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_END_OF_TEXT, _TURN_BEGINS, _TURN_ENDS = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
_SPECIAL = (_END_OF_TEXT, _TURN_BEGINS, _TURN_ENDS, *(f"<|extra_{index}|>" for index in range(205)))
CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def import_qwen(config: JsonFile) -> ImportedModel:
    """Map a QWen v1 config.

    Raises:
        CheckpointError: a value is missing or of the wrong kind.
        UnsupportedModel: a variant that Qwen2 does not compute.
    """
    for key in ("visual", "audio"):
        if config.has(key):
            raise refuse(
                config, FAMILY, f"it has a {key} part", "Use the text model, or a Qwen-VL that transformers knows."
            )
    for key, wanted in (("no_bias", True), ("scale_attn_weights", True), ("tie_word_embeddings", False)):
        require(config, FAMILY, key, config.flag(key, wanted), wanted)
    require(config, FAMILY, "rotary_pct", config.number("rotary_pct", 1.0), 1.0)
    heads, hidden = config.whole("num_attention_heads"), config.whole("hidden_size")
    width = head_width(config, "hidden_size", heads)
    require(config, FAMILY, "kv_channels", config.whole("kv_channels", width), width)
    native = Qwen2Config(
        **common_values(config, FAMILY),
        vocab_size=config.whole("vocab_size"),
        hidden_size=hidden,
        intermediate_size=config.whole("intermediate_size") // 2,
        num_hidden_layers=config.whole("num_hidden_layers", most=MAX_LAYERS),
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=_context(config),
        rms_norm_eps=config.number("layer_norm_epsilon", 1e-6),
        rope_parameters={"rope_type": "default", "rope_theta": config.number("rotary_emb_base", 10000.0)},
        tie_word_embeddings=False,
    )
    return ImportedModel(FAMILY, native, _rules(hidden), partial(_tokenizer, is_chat=_is_chat(config)))


def _context(config: JsonFile) -> int:
    trained = config.whole("seq_length", config.whole("max_position_embeddings", 8192))
    if config.flag("use_dynamic_ntk", True) or config.flag("use_logn_attn", True):
        return trained
    return config.whole("max_position_embeddings", trained)


def _rules(hidden: int) -> tuple[TensorRule, ...]:
    layer, native = r"transformer\.h\.(\d+)\.", r"model.layers.\1."
    attention = tuple(rf"{native}self_attn.{part}_proj.\2" for part in "qkv")
    return (
        rename(r"transformer\.wte\.weight", "model.embed_tokens.weight"),
        rename(layer + r"ln_1\.weight", native + "input_layernorm.weight"),
        split_rows(layer + r"attn\.c_attn\.(weight|bias)", attention, (hidden, hidden, hidden)),
        rename(layer + r"attn\.c_proj\.weight", native + "self_attn.o_proj.weight"),
        rename(layer + r"ln_2\.weight", native + "post_attention_layernorm.weight"),
        rename(layer + r"mlp\.w2\.weight", native + "mlp.gate_proj.weight"),
        rename(layer + r"mlp\.w1\.weight", native + "mlp.up_proj.weight"),
        rename(layer + r"mlp\.c_proj\.weight", native + "mlp.down_proj.weight"),
        rename(r"transformer\.ln_f\.weight", "model.norm.weight"),
        drop(r".*\.(inv_freq|masked_bias|logn_tensor)|transformer\.h\.\d+\.attn\.bias"),
    )


def _is_chat(config: JsonFile) -> bool:
    generation = JsonFile(config.path.parent / "generation_config.json")
    return generation.text("chat_format", "raw") == "chatml"


def _tokenizer(directory: Path, is_chat: bool) -> ConvertedTokenizer | None:
    path = directory / VOCABULARY_FILE
    if not path.is_file():
        return None
    ranks = read_ranks(path)
    special = {name: len(ranks) + index for index, name in enumerate(_SPECIAL)}
    return ConvertedTokenizer(
        tiktoken_tokenizer(ranks, special, _PIECES, is_nfc=True),
        {"eos_token": _END_OF_TEXT, "pad_token": _END_OF_TEXT},
        CHAT_TEMPLATE,
        (_END_OF_TEXT, _TURN_ENDS, _TURN_BEGINS) if is_chat else (_END_OF_TEXT,),
    )
