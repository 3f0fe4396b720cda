"""One JSON file of a checkpoint, read with types: a value of the wrong kind is a named error, not a wrong model.

Owns no meaning of any key. Imported families and formats of packed weights read their settings through it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

from lamella_engine.errors import CheckpointError


class JsonFile:
    """The object in a JSON file; a missing file is an empty object.

    Raises:
        CheckpointError: the file cannot be read, or holds no JSON object.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.values: Mapping[str, object] = {}
        if not path.is_file():
            return
        try:
            parsed = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
        if not isinstance(parsed, dict):
            raise CheckpointError(f"{path} holds no JSON object; fetch it again")
        self.values = parsed

    def has(self, key: str) -> bool:
        """True if the key is there and not null."""
        return self.values.get(key) is not None

    def whole(self, key: str, default: int | None = None, *, most: int = 2**31) -> int:
        """A whole number from 1 to `most`; `default` where the key is missing or null.

        Raises:
            CheckpointError: it is missing without default, or something else.
        """
        value = self._or(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            raise self._wrong(key, value, f"a whole number from 1 to {most}")
        return value

    def number(self, key: str, default: float) -> float:
        """A finite number above 0; `default` where the key is missing or null."""
        value = self._or(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise self._wrong(key, value, "a number above 0")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """True or false; `default` where the key is missing or null."""
        value = self._or(key, default)
        if not isinstance(value, bool):
            raise self._wrong(key, value, "true or false")
        return value

    def text(self, key: str, default: str) -> str:
        """A string; `default` where the key is missing or null."""
        value = self._or(key, default)
        if not isinstance(value, str):
            raise self._wrong(key, value, "a text")
        return value

    def section(self, key: str) -> Mapping[str, object]:
        """An object; empty where the key is missing or null."""
        value = self._or(key, {})
        if not isinstance(value, dict):
            raise self._wrong(key, value, "an object")
        return value

    def token_id(self, key: str) -> int | None:
        """A token id, or None."""
        value = self.values.get(key)
        return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None

    def token_ids(self, key: str) -> tuple[int, ...]:
        """Token ids from one number or a list of them; empty where there is none."""
        value = self.values.get(key)
        found = value if isinstance(value, list) else [value]
        return tuple(item for item in found if isinstance(item, int) and not isinstance(item, bool) and item >= 0)

    def _or(self, key: str, default: object) -> object:
        value = self.values.get(key)
        return default if value is None else value

    def _wrong(self, key: str, value: object, wanted: str) -> CheckpointError:
        found = "is missing" if value is None else f"is {value!r:.80}"
        return CheckpointError(f"{key!r} of {self.path} {found}; {wanted} is needed. Fetch the file again.")
