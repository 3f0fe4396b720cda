"""On what terms a job waits: whose it is, how urgent, until when, and what it is expected to cost.

Owns the estimate of a job's cost in tokens and the two values a submit adds to a request. They stay beside the request
in the job's record, so that a worker reads requests of every version. Neighbours: `registry_calls` (sends them),
``lua/_queue.lua`` (orders jobs by them), `limits` (what users may do).
"""

from __future__ import annotations

import math
from typing import NamedTuple

from lamella.embedding import EmbedRequest
from lamella.errors import RequestError
from lamella.messages import GenerateRequest, Priority

ANONYMOUS = "anonymous"  # whoever gives no user
MAX_USER_CHARS = 128
LONGEST_DEADLINE_S = 30 * 86400.0
CHARS_A_TOKEN = 4  # of prompts, for the estimate only


class QueueTerms(NamedTuple):
    """The terms of one job; `deadline_s` counts from the moment the server accepts it, None is no deadline."""

    user: str = ANONYMOUS
    priority: Priority = Priority.NORMAL
    deadline_s: float | None = None


DEFAULT_TERMS = QueueTerms()


def checked_terms(user: object, priority: object, deadline_s: object) -> QueueTerms:
    """Return the terms for what a caller gave; None is the default of each.

    Raises:
        RequestError: one of them is of the wrong type or out of range.
    """
    return QueueTerms(
        ANONYMOUS if user is None else check_user(user),
        Priority.NORMAL if priority is None else _priority(priority),
        None if deadline_s is None else _deadline(deadline_s),
    )


def check_user(user: object) -> str:
    """Return `user` if it can be a user's name.

    Raises:
        RequestError: it is no text of 1 to MAX_USER_CHARS printable characters.
    """
    if not isinstance(user, str) or not 1 <= len(user) <= MAX_USER_CHARS or not user.isprintable():
        raise RequestError(f"user is {str(user)[:60]!r}; use 1 to {MAX_USER_CHARS} printable characters")
    return user


def _priority(priority: object) -> Priority:
    try:
        return Priority(str(priority))
    except ValueError as error:
        known = ", ".join(repr(each.value) for each in Priority)
        raise RequestError(f"priority is {str(priority)[:60]!r}; use one of {known}") from error


def _deadline(seconds: object) -> float:
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not math.isfinite(seconds):
        raise RequestError(f"deadline_s is {seconds!r}; use a number of seconds")
    if not 0 < seconds <= LONGEST_DEADLINE_S:
        raise RequestError(f"deadline_s is {seconds!r}; use more than 0 and at most {LONGEST_DEADLINE_S:.0f} seconds")
    return float(seconds)


class Cost(NamedTuple):
    """Tokens a job is expected to take, of prompt and answer, and how many it brings at least."""

    prompt: int
    answer: int
    least_answer: int


def expected_cost(request: GenerateRequest | EmbedRequest) -> Cost:
    """Estimate a request's cost; what it really used replaces it when the job ends."""
    if isinstance(request, EmbedRequest):
        return Cost(1 + sum(map(len, request.texts)) // CHARS_A_TOKEN, 0, 0)
    texts = [request.prompt or "", *(text for message in request.messages or () for text in message.texts)]
    texts += [text for tool in request.tools or () for text in (tool.description or "", tool.parameters or "")]
    prompt = 1 + sum(map(len, texts)) // CHARS_A_TOKEN
    answer = request.sampling.max_tokens
    must_go_on = request.sampling.ignore_eos and not request.sampling.stop and not request.sampling.stop_token_ids
    return Cost(prompt, answer, answer if must_go_on else 1)
