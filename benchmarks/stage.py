"""One measurement in one process of its own: a cap, a crash or a leak of one cannot touch the next.

Owns both ends: `run_stage` starts the process, passes its progress on, ends it at its deadline and returns what it
had written until then; `main` is the process. A measurement is a generator that yields all it knows so far.
Neighbours: `sweep` runs stages; `calibrate`, `peers` and `lamella_run` are what runs in them.
"""

from __future__ import annotations

import collections
import contextlib
import importlib
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from benchmarks.json_file import read_json, write_json
from benchmarks.machine import Bystanders

ROOT = Path(__file__).resolve().parent.parent
PROGRESS = "progress: "  # lines of a stage that start so are shown; the others only go to its log
END_S = 10.0  # to end after SIGTERM
_TAIL_LINES = 25


def say(text: str) -> None:
    """Show a line of progress from inside a stage."""
    print(f"{PROGRESS}{text}", flush=True)


def run_stage(name: str, kind: str, spec: dict[str, Any], work_dir: Path, deadline_s: float) -> dict[str, Any]:
    """Run the measurement `kind` with `spec` and return its report; never raises for what goes wrong inside.

    The report carries `wall_s`, `others_busy_cores` (what other programs took of the machine), and `error` (with the
    log's end in `log_tail`) where it failed or did not end within `deadline_s`; what was measured till then is kept.
    """
    work_dir.mkdir(parents=True, exist_ok=True)
    spec_path, out_path, log_path = (work_dir / f"{name}.{end}" for end in ("spec.json", "out.json", "log"))
    write_json(spec_path, spec)
    out_path.unlink(missing_ok=True)
    began, bystanders = time.perf_counter(), Bystanders()
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.stage", kind, str(spec_path), str(out_path)],
        cwd=ROOT,
        env=os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONPATH": _python_path()},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # so that what it starts ends with it
    )
    tail: collections.deque[str] = collections.deque(maxlen=_TAIL_LINES)
    assert process.stdout is not None
    pump = threading.Thread(target=_pump, args=(name, process.stdout, log_path, tail), daemon=True)
    pump.start()
    error = None
    try:
        process.wait(timeout=deadline_s)
    except subprocess.TimeoutExpired:
        error = f"did not end within {deadline_s:.3g} s"
    finally:
        _end(process)
        pump.join(timeout=END_S)
        process.stdout.close()
    report = read_json(out_path) if out_path.is_file() else {}
    if error is None and process.returncode != 0 and "error" not in report:
        error = _ending(process.returncode)
    if error is not None:
        report["error"] = error
    if "error" in report:
        report["log_tail"] = list(tail)
    wall_s = round(time.perf_counter() - began, 2)
    return report | {"wall_s": wall_s, "others_busy_cores": bystanders.busy_cores()}


def _python_path() -> str:
    return os.pathsep.join(part for part in (str(ROOT), os.environ.get("PYTHONPATH", "")) if part)


def _pump(name: str, stream: IO[str], log_path: Path, tail: collections.deque[str]) -> None:
    with log_path.open("w") as log, contextlib.suppress(ValueError):  # closed by the owner if a grandchild holds on
        for line in stream:
            log.write(line)
            if line.startswith(PROGRESS):
                print(f"    {name}: {line.removeprefix(PROGRESS).rstrip()}", file=sys.stderr, flush=True)
            else:
                tail.append(line.rstrip()[-300:])


def _end(process: subprocess.Popen[str]) -> None:
    """End the process and whatever it started; nothing of its group is left."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=END_S)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(timeout=END_S)


def _ending(returncode: int) -> str:
    if returncode < 0:
        name = signal.Signals(-returncode).name
        hint = "; the system may have run out of memory" if name == "SIGKILL" else ""
        return f"ended by {name}{hint}"
    return f"ended with exit code {returncode} and no report"


def _measurement(kind: str, spec: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The generator of a kind; modules are loaded only here, since each pulls in what the others must not pay for."""
    if kind == "calibrate":
        from benchmarks.calibrate import calibrate

        return calibrate(spec)
    if kind == "lamella":
        from benchmarks.lamella_run import measure_lamella

        return measure_lamella(spec)
    if kind == "shards":
        from benchmarks.lamella_run import build_shards

        return build_shards(spec)
    _check_installed(kind)
    if kind == "margins":
        from benchmarks.peers import measure_margins

        return measure_margins(spec)
    from benchmarks.peers import measure_peer

    return measure_peer(kind, spec)


def _check_installed(kind: str) -> None:
    """Load the package a peer stands on before anything else, so that a missing one is told at once.

    Raises:
        ImportError: it is not there, or does not load.
    """
    package = kind.partition("-")[0]
    if package not in ("airllm", "accelerate"):
        return
    try:
        importlib.import_module(package)
    except ImportError as error:
        raise ImportError(f"{package} cannot be loaded ({error}); pip install 'lamella[bench]' brings it") from error


def main(arguments: list[str]) -> int:
    """Run the measurement `arguments[0]` with the spec in `arguments[1]`, writing to `arguments[2]`; 1 on failure."""
    kind, spec_path, out_path = arguments[0], Path(arguments[1]), Path(arguments[2])
    report: dict[str, Any] = {}
    try:
        for report in _measurement(kind, read_json(spec_path)):
            write_json(out_path, report)
    except Exception as error:  # noqa: BLE001 - becomes the stage's reported failure
        traceback.print_exc()
        write_json(out_path, report | {"error": f"{type(error).__name__}: {error}"[:2000]})
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
