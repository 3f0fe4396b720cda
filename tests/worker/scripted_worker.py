"""A real worker process around the scripted engine: ``python -m tests.worker.scripted_worker MODEL URL [options]``.

It stands in for the engine's package so that torch is not loaded: the worker speaks to the narrow interface alone, and
processes start in a fraction of the time.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from types import ModuleType


def stand_in_for_the_engine() -> None:
    """Make `lamella_engine` a package of plain submodules, whose own ``__init__`` is not run."""
    spec = find_spec("lamella_engine")
    assert spec is not None
    package = ModuleType("lamella_engine")
    package.__path__ = list(spec.submodule_search_locations or ())
    sys.modules["lamella_engine"] = package


def main(model: str, url: str, name: str, slots: str, lease_s: str, drain_s: str, sweep_s: str) -> int:
    stand_in_for_the_engine()

    from lamella_worker.config import load_config
    from lamella_worker.device import pin_device
    from lamella_worker.log_setup import set_up_logging
    from lamella_worker.process import serve_engine
    from tests.worker.scripted_engine import ScriptedEngine

    assert "torch" not in sys.modules
    set_up_logging(is_verbose=False)
    flags: dict[str, object] = {
        "worker.model": model,
        "worker.device": "cpu",
        "worker.name": name,
        "worker.lease_s": float(lease_s),
        "worker.drain_s": float(drain_s),
        "redis.url": url,
        "engine.max_sequences": int(slots),
    }
    config = load_config(None, flags, environ={})
    return serve_engine(ScriptedEngine(int(slots), float(sweep_s)), config, pin_device("cpu"))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
