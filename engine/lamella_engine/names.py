"""Model names: which are allowed, and which directory of the store each one means.

Owns the rule (the same one the wire applies) and the mapping to directory names, which is one to one and cannot leave
the store. Touches no file.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from lamella_engine.errors import ModelNameError

MAX_NAME_CHARS = 200
_MODEL_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(@[0-9a-f]{7,64})?(~[a-z0-9][a-z0-9-]*)?", re.ASCII)
_VARIANT = "~"
_SEPARATOR = "+"  # not allowed in names, so that `a/b` and `a+b` cannot meet in one directory
_NOT_ALLOWED = re.compile(r"[^\w.-]+", re.ASCII)


def check_model_name(name: str) -> str:
    """Return `name` if it is ``name``, ``owner/name`` or either with ``@revision`` (hex, 7-64 digits).

    ``~variant`` behind it names a packed form of the model, such as ``~nf4``.

    Raises:
        ModelNameError: the name could mean a path outside the store, or is not of that form.
    """
    if not is_model_name(name):
        raise ModelNameError(
            f"{name[:MAX_NAME_CHARS]!r} is not a model name; use 'name', 'owner/name' or 'owner/name@revision' "
            "made of letters, digits, '.', '_' and '-', and '~nf4' or the like behind it for a packed form"
        )
    return name


def is_model_name(name: str) -> bool:
    """True if `check_model_name` accepts the name."""
    return len(name) <= MAX_NAME_CHARS and ".." not in name and _MODEL_NAME.fullmatch(name) is not None


def directory_name(name: str) -> str:
    """The directory of the model `name` in a store: one path component, different for different names."""
    return check_model_name(name).replace("/", _SEPARATOR)


def model_name(directory: Path) -> str:
    """The name whose `directory_name` the directory has."""
    return directory.name.replace(_SEPARATOR, "/")


def name_from_path(path: Path) -> str:
    """The name of a model that is known by its path only: readable, and different for different places."""
    place = path.resolve()
    stem = place.stem if place.suffix.lower() == ".gguf" else place.name
    readable = _NOT_ALLOWED.sub("-", stem).strip("-._")[:100].replace("..", "-") or "model"
    return f"{readable}-{hashlib.sha256(str(place).encode()).hexdigest()[:8]}"


def split_revision(name: str) -> tuple[str, str | None]:
    """The repository on the hub that `name` means, and the commit it is pinned to, if any."""
    base, _ = split_variant(name)
    repository, _, revision = base.partition("@")
    return repository, revision or None


def split_variant(name: str) -> tuple[str, str | None]:
    """The model that `name` is a packed form of, and what tells the form; None for the model itself."""
    base, _, variant = check_model_name(name).partition(_VARIANT)
    return base, variant or None


def variant_name(base: str, spec: str) -> str:
    """The name of `base` packed as the specification `spec` says: by a word alone, else by it and a digest."""
    first = spec.partition(",")[0]
    variant = first if spec == first else f"{first}-{hashlib.sha256(spec.encode()).hexdigest()[:8]}"
    return check_model_name(f"{base}{_VARIANT}{variant}")
