"""From a caller's arguments to a request for embeddings: every mistake is named, nothing is sent.

Owns validation at the edge, as `request_draft` does for answers. Neighbours: `client` (which takes the arguments),
`operations` (which picks the model and sends the request).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict

from pydantic import ValidationError

from lamella.embedding import EmbedRequest, Pooling
from lamella.errors import RequestError
from lamella.messages import Priority
from lamella.mistakes import explained, shown
from lamella.queue_terms import DEFAULT_TERMS, QueueTerms, checked_terms
from lamella.request_draft import checked_idempotency_key, checked_model

_KEYS = ("pooling", "normalised", "idempotency_key", "require_worker", "user", "priority", "deadline_s")


class EmbedOptions(TypedDict, total=False):
    """Everything a request for embeddings takes besides model and texts.

    `pooling` says which hidden states stand for a text: the "mean" of all tokens' (default) or the "last" token's;
    `normalised` (default True) scales each vector to length 1. The others are as in SubmitOptions.
    """

    pooling: Pooling
    normalised: bool
    idempotency_key: str | None
    require_worker: bool
    user: str | None
    priority: Priority | str
    deadline_s: float | None


@dataclass(frozen=True)
class EmbedDraft:
    """A checked request whose model may still be open (None: the only one that is served)."""

    wanted: EmbedRequest
    model: str | None
    idempotency_key: str | None
    require_worker: bool
    terms: QueueTerms = DEFAULT_TERMS

    def request_hash(self) -> str:
        """Return a hash of the request as it was asked for, before the model is filled in."""
        asked: list[object] = [self.wanted.model_dump(exclude={"model"}), self.model]
        if self.terms != DEFAULT_TERMS:
            asked.append(list(self.terms))
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()

    def request(self, model: str) -> EmbedRequest:
        """Return the request for `model`."""
        return self.wanted.model_copy(update={"model": model})


def draft_embed(model: str | None, texts: object, options: Mapping[str, object]) -> EmbedDraft:
    """Check the arguments of a request for embeddings.

    Raises:
        RequestError: an argument is unknown, of the wrong type or out of range.
    """
    given = dict(options)
    if isinstance(texts, str | bytes | Mapping) or not isinstance(texts, Sequence):
        raise RequestError(f"texts is of type {type(texts).__name__}; give a list of texts, [text] for one")
    key = checked_idempotency_key(given.pop("idempotency_key", None))
    require_worker = given.pop("require_worker", True)
    if not isinstance(require_worker, bool):
        raise RequestError(f"require_worker is {shown(require_worker)}; use True or False")
    terms = checked_terms(given.pop("user", None), given.pop("priority", None), given.pop("deadline_s", None))
    if model is not None:
        model = checked_model(model)
    try:
        wanted = EmbedRequest.model_validate({"model": model or "any", "texts": tuple(texts), **given}, strict=True)
    except ValidationError as error:
        raise RequestError(explained(error, "", _KEYS)) from error
    return EmbedDraft(wanted, model, key, require_worker, terms)
