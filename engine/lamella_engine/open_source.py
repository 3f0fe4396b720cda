"""Opens what lies on this host and weights can come from: a checkpoint directory or a GGUF file."""

from __future__ import annotations

from pathlib import Path

from lamella_engine.checkpoint import DirectoryCheckpoint
from lamella_engine.errors import CheckpointError, ModelNotFound
from lamella_engine.gguf_checkpoint import GgufCheckpoint
from lamella_engine.weight_source import WeightSource


def open_source(origin: Path, *, expand_to: str | None = None) -> WeightSource:
    """Open a checkpoint directory or a ``.gguf`` file and check its headers.

    Args:
        origin: the directory or file.
        expand_to: torch dtype name that packed tensors of a directory expand to; None means what its config names.

    Raises:
        ModelNotFound: nothing is there.
        CheckpointError: it is corrupt, incomplete or of another kind.
    """
    if origin.is_dir():
        return DirectoryCheckpoint.open(origin, expand_to=expand_to)
    if origin.suffix.lower() == ".gguf":
        return GgufCheckpoint.open(origin)
    if not origin.exists():
        raise ModelNotFound(f"there is no checkpoint at {origin}")
    raise CheckpointError(f"{origin} is neither a checkpoint directory nor a .gguf file")
