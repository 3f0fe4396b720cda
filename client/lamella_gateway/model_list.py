"""Which models are served now, and whether one that is not was ever known here: the difference of 404 and 503.

Owns a short memory of the workers' list, so that a request does not cost two exchanges for it. Neighbours: the routes.
"""

from __future__ import annotations

import time

from lamella import AsyncClient, ModelInfo
from lamella.connection import AsyncConnection
from lamella.keys import Keys
from lamella.messages import check_model_name
from lamella.steps import Operation, answers, commands
from lamella_gateway.api_error import model_away, unknown_model

FRESH_S = 1.0


class ModelList:
    """The models that live workers serve."""

    def __init__(self, client: AsyncClient, connection: AsyncConnection) -> None:
        self._client = client
        self._connection = connection
        self._known: dict[str, ModelInfo] = {}
        self._read_at = float("-inf")

    async def all(self) -> list[ModelInfo]:
        """Return what is served now."""
        models = await self._client.models()
        self._known = {model.name: model for model in models}
        self._read_at = time.monotonic()
        return models

    async def find(self, name: str) -> ModelInfo:
        """Return a model that is served.

        Raises:
            ApiError: 404 for an unknown model, 503 for one whose workers are away.
        """
        if time.monotonic() - self._read_at > FRESH_S or name not in self._known:
            await self.all()
        if name in self._known:
            return self._known[name]
        try:
            check_model_name(name)
        except ValueError as error:
            raise unknown_model(name) from error
        if await self._connection.run(was_served(self._connection.keys, name)):
            raise model_away(name)
        raise unknown_model(name)


def was_served(keys: Keys, name: str) -> Operation[bool]:
    """Return whether a model was ever known here."""
    raw = yield commands(("EXISTS", keys.serving(name), keys.queue_book(name)))
    return answers(raw)[0] != 0
