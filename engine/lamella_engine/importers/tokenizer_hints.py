"""What the small files of a checkpoint say about its tokenizer: added tokens, special tokens, chat template.

Reads ``tokenizer_config.json``, ``special_tokens_map.json``, ``added_tokens.json`` and the chat template; ignores the
Python that they name. Neighbours: `sentencepiece_tokenizer` and the families.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lamella_engine.errors import CheckpointError
from lamella_engine.json_file import JsonFile

SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")


class TokenizerHints:
    """The hints in the checkpoint `directory`, whose config is `config`."""

    def __init__(self, directory: Path, config: JsonFile) -> None:
        self._tokenizer = JsonFile(directory / "tokenizer_config.json")
        self._map = JsonFile(directory / "special_tokens_map.json")
        self._added = JsonFile(directory / "added_tokens.json")
        self._template = directory / "chat_template.jinja"
        self._config = config

    def flag(self, key: str, default: bool) -> bool:
        """A setting of ``tokenizer_config.json``."""
        return self._tokenizer.flag(key, default)

    @property
    def chat_template(self) -> str | None:
        """The checkpoint's own chat template, if it has one."""
        if self._template.is_file():
            try:
                return self._template.read_text(encoding="utf-8")
            except (OSError, ValueError) as error:
                raise CheckpointError(f"{self._template} cannot be read: {error}") from error
        found = self._tokenizer.values.get("chat_template")
        if isinstance(found, list):
            named = {item.get("name"): item.get("template") for item in found if isinstance(item, dict)}
            found = named.get("default")
        return found if isinstance(found, str) else None

    @property
    def added_tokens(self) -> dict[int, tuple[str, bool]]:
        """Tokens that the files put at an id: text, and whether it is special."""
        found: dict[int, tuple[str, bool]] = {}
        for text, token_id in self._added.values.items():
            if isinstance(token_id, int):
                found[token_id] = (text, True)
        for key, value in self._tokenizer.section("added_tokens_decoder").items():
            content = _content(value)
            if key.isdigit() and content is not None:
                found[int(key)] = (content, not isinstance(value, dict) or value.get("special") is not False)
        return found

    def special_token(self, name: str) -> str | None:
        """The token that the files name ``bos_token``, ``eos_token``, ``unk_token`` or ``pad_token``."""
        return _content(self._tokenizer.values.get(name)) or _content(self._map.values.get(name))

    def special_id(self, name: str) -> int | None:
        """The id that the model's config has for such a token."""
        return self._config.token_id(f"{name}_id")

    @property
    def additional_special_tokens(self) -> list[str]:
        """Further tokens that the files call special."""
        found: list[str] = []
        for values in (self._tokenizer.values, self._map.values):
            listed = values.get("additional_special_tokens")
            found += [text for item in listed if (text := _content(item))] if isinstance(listed, list) else []
        return list(dict.fromkeys(found))


def _content(value: object) -> str | None:
    """The text of a token that is stored as a string or as an object with ``content``."""
    found = value.get("content") if isinstance(value, Mapping) else value
    return found if isinstance(found, str) and found else None
