"""The settings that say what a worker serves, under which name, and how patient it is: the table ``[worker]``.

Owns the table and what makes a value of it unusable. Neighbours: `config`, which holds it and reads it from where it
is set.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from lamella.messages import check_model_name

NO_MODEL = "no_model"  # the kind of the error that says so
MOST_MODELS = 64
LEAST_SHARE, MOST_SHARE = 0.01, 100.0

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}", re.ASCII)
_DEVICE = re.compile(r"auto|cpu|cuda:\d{1,3}", re.ASCII)


def _as_tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


class WorkerTable(BaseModel):
    """What this worker serves and how it holds its jobs."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, hide_input_in_errors=True)

    model: str | None = Field(
        default=None, description="the model this worker serves: name, owner/name or owner/name@revision"
    )
    models: Annotated[tuple[str, ...], BeforeValidator(_as_tuple)] = Field(
        default=(), description='instead of model, several that take turns on the device: ["a", "owner/b"]'
    )
    shares: Mapping[str, float] = Field(
        default={}, description='of the time that models take turns in, 1.0 for each that is left out: { "a" = 2.0 }'
    )
    device: str = Field(default="auto", description="cpu, cuda:N (N counts from 0), or auto")
    name: str | None = Field(
        default=None, description="a name no other worker has: letters, digits and _ . -; default host-device-pid"
    )
    lease_s: float = Field(default=10.0, ge=0.5, le=3600.0, description="seconds a job stays ours between two signs")
    drain_s: float = Field(default=20.0, ge=1.0, le=3600.0, description="seconds a stop by SIGTERM takes at most")
    max_attempts: int = Field(default=3, ge=1, le=100, description="claims of a job before it fails")
    isolation: Literal["child", "none"] = Field(
        default="child", description="child runs the engine in a process of its own, none in the worker's"
    )
    hang_s: float = Field(
        default=120.0, ge=0.5, le=86400.0, description="seconds a sweep may take at least before its process is killed"
    )
    hang_sweeps: float = Field(
        default=20.0, ge=2.0, le=10000.0, description="times the longest sweep of late that a sweep may take"
    )
    open_s: float = Field(
        default=14400.0, ge=1.0, le=604800.0, description="seconds that opening the model may go on without progress"
    )
    max_restarts: int = Field(
        default=8, ge=0, le=1000, description="restarts of the engine's process within restart_window_s; then it ends"
    )
    restart_window_s: float = Field(default=600.0, ge=1.0, le=86400.0, description="the span that max_restarts is of")

    @property
    def served(self) -> tuple[str, ...]:
        """The names of all models that this worker starts with."""
        return self.models if self.model is None else (self.model,)

    @field_validator("model")
    @classmethod
    def _model_name(cls, value: str | None) -> str | None:
        return value if value is None else check_model_name(value)

    @field_validator("models")
    @classmethod
    def _model_names(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            check_model_name(name)
        if twice := sorted({name for name in value if value.count(name) > 1}):
            raise ValueError(f"{', '.join(twice)} is named more than once; name each model once")
        if len(value) > MOST_MODELS:
            raise ValueError(f"{len(value)} models are more than the {MOST_MODELS} that one worker serves")
        return value

    @field_validator("shares")
    @classmethod
    def _usable_shares(cls, value: Mapping[str, float]) -> Mapping[str, float]:
        for name, share in value.items():
            if not LEAST_SHARE <= share <= MOST_SHARE:
                raise ValueError(f"the share of {name!r} is {share:g}; use {LEAST_SHARE:g} to {MOST_SHARE:g}")
        return value

    @model_validator(mode="after")
    def _names_models_once(self) -> WorkerTable:
        if self.model is not None and self.models:
            raise ValueError("model and models are both set; put all names into models, or serve the one of model")
        if not self.served:
            raise PydanticCustomError(NO_MODEL, "no model is named")
        if strange := sorted(set(self.shares) - set(self.served)):
            raise ValueError(f"shares names {', '.join(strange)}, which this worker does not serve; correct the name")
        return self

    @field_validator("device")
    @classmethod
    def _usable_device(cls, value: str) -> str:
        if not _DEVICE.fullmatch(value):
            raise ValueError("it is neither cpu, cuda:N nor auto")
        return value

    @field_validator("name")
    @classmethod
    def _usable_name(cls, value: str | None) -> str | None:
        if value is not None and not _NAME.fullmatch(value):
            raise ValueError("it must start with a letter or digit, and be at most 100 letters, digits or any of _ . -")
        return value
