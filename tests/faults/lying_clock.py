"""Runs a module under a wall clock that is wrong: ``python -m tests.faults.lying_clock SHIFT_S MODULE [arguments]``."""

from __future__ import annotations

import runpy
import sys
import time


def shift_clock(shift_s: float) -> None:
    """Let this process believe that it is `shift_s` seconds later (below 0: earlier) than it is."""
    now, now_ns = time.time, time.time_ns
    time.time = lambda: now() + shift_s
    time.time_ns = lambda: now_ns() + int(shift_s * 1e9)


if __name__ == "__main__":
    shift_clock(float(sys.argv[1]))
    sys.argv = sys.argv[2:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
