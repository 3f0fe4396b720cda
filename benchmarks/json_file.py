"""JSON files that are always whole: written beside and renamed, so that a cut-off run leaves the last good state."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Replace `path` by `value` in one step."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_text(json.dumps(value, indent=2) + "\n")
    part.replace(path)


def read_json(path: Path) -> dict[str, Any]:
    """The object in `path`.

    Raises:
        ValueError: it holds something else.
    """
    value = json.loads(path.read_text())
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object")
    return value
