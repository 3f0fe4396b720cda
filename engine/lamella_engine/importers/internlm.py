"""InternLM v1 (7B and 20B) runs as Llama with biases on its attention; names and rows are Llama's already.

Past ``max_position_embeddings`` its "dynamic" rotary rescales with the length of the text: the context ends there.
Neighbours: `imported`, `sentencepiece_tokenizer`.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from transformers import LlamaConfig

from lamella_engine.importers.imported import ConvertedTokenizer, ImportedModel, llama_values, refuse
from lamella_engine.importers.sentencepiece_tokenizer import PieceTokenizer
from lamella_engine.importers.tensor_rules import drop
from lamella_engine.importers.tokenizer_hints import TokenizerHints
from lamella_engine.json_file import JsonFile

FAMILY = "InternLM v1"
_QUESTION_ENDS, _ANSWER_ENDS = "<eoh>", "<eoa>"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}<|User|>:{{ message['content'] }}<eoh>\n"
    "{% elif message['role'] == 'assistant' %}<|Bot|>:{{ message['content'] }}<eoa>\n"
    "{% else %}{{ raise_exception('InternLM v1 knows the roles user and assistant') }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|Bot|>:{% endif %}"
)


def import_internlm(config: JsonFile) -> ImportedModel:
    """Map an InternLM v1 config.

    Raises:
        CheckpointError: a value is missing or of the wrong kind.
        UnsupportedModel: a variant that Llama does not compute.
    """
    rotary = config.section("rotary")
    kind, base = rotary.get("type", "origin"), rotary.get("base", 10000)
    if kind not in ("origin", "dynamic") or isinstance(base, bool) or not isinstance(base, int | float) or base <= 0:
        raise refuse(
            config,
            FAMILY,
            f"its rotary positions are {dict(rotary)!r}, and only the types 'origin' and 'dynamic' are known",
            "Use the family's published checkpoint.",
        )
    native = LlamaConfig(
        **llama_values(config, FAMILY),
        attention_bias=config.flag("bias", True),
        mlp_bias=False,
        max_position_embeddings=config.whole("max_position_embeddings", 2048),
        rope_parameters={"rope_type": "default", "rope_theta": float(base)},
    )
    return ImportedModel(FAMILY, native, (drop(r".*\.inv_freq"),), partial(_tokenizer, config))


def _tokenizer(config: JsonFile, directory: Path) -> ConvertedTokenizer | None:
    hints = TokenizerHints(directory, config)
    made = PieceTokenizer.read(directory / "tokenizer.model", hints)
    if made is None:
        return None
    is_chat = made.has(_QUESTION_ENDS) and made.has(_ANSWER_ENDS)
    return made.finish(
        begins_with_bos=hints.flag("add_bos_token", True),
        chat_template=hints.chat_template or (CHAT_TEMPLATE if is_chat else None),
        end_tokens=(_ANSWER_ENDS,) if is_chat else (),
    )
