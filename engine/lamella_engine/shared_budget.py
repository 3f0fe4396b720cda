"""How several models share one machine: budgets divided between them so that their sweeps take the fewest seconds.

Pure, like `planner`, which it asks. Every model first gets what it cannot do without (its ring, its workspace, a useful
key-value cache, room for a layer). What is left is shared evenly, none getting more than makes it faster; then it moves
from one to another where that saves most seconds by the planner's own prediction, each model's measured against what
its sweep took with the even share: turns are shared by time, so that is what its tokens cost. `engine_group` opens the
models by the plans.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Literal

from lamella_engine.byte_size import byte_size
from lamella_engine.errors import PlanError
from lamella_engine.estimate import predict
from lamella_engine.placement import ModelSizes, Plan
from lamella_engine.planner import PlanRequest, make_plan

SMALLEST_MOVE = 32  # what is left moves in parts down to this one of it
WORTH = 0.95  # a move must bring the seconds of all sweeps, in those of the even shares, down to this part
_GRAIN = 256  # how finely the most that a model can use is searched for
_ROUNDS = 2  # what is kept in host memory depends on what the device holds, and the other way round
_MIB = 1024**2

Option = Literal["ram", "vram"]


@dataclass(frozen=True)
class Claim:
    """One model that wants a part: its sizes, and the request that it would plan with if all were its own."""

    sizes: ModelSizes
    request: PlanRequest


def share_budgets(claims: Sequence[Claim]) -> list[Plan]:
    """A plan for each claim; together they keep within the budgets, which all requests name alike.

    Raises:
        PlanError: what they cannot do without is more than there is; says for each how much that is.
    """
    ram, vram = claims[0].request.ram, claims[0].request.vram
    assert all((claim.request.ram, claim.request.vram) == (ram, vram) for claim in claims), "one machine, one budget"
    if len(claims) > 1 and vram is not None:
        claims = _divided(claims, "vram", vram)
    if len(claims) > 1 and ram:
        claims = _divided(claims, "ram", ram)
        for _ in range(_ROUNDS if vram is not None else 0):
            claims = _improved(claims, ram, vram or 0)
    return [make_plan(claim.sizes, claim.request) for claim in claims]


def _improved(claims: Sequence[Claim], ram: int, vram: int) -> Sequence[Claim]:
    """The device divided anew for these parts of the host's memory, then the host's anew, where that is faster."""
    try:
        again = _divided(_divided(claims, "vram", vram), "ram", ram)
    except PlanError:
        return claims
    return min(claims, again, key=lambda found: sum(map(_seconds, found)))


def _seconds(claim: Claim) -> float:
    """What a decoding sweep of all its sequences takes; infinity where there is no plan."""
    try:
        plan = make_plan(claim.sizes, claim.request)
    except PlanError:
        return math.inf
    return predict(claim.sizes, plan, claim.request.bandwidths, claim.request.max_sequences).seconds


def _divided(claims: Sequence[Claim], option: Option, total: int) -> list[Claim]:
    """The claims with `total` bytes of one budget divided between them, and of the other what they have."""

    @cache
    def seconds(number: int, part: int) -> float:
        return _seconds(_with(claims[number], option, part))

    parts = [_least(claim, option) for claim in claims]
    if sum(parts) > total:
        raise _refusal(claims, parts, total, option)
    left = total - sum(parts)
    needs = [_need(part, left, partial(seconds, number)) for number, part in enumerate(parts)]
    parts = _moved(_filled(parts, needs, left), parts, left, seconds)
    return [_with(claim, option, part) for claim, part in zip(claims, parts, strict=True)]


def _need(part: int, left: int, seconds: Callable[[int], float]) -> int:
    """The most that a model with `part` bytes could use of `left` more: with further bytes it is no faster."""
    fastest = seconds(part + left)
    low, high = 0, _GRAIN
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if seconds(part + left * middle // _GRAIN) <= fastest else (middle, high)
    return 0 if seconds(part) <= fastest else left * high // _GRAIN


def _filled(parts: Sequence[int], needs: Sequence[int], left: int) -> list[int]:
    """`left` given out evenly, to each no more than it needs; what nobody needs evenly to all, for longer caches."""
    filled, waiting = list(parts), sorted(range(len(parts)), key=lambda number: needs[number])
    for position, number in enumerate(waiting):
        more = min(needs[number], left // (len(waiting) - position))
        filled[number] += more
        left -= more
    return [part + left // len(filled) for part in filled]


def _moved(parts: list[int], least: Sequence[int], left: int, seconds: Callable[[int, int], float]) -> list[int]:
    """The parts after every move from one to another that is worth it, large ones first; none falls below its least."""
    pairs = [(giver, taker) for giver in range(len(parts)) for taker in range(len(parts)) if giver != taker]
    even_s = [seconds(number, part) for number, part in enumerate(parts)]

    def cost(found: Sequence[int]) -> float:
        return sum(seconds(number, part) / even_s[number] for number, part in enumerate(found))

    now, amount = cost(parts), left // 2
    while amount and amount >= left // SMALLEST_MOVE:
        moves = [
            [part + amount * ((number == taker) - (number == giver)) for number, part in enumerate(parts)]
            for giver, taker in pairs
            if parts[giver] - amount >= least[giver]
        ]
        best = min(moves, key=cost, default=parts)
        if cost(best) <= WORTH * now:
            parts, now = best, cost(best)
        else:
            amount //= 2
    return parts


def _with(claim: Claim, option: Option, part: int) -> Claim:
    request = claim.request
    return replace(claim, request=replace(request, ram=part) if option == "ram" else replace(request, vram=part))


def _least(claim: Claim, option: Option) -> int:
    """The least part of a budget with which there is a plan; each refusal tells what it lacks."""
    part = 1
    while True:
        try:
            make_plan(claim.sizes, _with(claim, option, part).request)
        except PlanError as error:
            part += max(1, error.missing_bytes)
        else:
            return part


def _refusal(claims: Sequence[Claim], parts: Sequence[int], total: int, option: Option) -> PlanError:
    each = ", ".join(f"{claim.sizes.name} {byte_size(part)}" for claim, part in zip(claims, parts, strict=True))
    missing = sum(parts) - total
    return PlanError(
        f"{len(claims)} models do not fit a {option} budget of {byte_size(total)} on {claims[0].request.device} "
        f"together: they need at least {each}, so {byte_size(missing)} ({missing:,} bytes) are missing. Give at least "
        f'--{option} "{-(-sum(parts) // _MIB)}MiB", fewer --slots, or serve fewer models on this worker.',
        missing,
    )
