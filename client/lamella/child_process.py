"""Child processes that do not outlive this one: the embedded server and the workers of `lamella up`.

Owns how a child is started (in a session of its own, so that Ctrl-C in a terminal reaches only the parent, and, on
Linux, with a signal from the kernel when the parent dies) and how it is stopped within a deadline.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import IO

from lamella.errors import LamellaError

# The signal is set by a tiny launcher that then becomes the child (it survives exec). Setting it between fork and exec
# instead would run Python code in a fork of a process with threads. If the parent is already gone, it goes too.
_LAUNCHER = (
    "import ctypes, os, sys\n"
    "ctypes.CDLL(None).prctl(1, int(sys.argv[1]), 0, 0, 0)\n"
    "if os.getppid() != int(sys.argv[2]): sys.exit(1)\n"
    "os.execv(sys.argv[3], sys.argv[3:])\n"
)


def start_child(
    command: Sequence[str],
    *,
    death_signal: signal.Signals,
    output: IO[bytes] | None = None,
    environment: Mapping[str, str] | None = None,
) -> subprocess.Popen[bytes]:
    """Start `command` (an absolute program path and its arguments); it gets `death_signal` when this process dies.

    `output` takes both stdout and stderr; None leaves them as they are here. `environment` adds to this one's.
    Off Linux there is no such signal: the next start then finds the orphan (see `embedded`).

    Raises:
        LamellaError: not called from the main thread, whose end is what the kernel would take for the parent's.
    """
    launched = list(command)
    if sys.platform == "linux":
        if threading.current_thread() is not threading.main_thread():
            raise LamellaError(
                "a server or worker must be started from the main thread: the kernel ends it together with the thread "
                "that started it. Start it in the main thread and use it from any."
            )
        death = [str(int(death_signal)), str(os.getpid())]
        launched = [sys.executable, "-I", "-S", "-c", _LAUNCHER, *death, *command]
    return subprocess.Popen(
        launched,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT if output is not None else None,
        env={**os.environ, **environment} if environment else None,
        start_new_session=True,
    )


def stop_child(process: subprocess.Popen[bytes], grace_s: float) -> bool:
    """Ask a child to end (SIGTERM), and kill it if it has not after `grace_s`; return whether it ended by itself."""
    if process.poll() is not None:
        return True
    process.terminate()
    try:
        process.wait(timeout=grace_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(timeout=10.0)
        return False
    return True
