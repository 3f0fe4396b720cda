"""A model whose shards a host has, as its workers' heartbeats tell; in a place of its own because there are many."""

from __future__ import annotations

from typing import NamedTuple


class StoredModelInfo(NamedTuple):
    """A model that a host's store has complete; sizes in bytes."""

    name: str
    size_bytes: int
    largest_layer_bytes: int
