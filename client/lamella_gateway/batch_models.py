"""The models that the lines of a batch may name, with the contexts that were known when the batch was checked.

Owns their look-up, once for each model: later runs use what is in the batch's record, so that a line that leaves its
length open asks for the same whoever goes on with it. Neighbours: `batch_check`, `batch_execution`.
"""

from __future__ import annotations

from collections.abc import Mapping

from lamella.batch_lines import BatchError
from lamella.connection import Connection
from lamella.messages import check_model_name
from lamella.operations import models
from lamella_gateway.api_error import unknown_model
from lamella_gateway.api_keys import ApiKey
from lamella_gateway.model_list import was_served


class BatchModels:
    """The models of one batch; `contexts` grows while its lines are checked.

    Args:
        contexts: what is known of them; a model that is not among them is asked for.
        default_tokens: tokens of an answer that names no limit, if the model's context has room for them.
        key: whose batch it is.
        connection: asked for models; None asks nobody.
    """

    def __init__(
        self,
        contexts: Mapping[str, int | None],
        default_tokens: int,
        key: ApiKey | None,
        connection: Connection | None,
    ) -> None:
        self.contexts = dict(contexts)
        self._default_tokens = default_tokens
        self._key = key
        self._connection = connection
        self._missing: set[str] = set()

    def default_tokens(self, model: str) -> int:
        """Return how long an answer of a model may be that does not say; raises BatchError for one it may not use."""
        if model not in self.contexts:
            self._look_up(model)
        context = self.contexts[model]
        return self._default_tokens if context is None else min(self._default_tokens, context)

    def _look_up(self, model: str) -> None:
        if self._key is not None and not self._key.allows_model(model):
            raise BatchError("model_not_allowed", f"this API key may not use {model[:200]!r}", "body.model")
        if model in self._missing or not self._is_known(model):
            self._missing.add(model)
            raise BatchError("model_not_found", unknown_model(model).message, "body.model")

    def _is_known(self, model: str) -> bool:
        """Look a model up; one whose workers are away is waited for, one that was never here is not."""
        try:
            check_model_name(model)
        except ValueError:
            return False
        if self._connection is None:
            return False
        served = {each.name: each.context_length for each in self._connection.run(models(self._connection.keys))}
        if model in served:
            self.contexts[model] = served[model]
            return True
        if not self._connection.run(was_served(self._connection.keys, model)):
            return False
        self.contexts[model] = None
        return True
