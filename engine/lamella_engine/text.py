"""Between text and token ids: the model's own tokenizer, chat template and end tokens.

Everything comes from the model's directory in the store; templates run in transformers' sandbox. Thread-safe.
"""

from __future__ import annotations

import json
import logging
import re
import threading
from pathlib import Path

from jinja2 import TemplateError
from transformers import AutoTokenizer, PretrainedConfig

from lamella_engine.errors import CheckpointError, SequenceError
from lamella_engine.sequence_types import ToolChat

logger = logging.getLogger(__name__)

TOOL_MARKERS = ("<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]")
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
        added = self.tokenizer.added_tokens_decoder.items()
        self._markers = {
            token_id: str(token) for token_id, token in added if token.special and str(token) in TOOL_MARKERS
        }
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
            raise _no_chat_template()
        return self._rendered([{"role": role, "content": content} for role, content in messages], None)

    def encode_tool_chat(self, chat: ToolChat) -> list[int]:
        """Token ids of a chat with tools, ending where the assistant's answer begins.

        Raises:
            SequenceError: as `encode_chat`, or the model's template knows no tools (``tools_unsupported``).
        """
        turns = json.loads(chat.messages)
        for turn in turns:
            for call in turn.get("tool_calls", ()):  # templates want an object where the wire has its text
                call["function"]["arguments"] = _parsed(call["function"]["arguments"])
        tools = None if chat.tools is None else json.loads(chat.tools)
        if tools is not None and not re.search(r"\btools\b", self.chat_template(with_tools=True)):
            raise SequenceError(
                "tools_unsupported",
                "this model's chat template knows no tools; leave tools out and describe them in the prompt, or ask a "
                "model that was trained to call them",
            )
        return self._rendered(turns, tools)

    def chat_template(self, *, with_tools: bool) -> str:
        """The template that renders a chat, with tools or without.

        Raises:
            SequenceError: the model has none (``no_chat_template``).
        """
        found = self.tokenizer.chat_template
        if isinstance(found, dict):
            found = (found.get("tool_use") if with_tools else None) or found.get("default")
        if not isinstance(found, str) or not found:
            raise _no_chat_template()
        return found

    def _rendered(self, turns: list[dict[str, object]], tools: list[object] | None) -> list[int]:
        with self._lock:
            try:
                text = self.tokenizer.apply_chat_template(
                    turns, tools=tools, add_generation_prompt=True, tokenize=False
                )
            except (TemplateError, ValueError, TypeError) as error:
                raise SequenceError("bad_chat", f"the model's chat template refuses this chat: {error}") from error
            return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def decode(self, token_ids: list[int]) -> str:
        """Text of `token_ids` without special tokens; bytes that make no character show as U+FFFD."""
        with self._lock:
            text: str = self.tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def special_marker(self, marker: str) -> int | None:
        """The token of one of TOOL_MARKERS where it is a special one, which text cannot bring about; else None."""
        return next((token_id for token_id, known in self._markers.items() if known == marker), None)

    def decode_marked(self, token_ids: list[int]) -> str:
        """As `decode`, but tokens that say where a tool is called are written out though they are special."""
        text, part = "", list[int]()
        for token_id in token_ids:
            if token_id in self._markers:
                text += self.decode(part) + self._markers[token_id]
                part = []
            else:
                part.append(token_id)
        return text + self.decode(part)


def _no_chat_template() -> SequenceError:
    return SequenceError(
        "no_chat_template", "this model has no chat template; send raw text with prompt instead of messages"
    )


def _parsed(arguments: str) -> object:
    """An object if the text is one; what a model wrote in place of one stays text."""
    try:
        found = json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
    return found if isinstance(found, dict) else arguments


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
