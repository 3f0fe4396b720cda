"""The settings that say what a worker may serve and how it keeps its jobs private: the table ``[security]``.

Owns the allowlist of models and the pins of their revisions; both are decided from the name alone, before anything is
asked of the hub or read from the store. Neighbours: `config` (which holds the table), `process` (which opens what
`admitted` returns).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator

from lamella.errors import ConfigError
from lamella.keep_time import LEAST_KEEP_S, MOST_KEEP_S
from lamella.keys import FINISHED_TTL_S
from lamella.messages import check_model_name

_PATTERN = re.compile(r"[A-Za-z0-9_.*?/-]{1,200}", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}", re.ASCII)
_PARTS = re.compile(r"(?P<base>[^@~]+)(@(?P<revision>[^~]+))?(?P<form>~.+)?")


def _as_tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def _as_path(value: object) -> object:
    if not isinstance(value, str | Path):
        return value
    if not str(value).strip():
        raise ValueError("the path is empty; leave the setting out to store jobs readable")
    try:
        return Path(value).expanduser().absolute()
    except RuntimeError as error:
        raise ValueError(f"'~' cannot be expanded: {error}") from error


class SecurityTable(BaseModel):
    """Which models are served, from which revision, and how private jobs are."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, hide_input_in_errors=True)

    allowed_models: Annotated[tuple[str, ...], BeforeValidator(_as_tuple)] = Field(
        default=("*",), description='names of models that may be served, without revision; "owner/*" allows patterns'
    )
    pins: Mapping[str, str] = Field(
        default={}, description='the one commit a model may come from: { "owner/name" = "40 hexadecimal digits" }'
    )
    require_revision: bool = Field(
        default=False, description="true refuses a model of the hub that has neither a pin nor a full @revision"
    )
    allow_pulls: bool = Field(
        default=True, description="false: clients cannot ask this worker to bring models into its host's store"
    )
    keep_s: int = Field(
        default=FINISHED_TTL_S,
        ge=LEAST_KEEP_S,
        le=MOST_KEEP_S,
        description="seconds an ended job's prompt, tokens and record are kept",
    )
    encryption_keys_file: Annotated[Path | None, BeforeValidator(_as_path)] = Field(
        default=None, description="file of the keys that open and close encrypted jobs, the same as the clients have"
    )

    @field_validator("allowed_models")
    @classmethod
    def _usable_patterns(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value:
            raise ValueError('it allows nothing; use ["*"] to allow every model')
        for pattern in value:
            if not _PATTERN.fullmatch(pattern):
                raise ValueError(f"{pattern[:60]!r} is no name or pattern of letters, digits and _ . - / * ?")
        return value

    @field_validator("pins")
    @classmethod
    def _usable_pins(cls, value: Mapping[str, str]) -> Mapping[str, str]:
        for name, commit in value.items():
            if check_model_name(name) != _parts(name)[0]:
                raise ValueError(f"{name!r} must be a name without revision; the commit stands on the right side")
            if not _COMMIT.fullmatch(commit):
                raise ValueError(f"the pin of {name!r} is not a full commit (40 hexadecimal digits, in small letters)")
        return value

    def admitted_pull(self, model: str) -> str:
        """Return the name under which a client may have `model` pulled.

        Raises:
            ConfigError: as for `admitted`, or no client may ask.
        """
        if not self.allow_pulls:
            raise ConfigError("security.allow_pulls is false there; run `lamella models pull` on its host")
        return self.admitted(model)

    def admitted(self, model: str) -> str:
        """Return the name under which `model` is opened: with its pinned revision, if it has a pin.

        Raises:
            ConfigError: the model is not allowed, or asks for another revision than its pin.
        """
        base, revision, form = _parts(model)
        if not any(fnmatchcase(base, pattern) for pattern in self.allowed_models):
            raise ConfigError(
                f"worker.model = {model!r} is refused: security.allowed_models allows "
                f"{', '.join(self.allowed_models)}; nothing was fetched. Serve one of those, or add {base!r} there"
            )
        pin = self.pins.get(base)
        if pin is None:
            if self.require_revision and "/" in base and not _COMMIT.fullmatch(revision):
                raise ConfigError(
                    f"worker.model = {model!r} is refused: security.require_revision asks for a full commit; nothing "
                    f"was fetched. Name it as {base}@COMMIT (40 digits), or add it to security.pins"
                )
            return model
        if revision and not pin.startswith(revision):
            raise ConfigError(
                f"worker.model = {model!r} is refused: security.pins holds {base!r} at {pin}; nothing was fetched. "
                "Leave the revision out, or change the pin"
            )
        return f"{base}@{pin}{form}"


def _parts(model: str) -> tuple[str, str, str]:
    """Split a model's name into its base, its revision without '@', and its packed form with '~'."""
    found = _PARTS.fullmatch(model)
    if found is None:
        return model, "", ""
    return found["base"], found["revision"] or "", found["form"] or ""
