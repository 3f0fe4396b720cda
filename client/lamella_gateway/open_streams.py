"""How many requests wait for tokens, and the bound on it."""

from __future__ import annotations

from prometheus_client import Gauge

from lamella_gateway.api_error import SERVER, ApiError

RETRY_S = 2.0


class OpenStreams:
    """A place for each request that waits; enter and leave come in pairs."""

    def __init__(self, most: int, gauge: Gauge) -> None:
        self._most = most
        self._gauge = gauge
        self._open = 0

    def enter(self) -> None:
        """Take a place; raises ApiError where there is none."""
        if self._open >= self._most:
            raise ApiError(
                503,
                f"{self._open} requests wait here already; try again in a moment",
                type=SERVER,
                code="too_many_streams",
                retry_after_s=RETRY_S,
            )
        self._open += 1
        self._gauge.set(self._open)

    def leave(self) -> None:
        """Give the place back."""
        self._open -= 1
        self._gauge.set(self._open)
