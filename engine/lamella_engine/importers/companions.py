"""The small files of an imported model's shard directory: native config, tokenizer, and what ends an answer.

Owns their form; the family's adapter made their contents. Neighbours: `checkpoint` calls it while shards are built,
`text` reads the result like that of any other model.
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer
from transformers import PretrainedConfig, PreTrainedTokenizerFast

from lamella_engine.errors import CheckpointError, ModelError
from lamella_engine.importers.imported import ConvertedTokenizer, ImportedModel
from lamella_engine.importers.tokenizer_hints import SPECIAL_NAMES, TokenizerHints
from lamella_engine.json_file import JsonFile

_GENERATION_FILE = "generation_config.json"
_SAMPLING = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty")
_GROWTH = 16  # a tokenizer.json is at most this much larger than the vocabulary that it was made from


def written_bytes(source_bytes: int) -> int:
    """Upper bound of what `write` makes of small files of `source_bytes`."""
    return _GROWTH * source_bytes + 65_536


def write(imported: ImportedModel, source: Path, directory: Path, config: PretrainedConfig) -> None:
    """Write config, tokenizer and generation config of the checkpoint `source` into `directory`.

    Raises:
        ModelError: the tokenizer's files are damaged, or of a kind that is not converted.
    """
    config.save_pretrained(directory)
    foreign = JsonFile(source / "config.json")
    tokenizer = _converted(imported, source, foreign)
    ends = {*JsonFile(source / _GENERATION_FILE).token_ids("eos_token_id"), *foreign.token_ids("eos_token_id")}
    if tokenizer is not None:
        ends |= tokenizer.end_ids
        _save_tokenizer(tokenizer, directory, config)
    _save_generation_config(source, directory, sorted(ends))


def _converted(imported: ImportedModel, source: Path, foreign: JsonFile) -> ConvertedTokenizer | None:
    try:
        if (source / "tokenizer.json").is_file():
            return _ready_made(source, TokenizerHints(source, foreign))
        return imported.tokenizer(source)
    except ModelError:
        raise
    except Exception as error:  # the tokenizers library raises this class itself
        raise CheckpointError(
            f"the tokenizer in {source} cannot be converted: {error}. Its files are damaged, or of another version of "
            f"{imported.family}; fetch them again."
        ) from error


def _ready_made(source: Path, hints: TokenizerHints) -> ConvertedTokenizer:
    found = {name: hints.special_token(name) for name in SPECIAL_NAMES}
    special = {name: text for name, text in found.items() if text is not None}
    return ConvertedTokenizer(Tokenizer.from_file(str(source / "tokenizer.json")), special, hints.chat_template)


def _save_tokenizer(converted: ConvertedTokenizer, directory: Path, config: PretrainedConfig) -> None:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=converted.tokenizer,
        model_max_length=config.max_position_embeddings,
        clean_up_tokenization_spaces=False,
        **converted.special,
    )
    tokenizer.chat_template = converted.chat_template
    tokenizer.save_pretrained(directory)


def _save_generation_config(source: Path, directory: Path, ends: list[int]) -> None:
    """Sampling defaults as they are; what only the family's own code reads is left out."""
    found = JsonFile(source / _GENERATION_FILE)
    values = {key: found.values[key] for key in _SAMPLING if found.has(key)}
    if ends:
        values["eos_token_id"] = ends
    (directory / _GENERATION_FILE).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
