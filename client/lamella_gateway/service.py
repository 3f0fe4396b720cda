"""What all requests of a gateway share: settings, the client, the board of streams, the meter, the metrics.

Owns the order in which they are opened and closed. Neighbours: `app` (opens it), every route (gets it from `of`).
"""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType

from starlette.requests import Request

from lamella import AsyncClient, __version__
from lamella.connection import AsyncConnection
from lamella_gateway.live_board import LiveBoard
from lamella_gateway.meter import Meter
from lamella_gateway.metrics import GatewayMetrics
from lamella_gateway.model_list import ModelList
from lamella_gateway.open_streams import OpenStreams
from lamella_gateway.settings import Settings
from lamella_gateway.settler import Settler

TIMEOUT_S = 10.0
FINGERPRINT = f"lamella-{__version__}"


@dataclass(frozen=True)
class Service:
    """One gateway's shared parts; an async context manager.

    Attributes:
        settings: what it was started with.
        client: submits, cancels, lists.
        connection: carries everything the client has no call for.
        board: all streams over one subscription.
        meter: rates, quotas, bills.
        settler: books what ended.
        metrics: counters.
        models: what is served.
        streams: places for requests that wait.
    """

    settings: Settings
    client: AsyncClient
    connection: AsyncConnection
    board: LiveBoard
    meter: Meter
    settler: Settler
    metrics: GatewayMetrics
    models: ModelList
    streams: OpenStreams

    @classmethod
    def make(cls, settings: Settings) -> Service:
        """Return a service that is not connected yet; raises ConfigError for a URL that cannot be used."""
        connection = AsyncConnection(settings.redis_url, settings.prefix, TIMEOUT_S)
        metrics = GatewayMetrics()
        meter = Meter(connection)
        client = AsyncClient(settings.redis_url, prefix=settings.prefix, timeout_s=TIMEOUT_S)
        return cls(
            settings,
            client,
            connection,
            LiveBoard(connection),
            meter,
            Settler(meter),
            metrics,
            ModelList(client, connection),
            OpenStreams(settings.max_open_streams, metrics.open_streams),
        )

    async def __aenter__(self) -> Service:
        """Start the background work."""
        self.board.start()
        self.settler.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop it and close the connections."""
        await self.settler.close()
        await self.board.close()
        await self.client.close()
        await self.connection.close()


def of(request: Request) -> Service:
    """Return the service that answers a request."""
    service = request.app.state.service
    assert isinstance(service, Service)  # noqa: S101  # put there by `app`, for every request
    return service
