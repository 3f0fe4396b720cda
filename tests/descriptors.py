"""Which files this process holds open, for tests that must not look at what other tests hold."""

from __future__ import annotations

import os
from pathlib import Path


def open_files_below(directory: Path) -> list[str]:
    """Paths of files at or below `directory` that this process has open; empty where the kernel does not tell."""
    root = os.path.realpath(directory)
    found = []
    for entry in _descriptors():
        try:
            target = os.readlink(entry)
        except OSError:
            continue  # closed meanwhile
        if target.startswith(root + os.sep):
            found.append(target)
    return found


def _descriptors() -> list[Path]:
    table = Path("/proc/self/fd")
    return list(table.iterdir()) if table.is_dir() else []
