"""A worker process whose models a test changes: ``python -m tests.worker.changing_worker CONFIG real|scripted``.

Each line on its standard input is a list of models, separated by commas, and is answered with a line of JSON. Scripted
engines are in a process of their own; those of a model whose name has ``unknown`` in it cannot be opened.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lamella.client import Client
from lamella.messages import WorkerInfo
from lamella_worker.child_host import ChildHost
from lamella_worker.config import load_config
from lamella_worker.device import pin_device
from lamella_worker.engine_port import EngineHost, ServedModel
from lamella_worker.log_setup import set_up_logging
from lamella_worker.process import WorkerProcess, admitted_models, host_opener
from lamella_worker.serving import Serving
from lamella_worker.supervisor import EngineSpec
from lamella_worker.worker_error import WorkerError
from tests.waiting import wait_until
from tests.worker.scripted_child import scripted_command


@dataclass
class ChangingWorker:
    """Such a process, as a test sees it."""

    name: str
    process: subprocess.Popen[str]
    client: Client

    def info(self) -> WorkerInfo | None:
        return next((worker for worker in self.client.workers() if worker.name == self.name), None)

    def models(self) -> list[str]:
        info = self.info()
        return [] if info is None else [model.name for model in info.served]

    def change(self, *models: str) -> dict[str, object]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(",".join(models) + "\n")
        self.process.stdin.flush()
        answer: dict[str, object] = json.loads(self.process.stdout.readline())
        return answer

    def engines_pid(self) -> int:
        """The engines' process, which a heartbeat says some time after they have opened."""
        return wait_until(self._announced_pid)

    def _announced_pid(self) -> int | None:
        info = self.info()
        return None if info is None or info.engine_process is None else info.engine_process.pid


def main(path: str, kind: str) -> int:
    set_up_logging(is_verbose=False)
    config = load_config(Path(path), {})
    device = pin_device("cpu")

    def open_scripted(models: tuple[ServedModel, ...], is_called_off: Callable[[], bool]) -> EngineHost:
        if unknown := [model.name for model in models if "unknown" in model.name]:
            raise WorkerError(f"cannot serve {unknown[0]}: it is not in the store")
        return ChildHost.open(EngineSpec(models, config.engine, "cpu", scripted_command()), config.worker)

    opener = host_opener(config, device) if kind == "real" else open_scripted
    worker = WorkerProcess(Serving(admitted_models(config, config.worker.served), opener), config, device)

    def obey() -> None:
        for line in sys.stdin:
            change = worker.serve_models([name for name in line.strip().split(",") if name])
            sys.stdout.write(json.dumps(change._asdict()) + "\n")
            sys.stdout.flush()

    threading.Thread(target=obey, daemon=True).start()
    return worker.run()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
