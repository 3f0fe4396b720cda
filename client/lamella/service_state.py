"""The note that a running `lamella up` leaves for other commands: where its server is.

Owns one small JSON file, ``service.json`` in the state directory (LAMELLA_STATE_DIR, else ``lamella`` under
XDG_STATE_HOME, else ``~/.local/state/lamella``). A note whose process is gone counts as no note.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

STATE_VARIABLE = "LAMELLA_STATE_DIR"


@dataclass(frozen=True)
class Service:
    """A running service: its server's URL, the process id of `lamella up`, and since when (Unix seconds)."""

    url: str
    pid: int
    started_at: float


def state_dir() -> Path:
    """Return the directory of what must outlive one run: the note and, by default, the server's data."""
    if configured := os.environ.get(STATE_VARIABLE):
        return Path(configured).expanduser().absolute()
    home = os.environ.get("XDG_STATE_HOME")
    return (Path(home) if home else Path("~/.local/state").expanduser()) / "lamella"


def running_service() -> Service | None:
    """Return the running service, or None."""
    try:
        fields = json.loads((state_dir() / "service.json").read_text(encoding="utf-8"))
        service = Service(str(fields["url"]), int(fields["pid"]), float(fields["started_at"]))
        os.kill(service.pid, 0)
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RuntimeError):
        return None
    return service


def announce_service(url: str) -> Service:
    """Write the note for this process; the file is replaced in one step and readable by this user only."""
    service = Service(url, os.getpid(), time.time())
    directory = state_dir()
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    draft = directory / f"service.json.{service.pid}"
    draft.write_text(json.dumps(asdict(service)), encoding="utf-8")
    draft.chmod(0o600)
    draft.replace(directory / "service.json")
    return service


def withdraw_service(service: Service) -> None:
    """Remove the note if it is still ours."""
    if running_service() == service:
        (state_dir() / "service.json").unlink(missing_ok=True)
