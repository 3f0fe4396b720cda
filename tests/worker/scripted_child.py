"""An engine process around the scripted engine: ``python -m tests.worker.scripted_child SWEEP_S ...``."""

from __future__ import annotations

import sys

from lamella_engine.progress import Progress
from lamella_worker import engine_child
from lamella_worker.engine_messages import Open
from lamella_worker.engine_port import EngineSet
from tests.worker.scripted_engine import ScriptedEngine, ScriptedSet


def scripted_command(sweep_s: float = 0.002) -> tuple[str, ...]:
    """What the worker is to start in place of an engine process of its own."""
    return (sys.executable, "-m", "tests.worker.scripted_child", str(sweep_s))


def main(sweep_s: str, *arguments: str) -> int:
    def opener(order: Open, progress: Progress) -> EngineSet:
        progress("build", 1, 2)
        assert "torch" not in sys.modules
        names = [model.name for model in order.models]
        return ScriptedSet({name: ScriptedEngine(order.engine.max_sequences, float(sweep_s)) for name in names})

    return engine_child.main(arguments, opener)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
