"""A real worker whose engine has no weights and writes the time into every token.

    python -m benchmarks.stamped_worker worker URL NAME SLOTS SWEEP_S

What a token's text says is the monotonic clock (ns) at which the engine's sweep made it, so whoever receives it on the
same machine knows how long it was under way. All between is the real thing: the engine's process, its pipe, publisher,
scripts, streams. Neighbour: `latency`, which starts it and reads the stamps.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable

from lamella_engine.progress import Progress
from lamella_engine.sequence_types import SequenceEvent, SequenceTokens
from lamella_worker import engine_child
from lamella_worker.child_host import ChildHost
from lamella_worker.config import load_config
from lamella_worker.device import pin_device
from lamella_worker.engine_messages import Open
from lamella_worker.engine_port import EngineHost, EngineSet, ServedModel
from lamella_worker.log_setup import set_up_logging
from lamella_worker.process import WorkerProcess, admitted_models
from lamella_worker.serving import Serving
from lamella_worker.supervisor import EngineSpec
from tests.worker.scripted_engine import ScriptedEngine, ScriptedSet

MODEL = "stamped"


class StampingEngine(ScriptedEngine):
    """The scripted engine, whose tokens say when they were made."""

    def _sweep(self) -> list[SequenceEvent]:
        events = super()._sweep()
        stamp = f"{time.monotonic_ns()} "
        return [
            dataclasses.replace(event, text=stamp) if isinstance(event, SequenceTokens) else event for event in events
        ]


def engine(sweep_s: str, *arguments: str) -> int:
    """Be the engine's process."""

    def opener(order: Open, progress: Progress) -> EngineSet:
        names = [model.name for model in order.models]
        return ScriptedSet({name: StampingEngine(order.engine.max_sequences, float(sweep_s)) for name in names})

    return engine_child.main(arguments, opener)


def worker(url: str, name: str, slots: str, sweep_s: str) -> int:
    """Be the worker."""
    set_up_logging(is_verbose=False)
    flags: dict[str, object] = {
        "worker.models": (MODEL,),
        "worker.device": "cpu",
        "worker.name": name,
        "redis.url": url,
        "engine.max_sequences": int(slots),
    }
    config, device = load_config(None, flags, environ={}), pin_device("cpu")
    command = (sys.executable, "-m", "benchmarks.stamped_worker", "engine", sweep_s)

    def open_host(models: tuple[ServedModel, ...], is_called_off: Callable[[], bool]) -> EngineHost:
        spec = EngineSpec(models, config.engine, device.engine_device, command)
        return ChildHost.open(spec, config.worker, is_called_off)

    serving = Serving(admitted_models(config, config.worker.served), open_host)
    return WorkerProcess(serving, config, device).run()


if __name__ == "__main__":
    sys.exit(engine(*sys.argv[2:]) if sys.argv[1] == "engine" else worker(*sys.argv[2:]))
