"""The engine's options: one frozen value, checked when made."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lamella_engine.budget import parse_share
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
        sweep_tokens: tokens a sweep carries at most (decode first, the rest are prompt chunks); None means as many as
            ride for free while the weights move.
        kv_tokens: tokens of key-value cache for all sequences together; None means `max_sequences` times 2048, at
            least one full context.
        vram: device memory this engine may take: bytes, ``"4GiB"``, ``"80%"`` of the card, or ``"auto"``.
        ram: host memory in the same forms: for weights that do not stay on the device, or on a CPU for everything. 0
            keeps no layer in RAM and takes only what cannot be done without (the ring that reads from disk go to).
        expert_cache: what experts of layers that stream may have of the memory for layers, such as ``"50%"``, to keep
            those that are visited most. More than ``"auto"``, what layers leave over, pays where few sequences run.
        shared_memory: directory in memory where the workers of this host share their RAM tier; None means the usual
            one, where there is one.
        trace: keep the timeline of recent sweeps, for `Engine.write_trace`.
        offline: never ask the hub, even for a model that is not in the store.
        hub_token: access token for the hub; None means the usual places (environment, saved login).
        peers: addresses of hosts that share their stores (``http://host:port``), asked before the hub is; also offline.
    """

    store: Path
    device: str = "auto"
    dtype: str | None = None
    max_sequences: int = 8
    sweep_tokens: int | None = None
    kv_tokens: int | None = None
    vram: int | str = "auto"
    ram: int | str = "auto"
    expert_cache: str = "auto"
    shared_memory: Path | None = None
    trace: bool = False
    offline: bool = False
    hub_token: str | None = None
    peers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, low, high in (("max_sequences", 1, 4096), ("sweep_tokens", 16, 65536)):
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise OptionError(f"{name} is {value}; it must be between {low} and {high}")
        if self.sweep_tokens is not None and self.sweep_tokens < self.max_sequences:
            raise OptionError(
                f"sweep_tokens ({self.sweep_tokens}) is below max_sequences ({self.max_sequences}): "
                "not every sequence could get a token in a sweep; raise sweep_tokens"
            )
        parse_share(self.expert_cache, "expert_cache")
        if self.kv_tokens is not None and self.kv_tokens < 16:
            raise OptionError(f"kv_tokens is {self.kv_tokens}; it must be at least 16")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise OptionError(f"dtype is {self.dtype!r}; use one of {', '.join(DTYPES)}, or None for the stored type")
