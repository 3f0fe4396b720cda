"""Model names, and the directory a name stands for: never outside the store."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import quote, unquote

from lamella_engine.errors import ModelNameError

_MODEL_NAME = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(@[0-9a-f]{7,64})?$", re.ASCII)
_NOT_IN_NAMES = re.compile(r"[^\w.-]+|\.{2,}", re.ASCII)


def check_model_name(name: str) -> str:
    """Return `name` if it is ``name``, ``owner/name`` or either with ``@revision`` (7 to 64 hex digits).

    Raises:
        ModelNameError: it is not, or could mean a path outside the store.
    """
    if len(name) > 200 or ".." in name or not _MODEL_NAME.match(name):
        raise ModelNameError(
            f"{name!r} is not a model name; use 'name', 'owner/name' or 'owner/name@revision' "
            "made of letters, digits, '.', '_' and '-'"
        )
    return name


def model_directory(root: Path, name: str) -> Path:
    """The directory of `name` in the store at `root`; different names never share one."""
    return root / quote(check_model_name(name), safe="@")


def directory_model_name(directory: Path) -> str:
    """The name that `model_directory` made `directory` from."""
    return unquote(directory.name)


def split_revision(name: str) -> tuple[str, str | None]:
    """``owner/name`` and the revision after ``@``, or None."""
    repository, _, revision = name.partition("@")
    return repository, revision or None


def name_for_path(path: Path, fingerprint: str) -> str:
    """A store name for a checkpoint that was given as a path: its base name and the start of its fingerprint."""
    base = _NOT_IN_NAMES.sub("-", path.resolve().name.removesuffix(".gguf")).strip("-.") or "model"
    if not base[0].isalnum():
        base = "m" + base
    return check_model_name(f"{base[:100]}-{fingerprint[:12]}")
