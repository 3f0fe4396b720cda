"""Why a job was not accepted, in words: what is full, since when to try again, what else would help.

Owns the errors of a submit that the registry refused; what is refused is decided in ``lua/submit.lua``. Neighbours:
`operations` (raises them), `limits` (which an operator sets).
"""

from __future__ import annotations

from lamella.errors import DeadlineHopeless, LamellaError, QueueFull, UserLimitReached
from lamella.queue_terms import QueueTerms
from lamella.registry_calls import SubmitReply, SubmitStatus


def refusal(reply: SubmitReply, model: str, terms: QueueTerms) -> LamellaError:
    """Return the error for a submit that was refused for what waits already; nothing was stored."""
    again = f"nothing was stored. Try again in {reply.retry_after_s:.0f} s"
    match reply.status:
        case SubmitStatus.USER_FULL:
            return UserLimitReached(
                f"{reply.queued} jobs of user {terms.user!r} wait for {model!r}, and {reply.limit} may; {again}, "
                "cancel some, or have `lamella limits` raised.",
                reply.retry_after_s,
            )
        case SubmitStatus.USER_TOKENS:
            return UserLimitReached(
                f"the jobs of user {terms.user!r} at {model!r} take {reply.queued} tokens (prompts and max_tokens), "
                f"and with this one it would be more than {reply.limit}; {again}, ask for a smaller max_tokens, "
                "or have `lamella limits` raised.",
                reply.retry_after_s,
            )
        case SubmitStatus.HOPELESS:
            return DeadlineHopeless(
                f"the deadline of {terms.deadline_s:g} s would pass first: by the jobs that wait for {model!r} and the "
                f"tokens/s measured, the job would need about {reply.estimate_s:.0f} s even to begin to answer, or to "
                "bring the tokens it must. Nothing was stored; give more time, a higher priority or a smaller "
                "max_tokens, or start more workers.",
                reply.estimate_s,
                reply.retry_after_s,
            )
        case _:
            return QueueFull(
                f"the queue of {model!r} holds {reply.queued} jobs, and {reply.limit} may wait; {again}, start more "
                "workers for the model, or raise `lamella limits --model-queued`.",
                reply.retry_after_s,
            )
