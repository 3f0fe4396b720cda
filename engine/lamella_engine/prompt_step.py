"""Whether a prompt that must be read in one step can be, and what to raise where it cannot.

Such a step rides beside one token for everyone else, or alone in a sweep, in the memory of free pages. `engine` asks
before a sequence is taken in, `scheduler` keeps to it; the arithmetic of pages is `state_pool`'s.
"""

from __future__ import annotations

from lamella_engine.errors import SequenceError
from lamella_engine.options import EngineOptions
from lamella_engine.state_pool import StatePool
from lamella_engine.sweep import SweepModel


def step_tokens(model: SweepModel, options: EngineOptions) -> int:
    """Tokens that one step may have beside a token for everyone else."""
    return model.plan.sweep_tokens - options.max_sequences + 1


def check_step(
    prompt_tokens: int, model: SweepModel, pool: object, options: EngineOptions, context_tokens: int
) -> None:
    """Refuse a prompt that neither rides beside others' tokens nor fits the memory alone.

    A family that keeps nothing computes as much again for every later token, beside everyone else: it is never alone.

    Raises:
        SequenceError: ``prompt_too_long``, with the longest that can be read and the options that would do.
    """
    longest = step_tokens(model, options)
    if prompt_tokens <= longest:
        return
    remedy = f"sweep_tokens to {prompt_tokens + options.max_sequences - 1}"
    if isinstance(pool, StatePool) and model.keeps_state:
        needed = pool.capacity_for(prompt_tokens)
        if needed <= model.plan.kv_tokens:
            return
        longest = max(longest, pool.longest_step(context_tokens))
        remedy = f"kv_tokens to {needed}, or {remedy}"
    raise SequenceError(
        "prompt_too_long",
        f"the prompt has {prompt_tokens} tokens; {model.sharded.name} is of a family ({model.family}) that must read "
        f"a prompt in one step, and the memory set aside is enough for {longest} at most. Shorten the prompt, or "
        f"raise an engine option: {remedy}.",
    )
