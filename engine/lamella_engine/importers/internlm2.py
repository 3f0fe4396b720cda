"""InternLM2 and 2.5 run as Llama; one projection holds, for each key-value head, its queries, its key and its value.

"Dynamic" rotary scaling sets in past ``max_position_embeddings`` and depends on the whole text: the context ends
there. "Linear" scaling is native. Neighbours: `imported`, `tensor_rules`, `sentencepiece_tokenizer`.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from transformers import LlamaConfig

from lamella_engine.errors import CheckpointError
from lamella_engine.importers.imported import ConvertedTokenizer, ImportedModel, llama_values, refuse
from lamella_engine.importers.sentencepiece_tokenizer import PieceTokenizer
from lamella_engine.importers.tensor_rules import TensorRule, drop, rename, split_grouped_rows
from lamella_engine.importers.tokenizer_hints import TokenizerHints
from lamella_engine.json_file import JsonFile

FAMILY = "InternLM2"
_TURN_BEGINS, _TURN_ENDS = "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def import_internlm2(config: JsonFile) -> ImportedModel:
    """Map an InternLM2 config.

    Raises:
        CheckpointError: a value is missing or of the wrong kind.
        UnsupportedModel: a variant that Llama does not compute.
    """
    heads = config.whole("num_attention_heads")
    kv_heads = config.whole("num_key_value_heads", heads)
    if heads % kv_heads:
        raise CheckpointError(f"{config.path} has {heads} heads for {kv_heads} key-value heads; fetch the file again")
    values = llama_values(config, FAMILY, kv_heads)
    has_bias = config.flag("bias", True)
    native = LlamaConfig(
        **values,
        attention_bias=has_bias,
        mlp_bias=False,
        max_position_embeddings=config.whole("max_position_embeddings", 2048),
        rope_parameters=_rotary(config),
    )
    return ImportedModel(FAMILY, native, _rules(heads // kv_heads, native.head_dim), partial(_tokenizer, config))


def _rotary(config: JsonFile) -> dict[str, object]:
    theta = config.number("rope_theta", 10000.0)
    scaling = config.section("rope_scaling")
    kind, factor = scaling.get("type", scaling.get("rope_type", "dynamic")), scaling.get("factor", 1.0)
    is_factor = isinstance(factor, int | float) and not isinstance(factor, bool) and factor >= 1
    if kind == "dynamic":
        return {"rope_type": "default", "rope_theta": theta}
    if kind == "linear" and is_factor:
        return {"rope_type": "linear", "factor": float(str(factor)), "rope_theta": theta}
    raise refuse(
        config,
        FAMILY,
        f"its rope_scaling is {dict(scaling)!r}, and only the types 'dynamic' and 'linear' are known",
        "Use the family's published checkpoint.",
    )


def _rules(queries: int, width: int) -> tuple[TensorRule, ...]:
    layer, native = r"model\.layers\.(\d+)\.", r"model.layers.\1."
    attention = tuple(rf"{native}self_attn.{part}_proj.\2" for part in "qkv")
    return (
        rename(r"model\.tok_embeddings\.weight", "model.embed_tokens.weight"),
        rename(layer + r"attention_norm\.weight", native + "input_layernorm.weight"),
        split_grouped_rows(layer + r"attention\.wqkv\.(weight|bias)", attention, (queries, 1, 1), width),
        rename(layer + r"attention\.wo\.(weight|bias)", native + r"self_attn.o_proj.\2"),
        rename(layer + r"ffn_norm\.weight", native + "post_attention_layernorm.weight"),
        rename(layer + r"feed_forward\.w1\.weight", native + "mlp.gate_proj.weight"),
        rename(layer + r"feed_forward\.w3\.weight", native + "mlp.up_proj.weight"),
        rename(layer + r"feed_forward\.w2\.weight", native + "mlp.down_proj.weight"),
        rename(r"output\.weight", "lm_head.weight"),
        drop(r".*\.inv_freq"),
    )


def _tokenizer(config: JsonFile, directory: Path) -> ConvertedTokenizer | None:
    hints = TokenizerHints(directory, config)
    made = PieceTokenizer.read(directory / "tokenizer.model", hints)
    if made is None:
        return None
    is_chat = made.has(_TURN_BEGINS) and made.has(_TURN_ENDS)
    return made.finish(
        begins_with_bos=hints.flag("add_bos_token", True),
        chat_template=hints.chat_template or (CHAT_TEMPLATE if is_chat else None),
        end_tokens=(_TURN_ENDS,) if is_chat else (),
    )
