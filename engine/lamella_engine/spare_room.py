"""What a budget has left once everything is placed goes to keys and values, and to the tokens of a sweep.

Less than a layer is left, and as much of that as a layer is large: gigabytes on a card that streams a large model. Pure
arithmetic on a plan: `planner` places the layers, `reserve` knows what more tokens cost.
"""

from __future__ import annotations

from dataclasses import replace

from lamella_engine.placement import ModelSizes, Plan, Spending, Use
from lamella_engine.reserve import Reserve, Wishes, enlarge

KEYS_AND_VALUES = "keys and values"
WORKSPACE = "workspace"


def with_spare_room(sizes: ModelSizes, wishes: Wishes, plan: Plan, sweep_limit: int) -> Plan:
    """`plan` with a larger cache and larger sweeps, as far as the device's budget goes and more of them is wished for.

    Args:
        sizes: of the model.
        wishes: as asked for; what was asked for stays as it is.
        plan: with its budgets.
        sweep_limit: tokens of a sweep that are worth having, where they are not asked for.
    """
    spending = plan.ram if plan.vram is None else plan.vram
    had = Reserve(0, plan.kv_tokens, plan.kv_bytes, plan.sweep_tokens, plan.workspace_bytes)
    has = enlarge(sizes, wishes, had, spending.budget - spending.used, sweep_limit)
    now = {KEYS_AND_VALUES: has.kv_bytes, WORKSPACE: has.workspace_bytes}
    spending = Spending(spending.budget, tuple(Use(use.what, now.get(use.what, use.nbytes)) for use in spending.uses))
    return replace(
        plan,
        kv_tokens=has.kv_tokens,
        kv_bytes=has.kv_bytes,
        sweep_tokens=has.sweep_tokens,
        workspace_bytes=has.workspace_bytes,
        vram=plan.vram if plan.vram is None else spending,
        ram=spending if plan.vram is None else plan.ram,
    )
