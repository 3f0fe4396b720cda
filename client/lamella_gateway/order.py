"""What a request asks of the queue: its jobs to be, as the requests that the client library sends. Does no I/O.

Neighbours: the routes and `line_form` (which make orders), `generation` (which submits one and follows it).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace

from lamella import ChatMessage, Priority, SamplingParams
from lamella.embed_draft import EmbedOptions, draft_embed
from lamella.embedding import Pooling
from lamella.map_run import Draft
from lamella.queue_terms import expected_cost
from lamella.request_draft import SubmitOptions, draft_request
from lamella_gateway.repeats import NO_REPEAT, Repeat
from lamella_gateway.request_base import SEED_BITS
from lamella_gateway.tool_request import NO_TERMS, ToolTerms


@dataclass(frozen=True)
class Choice:
    """One job to be: a prompt or a chat, and how its tokens are chosen."""

    sampling: SamplingParams
    prompt: str | None = None
    messages: tuple[ChatMessage, ...] | None = None


@dataclass(frozen=True)
class Texts:
    """One job of embeddings to be."""

    texts: tuple[str, ...]
    pooling: Pooling = "mean"
    is_normalised: bool = True


@dataclass(frozen=True)
class Order:
    """What a request asks for."""

    model: str
    choices: tuple[Choice | Texts, ...]
    repeat: Repeat = NO_REPEAT
    user: str | None = None
    tier: str | None = None
    response: str = ""
    response_format: Mapping[str, object] | None = None
    tools: ToolTerms = NO_TERMS
    goes_on_alone: bool = False  # whether its jobs outlive the connection

    @property
    def priority(self) -> Priority:
        """The class its jobs wait in."""
        return Priority.LOW if self.tier == "flex" else Priority.NORMAL

    def drafts(self, user: str | None, *, requires_worker: bool, priority: Priority | None = None) -> tuple[Draft, ...]:
        """Return the requests of all jobs.

        Args:
            user: whose jobs they are; None leaves it to the order.
            requires_worker: whether a job is refused that no live worker could take.
            priority: the class they wait in; None leaves it to the order.

        Raises:
            RequestError: a job cannot be.
        """
        made = (self._draft(choice, user or self.user, priority or self.priority) for choice in self.choices)
        return tuple(
            replace(draft, require_worker=requires_worker, idempotency_key=self._key(index))
            for index, draft in enumerate(made)
        )

    def _key(self, index: int) -> str | None:
        return None if self.repeat.key is None else f"{self.repeat.key}:{index}"

    def _draft(self, choice: Choice | Texts, user: str | None, priority: Priority) -> Draft:
        if isinstance(choice, Texts):
            return draft_embed(
                self.model,
                choice.texts,
                EmbedOptions(pooling=choice.pooling, normalised=choice.is_normalised, user=user, priority=priority),
            )
        options = SubmitOptions(model=self.model, sampling=choice.sampling, user=user, priority=priority)
        if self.response_format is not None:
            options["response_format"] = self.response_format
        if self.tools.tools is not None:
            options["tools"] = self.tools.tools
            options["tool_choice"] = self.tools.choice
        if choice.messages is not None:
            options["messages"] = choice.messages
        return draft_request(choice.prompt, options)


def draft_cost(draft: Draft) -> int:
    """Return how many tokens a job may take, prompt included."""
    cost = expected_cost(draft.request(draft.model or "any"))
    return cost.prompt + cost.answer


def with_seeds(choice: Choice, count: int) -> list[Choice]:
    """Return `count` choices alike but for their seeds: the first has the one given, each other one made from it."""
    seed = choice.sampling.seed
    if seed is None:
        return [choice] * count
    return [replace(choice, sampling=choice.sampling.model_copy(update={"seed": _seed(seed, i)})) for i in range(count)]


def _seed(seed: int, index: int) -> int:
    if index == 0:
        return seed
    digest = hashlib.sha256(f"{seed} {index}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> (64 - SEED_BITS)
