"""Builds the wheel and proves what it holds: four top-level packages, and a client that works with nothing else.

The wheel is installed alone (base dependencies only) in an empty virtual environment; there ``import lamella`` and
``lamella --help`` must work, and neither torch nor celery may be there or be asked for. Neighbours: `Makefile`
(``make wheel``) and CI.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"lamella", "lamella_gateway", "lamella_engine", "lamella_worker"}
STEP_TIMEOUT_S = 300.0

_PROBE = """
import importlib.util, sys
import lamella
loaded = {name.split(".")[0] for name in sys.modules}
present = [name for name in ("torch", "celery", "transformers") if name in loaded or importlib.util.find_spec(name)]
sys.exit(f"{present} came with the base install" if present else 0)
"""


class WheelError(Exception):
    """The wheel is not as promised; the message says in what."""


def build(directory: Path) -> Path:
    """Build the wheel of this checkout into `directory`, in place of an older one, and return its path."""
    for old in directory.glob("lamella-*.whl"):
        old.unlink()
    _run(sys.executable, "-m", "pip", "wheel", *_QUIET, "--no-deps", "--wheel-dir", str(directory), str(ROOT))
    (wheel,) = directory.glob("lamella-*.whl")
    return wheel


def check_contents(wheel: Path) -> None:
    """Check the wheel's top level, its scripts on the wire, the text that ships, the page, type markers and licence.

    Raises:
        WheelError: something is missing or too much.
    """
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    top = {name.split("/")[0] for name in names}
    extra = {name for name in top - PACKAGES if not name.endswith(".dist-info")}
    if extra or not top >= PACKAGES:
        raise WheelError(f"{wheel.name} has {sorted(top)} at its top level where {sorted(PACKAGES)} are expected")
    needed = [f"lamella/lua/{path.name}" for path in (ROOT / "client/lamella/lua").glob("*.lua")]
    needed += [f"{package}/py.typed" for package in PACKAGES]
    needed += [f"lamella_engine/texts/{path.name}" for path in (ROOT / "engine/lamella_engine/texts").glob("*.*")]
    needed += [f"lamella_gateway/ui/{path.name}" for path in (ROOT / "client/lamella_gateway/ui").iterdir()]
    if missing := sorted(set(needed) - set(names)):
        raise WheelError(f"{wheel.name} lacks {missing}")
    if not any(name.endswith("/LICENSE") for name in names):
        raise WheelError(f"{wheel.name} carries no licence")


def check_alone(wheel: Path, environment: Path) -> None:
    """Install the wheel with its base dependencies in a new virtual environment and use it there.

    Raises:
        WheelError: the client does not work there, or heavy packages came with it.
    """
    venv.create(environment, with_pip=True)
    python = str(environment / "bin" / "python")
    _run(python, "-m", "pip", "install", *_QUIET, "--constraint", str(ROOT / "constraints.txt"), str(wheel))
    _run(python, "-c", _PROBE, cwd=environment)
    _run(str(environment / "bin" / "lamella"), "--help", cwd=environment)


_QUIET = ("--quiet", "--disable-pip-version-check", "--no-input")


def _run(*command: str, cwd: Path | None = None) -> None:
    try:
        outcome = subprocess.run(
            command, cwd=cwd, capture_output=True, text=True, timeout=STEP_TIMEOUT_S, check=False, errors="replace"
        )
    except subprocess.TimeoutExpired as error:
        raise WheelError(f"{' '.join(command[:4])} took longer than {STEP_TIMEOUT_S:.0f} s") from error
    if outcome.returncode != 0:
        tail = "\n".join((outcome.stdout + outcome.stderr).strip().splitlines()[-15:])
        raise WheelError(f"{' '.join(command[:4])} ended with {outcome.returncode}:\n{tail}")


def main() -> int:
    """Build into dist/ and check; 1 if the wheel is not as promised."""
    directory = ROOT / "dist"
    scratch = Path(tempfile.mkdtemp(prefix="lamella-wheel-"))
    try:
        wheel = build(directory)
        check_contents(wheel)
        print(f"{wheel.relative_to(ROOT)}: top level and contents as expected")
        check_alone(wheel, scratch / "venv")
        print("installed alone: import lamella works, neither torch nor celery is there")
    except WheelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
