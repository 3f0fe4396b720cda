"""ChatGLM2, ChatGLM3 and glm-4-9b in their first layout run as Glm.

One projection holds queries, keys and values; half of each head is rotated, in pairs; the feed-forward's gate comes
first in ``dense_h_to_4h``, as in Glm. ChatGLM-6B (v1) sees its prompt in both directions: refused. Neighbours:
`imported`, `tensor_rules`, `chatglm_tokenizer`.
"""

from __future__ import annotations

from functools import partial

from transformers import GlmConfig

from lamella_engine.errors import CheckpointError
from lamella_engine.importers.chatglm_tokenizer import chatglm_tokenizer
from lamella_engine.importers.imported import MAX_LAYERS, ImportedModel, common_values, head_width, refuse, require
from lamella_engine.importers.tensor_rules import TensorRule, drop, rename, split_grouped_rows, split_rows
from lamella_engine.json_file import JsonFile

SECOND_OR_THIRD, FOURTH = "ChatGLM2/3", "GLM-4"
_VOCABULARY_OF_FOURTH = 151552
_SAME = {
    "rmsnorm": True,
    "post_layer_norm": True,
    "apply_residual_connection_post_layernorm": False,
    "fp32_residual_connection": False,
    "add_bias_linear": False,
    "original_rope": True,
}


def import_chatglm(config: JsonFile) -> ImportedModel:
    """Map a config of ChatGLM2, ChatGLM3 or glm-4-9b.

    Raises:
        CheckpointError: a value is missing or of the wrong kind.
        UnsupportedModel: ChatGLM-6B (v1), or a variant that Glm does not compute.
    """
    family = _check_variant(config)
    heads = config.whole("num_attention_heads")
    width = config.whole("kv_channels", head_width(config, "hidden_size", heads))
    require(config, family, "kv_channels * num_attention_heads", width * heads, config.whole("hidden_size"))
    if width % 4:
        raise CheckpointError(f"'kv_channels' of {config.path} is {width}; half a head must make pairs")
    is_grouped = config.flag("multi_query_attention", False)
    kv_heads = config.whole("multi_query_group_num", 1) if is_grouped else heads
    if heads % kv_heads:
        raise CheckpointError(f"{config.path} has {heads} heads for {kv_heads} key-value heads; fetch the file again")
    native = GlmConfig(
        **common_values(config, family),
        vocab_size=config.whole("padded_vocab_size"),
        hidden_size=config.whole("hidden_size"),
        intermediate_size=config.whole("ffn_hidden_size"),
        num_hidden_layers=config.whole("num_layers", most=MAX_LAYERS),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=width,
        max_position_embeddings=config.whole("seq_length"),
        rms_norm_eps=config.number("layernorm_epsilon", 1e-5),
        rope_parameters=_rotary(config, family),
        attention_bias=config.flag("add_qkv_bias", False),
        tie_word_embeddings=False,
    )
    rules = _rules((heads * width, kv_heads * width, kv_heads * width), width, is_grouped)
    return ImportedModel(family, native, rules, partial(chatglm_tokenizer, config))


def _check_variant(config: JsonFile) -> str:
    if not config.has("padded_vocab_size"):
        raise refuse(
            config,
            "ChatGLM-6B (v1)",
            "it sees its prompt in both directions and rotates by two positions, which no class of transformers does",
            "Use ChatGLM2-6B, ChatGLM3-6B or a later GLM instead.",
        )
    family = FOURTH if config.whole("padded_vocab_size") == _VOCABULARY_OF_FOURTH else SECOND_OR_THIRD
    if config.has("vision_config"):
        raise refuse(config, family, "it has a vision part", "Use the text model, such as glm-4-9b-chat.")
    if config.values.get("pre_seq_len"):
        raise refuse(config, family, "it has a trained prefix (pre_seq_len)", "Use the model without P-tuning.")
    if config.values.get("quantization_bit"):
        raise refuse(
            config, family, "its weights are quantised (quantization_bit)", "Use the checkpoint in 16-bit weights."
        )
    for key, wanted in _SAME.items():
        require(config, family, key, config.flag(key, wanted), wanted)
    return family


def _rotary(config: JsonFile, family: str) -> dict[str, object]:
    """Published models mean two things by rope_ratio: ChatGLM2 divides positions by it, later ones scale the base."""
    ratio = config.number("rope_ratio", 1.0)
    rotary: dict[str, object] = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    if ratio == 1:
        return rotary
    name = config.text("_name_or_path", "").lower()
    if family == FOURTH or "chatglm3" in name:
        return rotary | {"rope_theta": 10000.0 * ratio}
    if "chatglm2" in name:
        return rotary | {"rope_type": "linear", "factor": ratio}
    raise refuse(
        config,
        family,
        f"its rope_ratio of {ratio} divides positions in ChatGLM2 and scales frequencies in ChatGLM3, and the config "
        "does not say which it is",
        "Set '_name_or_path' in config.json to 'THUDM/chatglm2-6b-32k' or 'THUDM/chatglm3-6b-32k'.",
    )


def _rules(rows: tuple[int, int, int], width: int, is_grouped: bool) -> tuple[TensorRule, ...]:
    layer, native = r"transformer\.encoder\.layers\.(\d+)\.", r"model.layers.\1."
    attention = tuple(rf"{native}self_attn.{part}_proj.\2" for part in "qkv")
    fused = layer + r"self_attention\.query_key_value\.(weight|bias)"
    return (
        rename(r"transformer\.embedding\.word_embeddings\.weight", "model.embed_tokens.weight"),
        rename(layer + r"(input_layernorm|post_attention_layernorm)\.weight", native + r"\2.weight"),
        split_rows(fused, attention, rows) if is_grouped else split_grouped_rows(fused, attention, (1, 1, 1), width),
        rename(layer + r"self_attention\.dense\.weight", native + "self_attn.o_proj.weight"),
        rename(layer + r"mlp\.dense_h_to_4h\.weight", native + "mlp.gate_up_proj.weight"),
        rename(layer + r"mlp\.dense_4h_to_h\.weight", native + "mlp.down_proj.weight"),
        rename(r"transformer\.encoder\.final_layernorm\.weight", "model.norm.weight"),
        rename(r"transformer\.output_layer\.weight", "lm_head.weight"),
        drop(r".*\.inv_freq"),
    )
