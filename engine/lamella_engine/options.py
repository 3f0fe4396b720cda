"""The engine's options: one frozen value, checked when made."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lamella_engine.errors import OptionError

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class EngineOptions:
    """How an engine runs; every default works on a machine with two cores and no GPU.

    Attributes:
        store: directory of the shard cache, shared by all workers of a host.
        device: ``cpu``, ``cuda``, ``cuda:N`` or ``auto`` (the first GPU if there is one).
        dtype: compute type, or None for the type the checkpoint is stored in.
        max_sequences: sequences that share a sweep at most.
        sweep_tokens: tokens a sweep carries at most (decode first, the rest are prompt chunks).
        kv_tokens: tokens of key-value cache for all sequences together; None means `max_sequences` times 2048, at
            least one full context.
        ring_slots: host buffers the reader fills ahead of the sweep.
        offline: never ask the hub, even for a model that is not in the store.
        hub_token: access token for the hub; None means the usual places (environment, saved login).
    """

    store: Path
    device: str = "auto"
    dtype: str | None = None
    max_sequences: int = 8
    sweep_tokens: int = 512
    kv_tokens: int | None = None
    ring_slots: int = 3
    offline: bool = False
    hub_token: str | None = None

    def __post_init__(self) -> None:
        for name, low, high in (("max_sequences", 1, 4096), ("sweep_tokens", 16, 65536), ("ring_slots", 2, 64)):
            value = getattr(self, name)
            if not low <= value <= high:
                raise OptionError(f"{name} is {value}; it must be between {low} and {high}")
        if self.sweep_tokens < self.max_sequences:
            raise OptionError(
                f"sweep_tokens ({self.sweep_tokens}) is below max_sequences ({self.max_sequences}): "
                "not every sequence could get a token in a sweep; raise sweep_tokens"
            )
        if self.kv_tokens is not None and self.kv_tokens < 16:
            raise OptionError(f"kv_tokens is {self.kv_tokens}; it must be at least 16")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise OptionError(f"dtype is {self.dtype!r}; use one of {', '.join(DTYPES)}, or None for the stored type")
