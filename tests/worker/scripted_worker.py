"""A real worker process around the scripted engine: ``python -m tests.worker.scripted_worker MODEL URL [options]``.

The worker speaks to the narrow interface alone, so torch is not loaded, and processes start in a fraction of the time.
With the isolation ``child`` the scripted engine is in a process of its own (`scripted_child`).
"""

from __future__ import annotations

import sys

from lamella_worker.child_engine import ChildEngine
from lamella_worker.config import load_config
from lamella_worker.device import pin_device
from lamella_worker.log_setup import set_up_logging
from lamella_worker.process import serve_engine
from lamella_worker.supervisor import EngineSpec
from tests.worker.scripted_child import scripted_command
from tests.worker.scripted_engine import ScriptedEngine


def main(
    model: str, url: str, name: str, slots: str, lease_s: str, drain_s: str, sweep_s: str, isolation: str, *more: str
) -> int:
    assert "torch" not in sys.modules
    set_up_logging(is_verbose=False)
    flags: dict[str, object] = {
        "worker.model": model,
        "worker.device": "cpu",
        "worker.name": name,
        "worker.lease_s": float(lease_s),
        "worker.drain_s": float(drain_s),
        "redis.url": url,
        "worker.isolation": isolation,
        "engine.max_sequences": int(slots),
    }
    for setting in more:
        key, _, value = setting.partition("=")
        flags[key] = float(value) if "." in value else int(value)
    config = load_config(None, flags, environ={})
    device = pin_device("cpu")
    if isolation == "none":
        return serve_engine(ScriptedEngine(int(slots), float(sweep_s)), config, device)
    spec = EngineSpec(model, config.engine, device.engine_device, scripted_command(float(sweep_s)))
    return serve_engine(ChildEngine.open(spec, config.worker), config, device)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
