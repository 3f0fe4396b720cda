"""A real worker process around the scripted engine: ``python -m tests.worker.scripted_worker MODEL URL [options]``.

MODEL may be several, separated by commas. The worker speaks to the narrow interface alone, so torch is not loaded, and
processes start in a fraction of the time. With the isolation ``child`` the scripted engine is in a process of its own
(`scripted_child`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable

from lamella_worker.child_host import ChildHost
from lamella_worker.config import load_config
from lamella_worker.device import pin_device
from lamella_worker.engine_port import EngineHost, ServedModel
from lamella_worker.local_host import LocalHost
from lamella_worker.log_setup import set_up_logging
from lamella_worker.process import WorkerProcess, admitted_models
from lamella_worker.serving import Serving
from lamella_worker.supervisor import EngineSpec
from tests.worker.scripted_child import scripted_command
from tests.worker.scripted_engine import ScriptedEngine, ScriptedSet


def main(
    model: str, url: str, name: str, slots: str, lease_s: str, drain_s: str, sweep_s: str, isolation: str, *more: str
) -> int:
    assert "torch" not in sys.modules
    set_up_logging(is_verbose=False)
    flags: dict[str, object] = {
        "worker.models": tuple(model.split(",")),
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

    def open_host(models: tuple[ServedModel, ...], is_called_off: Callable[[], bool]) -> EngineHost:
        if isolation == "none":
            names = [model.name for model in models]
            return LocalHost(ScriptedSet({name: ScriptedEngine(int(slots), float(sweep_s)) for name in names}))
        spec = EngineSpec(models, config.engine, device.engine_device, scripted_command(float(sweep_s)))
        return ChildHost.open(spec, config.worker, is_called_off)

    serving = Serving(admitted_models(config, config.worker.served), open_host)
    return WorkerProcess(serving, config, device).run()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
