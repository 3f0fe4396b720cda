"""Baichuan and Baichuan2: the 7B models run as Llama, the 13B models, whose positions are linear biases, as SmolLM3.

The 13B models have Llama's parts without rotary positions, which are SmolLM3's with every layer's rotation switched
off; a slope for each head then gives them their biases (`alibi`). Baichuan2's head rows are divided by their length,
once, at import. Neighbours: `imported`, `tensor_rules`, `sentencepiece_tokenizer`.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from transformers import LlamaConfig, PretrainedConfig, SmolLM3Config

from lamella_engine.alibi import SLOPES, published_slopes
from lamella_engine.importers.imported import ConvertedTokenizer, ImportedModel, llama_values, refuse, require
from lamella_engine.importers.sentencepiece_tokenizer import PieceTokenizer
from lamella_engine.importers.tensor_rules import TensorRule, drop, rename, split_rows, unit_rows
from lamella_engine.importers.tokenizer_hints import TokenizerHints
from lamella_engine.json_file import JsonFile

FIRST, SECOND = "Baichuan v1", "Baichuan2"
_CLASS_OF_FIRST_7B = "BaiChuanForCausalLM"
_VOCABULARIES = {64000: FIRST, 125696: SECOND}
_KEY_OF_SECOND = "z_loss_weight"
_MOST_HEADS = 4096  # the config keeps a list of this length; more is a damaged file
_WIDTH_OF_7B, _WIDTH_OF_13B = 4096, 5120


def import_baichuan(config: JsonFile) -> ImportedModel:
    """Map a Baichuan config of either generation and size.

    Raises:
        CheckpointError: a value is missing or of the wrong kind.
        UnsupportedModel: it cannot be told which of the four models it is.
    """
    hidden = config.whole("hidden_size")
    has_biases = _has_biases(config, hidden)
    generation = (_generation_of_13b if has_biases else _generation_of_7b)(config)
    family = f"{generation} 13B" if has_biases else generation
    if generation == SECOND:
        require(config, family, "tie_word_embeddings", config.flag("tie_word_embeddings", False), False)
    native = _biased(config, family) if has_biases else _rotary(config, family)
    return ImportedModel(family, native, _rules(hidden, generation), partial(_tokenizer, config))


def _has_biases(config: JsonFile, hidden: int) -> bool:
    """Whether it is a 13B model: by its width, else by what it names its context.

    Only the 7B models' class knows ``max_position_embeddings``, and always writes it.
    """
    is_rotary = config.has("max_position_embeddings")
    if hidden == _WIDTH_OF_7B and not is_rotary:
        raise refuse(
            config,
            "Baichuan",
            f"it is as wide as a 7B model ({hidden}), which have rotary positions, and has no max_position_embeddings, "
            "as 13B models, which have linear biases (ALiBi)",
            "If it is a 7B model, set 'max_position_embeddings' in config.json to its context.",
        )
    return hidden == _WIDTH_OF_13B or not is_rotary


def _rotary(config: JsonFile, family: str) -> PretrainedConfig:
    return LlamaConfig(
        **llama_values(config, family),
        attention_bias=False,
        mlp_bias=False,
        max_position_embeddings=config.whole("max_position_embeddings"),
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )


def _biased(config: JsonFile, family: str) -> PretrainedConfig:
    key = "max_position_embeddings" if config.has("max_position_embeddings") else "model_max_length"
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))  # SmolLM3's own are beyond the vocabulary
    values = special | llama_values(config, family)
    heads, layers = config.whole("num_attention_heads", most=_MOST_HEADS), config.whole("num_hidden_layers")
    return SmolLM3Config(
        **values,
        attention_bias=False,
        mlp_bias=False,
        max_position_embeddings=config.whole(key),
        no_rope_layers=[0] * layers,
        **{SLOPES: published_slopes(heads)},
    )


def _generation_of_7b(config: JsonFile) -> str:
    """Whether the head is plain or of unit rows: by the class that the config names, and by the vocabulary."""
    architectures = config.values.get("architectures")
    named = architectures[0] if isinstance(architectures, list) and architectures else None
    by_class = None if named is None else FIRST if named == _CLASS_OF_FIRST_7B else SECOND
    return _agreed(
        config,
        by_class,
        f"its class {named!r}",
        ("Baichuan-7B", "Baichuan2-7B"),
        f"Set 'architectures' in config.json to ['{_CLASS_OF_FIRST_7B}'] for the first or ['BaichuanForCausalLM'] for "
        "the second, with its own vocab_size.",
    )


def _generation_of_13b(config: JsonFile) -> str:
    """As for 7B, but both generations name their class alike; a value that only the second has tells, or the name."""
    name = config.text("_name_or_path", "")
    lower = name.lower()
    by_name = SECOND if "baichuan2-13b" in lower else FIRST if "baichuan-13b" in lower else None
    by_key = SECOND if config.has(_KEY_OF_SECOND) else None
    return _agreed(
        config,
        by_key or by_name,
        f"its name {name!r}",
        ("Baichuan-13B", "Baichuan2-13B"),
        "Set '_name_or_path' in config.json to 'baichuan-inc/Baichuan-13B-Base' or 'baichuan-inc/Baichuan2-13B-Base', "
        "with its own vocab_size.",
    )


def _agreed(config: JsonFile, told: str | None, teller: str, models: tuple[str, str], instead: str) -> str:
    """The generation that `told` and the vocabulary agree on.

    Raises:
        UnsupportedModel: they contradict each other, or neither says anything.
    """
    vocabulary = config.whole("vocab_size")
    by_vocabulary = _VOCABULARIES.get(vocabulary)
    found = told or by_vocabulary
    if found is None or (by_vocabulary or found) != found:
        raise refuse(
            config,
            "Baichuan",
            f"{teller} and its vocabulary of {vocabulary} do not say whether it is {' or '.join(models)}, whose heads "
            "differ",
            instead,
        )
    return found


def _rules(hidden: int, generation: str) -> tuple[TensorRule, ...]:
    attention = tuple(rf"\1{part}_proj.weight" for part in "qkv")
    head = unit_rows if generation == SECOND else rename
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
