"""Several models on one device: engines that share a thread, a device context and the budgets, and take turns to sweep.

Owns their opening and closing together, and the loop that gives turns. While one sweeps, the readers and copiers of the
others go on filling their rings, so a turn begins with weights at hand. All compute in one thread, because two teams of
a CPU's threads get in each other's way. `sweep_turns` says who is next, `shared_budget` who gets which memory; a model
that is alone is opened as if there were no groups.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import NamedTuple

import torch

from lamella_engine.budget import parse_budget
from lamella_engine.byte_size import byte_size
from lamella_engine.device import available_host_bytes, total_memory_bytes
from lamella_engine.engine import Engine
from lamella_engine.model_sizes import sizes_of_sharded
from lamella_engine.open_model import Machine, built_for, capped, held_bytes, open_sweep_model, this_machine
from lamella_engine.options import EngineOptions
from lamella_engine.placement import ModelSizes, Plan
from lamella_engine.ram_tier import RamTier
from lamella_engine.shard import ShardedModel
from lamella_engine.shared_budget import Claim, share_budgets
from lamella_engine.sweep import SweepModel
from lamella_engine.sweep_thread import SweepThread
from lamella_engine.sweep_turns import SweepTurns
from lamella_engine.text import load_codec

logger = logging.getLogger(__name__)

_POLL_S = 0.2


class EngineGroup:
    """Open engines by name; open it with `EngineGroup.open`, close it with `close`.

    Attributes:
        engines: one a model, in the order asked for; closed by the group alone.
    """

    def __init__(self, resources: ExitStack) -> None:
        self.engines: dict[str, Engine] = {}
        self._resources = resources
        self._wake = threading.Condition()
        self._stop = threading.Event()
        self._thread: SweepThread | None = None

    @classmethod
    def open(
        cls,
        models: Mapping[str, ShardedModel],
        device: torch.device,
        options: EngineOptions,
        shares: Mapping[str, float] | None = None,
    ) -> EngineGroup:
        """Open `models`, whose shards are at hand, within the budgets of `options`, which are of all together.

        Args:
            models: by the names that they are to be known by.
            device: where all of them compute.
            options: of each; `max_sequences` and the tokens are each model's own.
            shares: of the sweeps' time where several want it; 1.0 for those that are not named.

        Raises:
            PlanError: they do not fit the budgets together.
            ModelError: one cannot run, or its shards cannot be read.
            DeviceError: the device or the host lacks the memory after all.
        """
        group = cls(ExitStack())
        try:
            if len(models) == 1:
                ((name, sharded),) = models.items()
                group._keep(name, Engine.open_sharded(sharded, device, options))
            else:
                group._open_all(models, device, options, shares or {})
        except BaseException:
            group.close()
            raise
        return group

    def close(self) -> None:
        """Stop all sweeps and free everything; live sequences end without an event. Idempotent.

        Raises:
            EngineError: the sweeps do not stop.
        """
        with self._wake:
            self._stop.set()
            self._wake.notify()
        if self._thread is not None:
            self._thread.end()
        self._resources.close()

    def _open_all(
        self,
        models: Mapping[str, ShardedModel],
        device: torch.device,
        options: EngineOptions,
        shares: Mapping[str, float],
    ) -> None:
        thread = self._thread = SweepThread()
        claims = thread.call(lambda: _claims(models.values(), device, options), list.clear)
        plans = share_budgets([Claim(claim.sizes, claim.machine.request(options)) for claim in claims])
        budgets = [plan.vram.budget for plan in plans if plan.vram is not None]
        self._resources.enter_context(capped(device, sum(budgets)))
        for name, claim, plan in zip(models, claims, plans, strict=True):
            logger.info("opening %s with %s", name, _told(plan))
            self._keep(name, self._open_one(claim, plan, options, thread))
        turns = SweepTurns({name: shares.get(name, 1.0) for name in models})
        thread.start(lambda: self._give_turns(turns))

    def _open_one(self, claim: _Claimant, plan: Plan, options: EngineOptions, thread: SweepThread) -> Engine:
        codec = load_codec(claim.sharded.directory)
        machine = claim.machine
        with ExitStack() as undo:
            model = thread.call(
                lambda: open_sweep_model(claim.sharded, options, machine.device, machine, plan), SweepModel.close
            )
            undo.callback(model.close)
            engine = Engine(model, codec, options, thread, self._wake)
            undo.pop_all()
        return engine

    def _keep(self, name: str, engine: Engine) -> None:
        self.engines[name] = engine
        self._resources.callback(engine.close)

    def _give_turns(self, turns: SweepTurns) -> None:
        """Until the group closes: whoever's turn it is sweeps once, and is charged for the time."""
        while not self._stop.is_set():
            name = turns.next([name for name, engine in self.engines.items() if engine.wants_turn])
            if name is None:
                self._wait_for_work()
                continue
            began_s = time.perf_counter()
            try:
                self.engines[name].take_turn()
            except Exception as error:
                logger.exception("the sweeps of %s died", name)
                self.engines[name].fail(error)
            turns.charge(name, time.perf_counter() - began_s)

    def _wait_for_work(self) -> None:
        with self._wake:
            if not (self._stop.is_set() or any(engine.wants_turn for engine in self.engines.values())):
                self._wake.wait(timeout=_POLL_S)


class _Claimant(NamedTuple):
    """A model that is about to be opened, its sizes, and the machine with the budgets of all."""

    sharded: ShardedModel
    sizes: ModelSizes
    machine: Machine


def _claims(models: Iterable[ShardedModel], device: torch.device, options: EngineOptions) -> list[_Claimant]:
    """Each model's sizes, and the machine as it is for that model: lanes are measured on its own files."""
    found: list[_Claimant] = []
    held = 0
    with RamTier(options.shared_memory, pinned=device.type == "cuda") as tier:
        for sharded in models:
            built = built_for(sharded, options, device)
            machine = this_machine(sharded, device, built.model.dtype, options, tier)
            found.append(_Claimant(sharded, sizes_of_sharded(sharded, built), machine))
            held += held_bytes(sharded, tier)
    total = total_memory_bytes(torch.device("cpu"))
    ram = parse_budget(options.ram, total, available_host_bytes() + held, "ram")
    vram = found[0].machine.vram  # as it was before measuring took some of it for the others
    return [claim._replace(machine=replace(claim.machine, ram=ram, vram=vram, is_shared=True)) for claim in found]


def _told(plan: Plan) -> str:
    ram = f"{byte_size(plan.ram.budget)} of RAM"
    return ram if plan.vram is None else f"{byte_size(plan.vram.budget)} of {plan.device} and {ram}"
