"""Between text and token ids: the model's own tokenizer, chat template and end tokens.

Everything comes from the model's directory in the store; templates run in transformers' sandbox. Thread-safe.
"""

from __future__ import annotations

import json
import logging
import threading
from pathlib import Path

from jinja2 import TemplateError
from transformers import AutoTokenizer, PretrainedConfig

from lamella_engine.errors import CheckpointError, SequenceError

logger = logging.getLogger(__name__)

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "tekken.json")


class TextCodec:
    """The tokenizer of one model.

    Attributes:
        tokenizer: the transformers tokenizer.
    """

    def __init__(self, directory: Path) -> None:
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"the tokenizer in {directory} cannot be loaded: {error}") from error
        self._lock = threading.Lock()  # fast tokenizers refuse to be used while their settings change

    def encode_prompt(self, prompt: str) -> list[int]:
        """Token ids of raw text, with the special tokens the model expects in front."""
        with self._lock:
            return list(self.tokenizer(prompt, add_special_tokens=True)["input_ids"])

    def encode_chat(self, messages: tuple[tuple[str, str], ...]) -> list[int]:
        """Token ids of a chat of (role, content) pairs, ending where the assistant's answer begins.

        Raises:
            SequenceError: the model has no chat template (``no_chat_template``) or it refuses the chat (``bad_chat``).
        """
        if not self.tokenizer.chat_template:
            raise SequenceError(
                "no_chat_template", "this model has no chat template; send raw text with prompt instead of messages"
            )
        turns = [{"role": role, "content": content} for role, content in messages]
        with self._lock:
            try:
                text = self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
            except (TemplateError, ValueError, TypeError) as error:
                raise SequenceError("bad_chat", f"the model's chat template refuses this chat: {error}") from error
            return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def decode(self, token_ids: list[int]) -> str:
        """Text of `token_ids` without special tokens; bytes that make no character show as U+FFFD."""
        with self._lock:
            text: str = self.tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


def load_codec(directory: Path) -> TextCodec | None:
    """The codec of the model in `directory`, or None if it ships no tokenizer."""
    if not any((directory / name).is_file() for name in _TOKENIZER_FILES):
        logger.warning("%s has no tokenizer: only token ids can be submitted, and events carry no text", directory)
        return None
    return TextCodec(directory)


def end_token_ids(directory: Path, config: PretrainedConfig, codec: TextCodec | None) -> frozenset[int]:
    """The tokens that end a text: of the generation config, else of the model's config, else of the tokenizer."""
    found: int | list[int] | None = None
    path = directory / "generation_config.json"
    if path.is_file():
        try:
            found = json.loads(path.read_text()).get("eos_token_id")
        except (ValueError, AttributeError) as error:
            raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if found is None:
        found = getattr(config, "eos_token_id", None)
    if found is None and codec is not None:
        found = codec.tokenizer.eos_token_id
    if found is None:
        return frozenset()
    return frozenset(found if isinstance(found, list) else [found])
