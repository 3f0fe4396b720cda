"""What a family's adapter makes of one checkpoint: a native config, rules for its tensors, and its tokenizer.

Owns these types only; the families fill them in, `tensor_conversions` and `companions` use them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tokenizers import Tokenizer
from transformers import PretrainedConfig

from lamella_engine.errors import CheckpointError, UnsupportedModel
from lamella_engine.importers.tensor_rules import TensorRule
from lamella_engine.json_file import JsonFile

MAX_LAYERS = 4096  # configs keep a list of this length; more is a damaged file
IMPORTED_FROM = "imported_from"  # in the native config, and so in config.json of the shards


@dataclass(frozen=True)
class ConvertedTokenizer:
    """A tokenizer in the form of ``tokenizer.json``.

    Attributes:
        tokenizer: encodes and decodes as the family's own does.
        special: transformers' names (``bos_token``, ``eos_token``, ...) and the tokens they stand for.
        chat_template: the family's, or None where it is not known.
        end_tokens: tokens that end an answer, besides those that the checkpoint's files name.
    """

    tokenizer: Tokenizer
    special: dict[str, str] = field(default_factory=dict)
    chat_template: str | None = None
    end_tokens: tuple[str, ...] = ()

    @property
    def end_ids(self) -> set[int]:
        """Ids of `end_tokens` and of ``eos_token``."""
        names = [*self.end_tokens, *([self.special["eos_token"]] if "eos_token" in self.special else [])]
        found = (self.tokenizer.token_to_id(name) for name in names)
        return {token_id for token_id in found if token_id is not None}


@dataclass(frozen=True)
class ImportedModel:
    """A checkpoint of a foreign family, as it will run.

    Attributes:
        family: the family's name for people, such as ``QWen v1``.
        config: config of the native class.
        rules: what its tensors become.
        tokenizer: converts the tokenizer in a checkpoint directory; None where there is none.
    """

    family: str
    config: PretrainedConfig
    rules: tuple[TensorRule, ...]
    tokenizer: Callable[[Path], ConvertedTokenizer | None]


def common_values(config: JsonFile, family: str) -> dict[str, object]:
    """Values that every native config takes as they are: special tokens, dtype, quantisation, where it came from."""
    values: dict[str, object] = {IMPORTED_FROM: family}
    for key in ("bos_token_id", "eos_token_id", "pad_token_id", "quantization_config"):
        if config.has(key):
            values[key] = config.values[key]
    dtype = config.values.get("dtype") or config.values.get("torch_dtype")
    if isinstance(dtype, str) and dtype in ("float32", "float16", "bfloat16"):
        values["dtype"] = dtype
    return values


def refuse(config: JsonFile, family: str, why: str, instead: str) -> UnsupportedModel:
    """The error for a checkpoint of `family` that no native class computes exactly."""
    return UnsupportedModel(f"{family} of {config.path.parent} cannot be imported: {why}. {instead}")


def require(config: JsonFile, family: str, key: str, found: object, wanted: object) -> None:
    """Refuse a variant in which `key` is not what the native class computes.

    Raises:
        UnsupportedModel: it differs.
    """
    if found != wanted:
        raise refuse(
            config,
            family,
            f"its config has {key} = {found!r}, and only {wanted!r} has an exact counterpart here",
            "Use the family's published checkpoint.",
        )


def llama_values(config: JsonFile, family: str, num_kv_heads: int | None = None) -> dict[str, object]:
    """The sizes of a family that has Llama's keys for them, and `common_values`."""
    heads = config.whole("num_attention_heads")
    return common_values(config, family) | {
        "vocab_size": config.whole("vocab_size"),
        "hidden_size": config.whole("hidden_size"),
        "intermediate_size": config.whole("intermediate_size"),
        "num_hidden_layers": config.whole("num_hidden_layers", most=MAX_LAYERS),
        "num_attention_heads": heads,
        "num_key_value_heads": num_kv_heads or heads,
        "head_dim": head_width(config, "hidden_size", heads),
        "hidden_act": config.text("hidden_act", "silu"),
        "rms_norm_eps": config.number("rms_norm_eps", 1e-6),
        "tie_word_embeddings": config.flag("tie_word_embeddings", False),
    }


def head_width(config: JsonFile, key: str, heads: int) -> int:
    """Width of one head; `key` holds that of all together.

    Raises:
        CheckpointError: they do not divide into heads of an even width.
    """
    width, rest = divmod(config.whole(key), heads)
    if rest or width % 2:
        raise CheckpointError(
            f"{key!r} of {config.path} is {config.whole(key)}, which does not make {heads} heads of an even width; "
            "fetch the file again"
        )
    return width
