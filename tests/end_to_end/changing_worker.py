"""A real worker whose models a test changes while it runs: ``python -m tests.end_to_end.changing_worker CONFIG``.

Each line on its standard input is a list of models, separated by commas, and is answered with a line of JSON.
"""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path

from lamella_worker.config import load_config
from lamella_worker.device import pin_device
from lamella_worker.log_setup import set_up_logging
from lamella_worker.process import WorkerProcess, admitted_models, host_opener
from lamella_worker.serving import Serving


def main(path: str) -> int:
    set_up_logging(is_verbose=False)
    config = load_config(Path(path), {})
    device = pin_device("cpu")
    worker = WorkerProcess(
        Serving(admitted_models(config, config.worker.served), host_opener(config, device)), config, device
    )

    def obey() -> None:
        for line in sys.stdin:
            change = worker.serve_models([name for name in line.strip().split(",") if name])
            sys.stdout.write(json.dumps(change._asdict()) + "\n")
            sys.stdout.flush()

    threading.Thread(target=obey, daemon=True).start()
    return worker.run()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
