"""Faults on demand, for tests: points where a worker or its engine process hangs, crashes, dawdles or lacks memory.

Owns the environment variable ``LAMELLA_FAILPOINTS`` and its grammar. Several are separated by ``;``, each of the form::

    point=action[@nth][#child][~text]

Points of the engine process (an engine in the worker's own process has none): ``open`` (before the engine opens),
``submit`` (before a sequence is taken) and ``sweep`` (in the sweep thread, before each sweep). With `text`, only
sequences count whose prompt has it: ``submit`` passes over the others, ``sweep`` begins to count when such a sequence
comes. `child` is the number of the engine process, from 0; left out, all of them.

Points of the worker, which know neither `child` nor `text`: ``taken`` (a message has left its queue and is not yet
noted as a delivery), ``claimed`` (the engine does not know the job yet), ``emit`` and ``emitted`` (before and after a
sweep's events are stored), ``end`` and ``ended`` (the same for a sweep that ends a job; the message is not
acknowledged yet).

A point acts the `nth` time it is passed, the first time unless said; with ``@nth+`` also ever after.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

VARIABLE = "LAMELLA_FAILPOINTS"
EXIT_CODE = 3
HANG_S = 600.0  # a hang that nobody ends has an end
SLOW_S = 0.005  # so that a test gets between two sweeps of a tiny model

ENGINE_POINTS = ("open", "submit", "sweep")
WORKER_POINTS = ("taken", "claimed", "emit", "emitted", "end", "ended")

_FORM = re.compile(
    rf"(?P<point>{'|'.join(ENGINE_POINTS + WORKER_POINTS)})=(?P<action>[a-z]+)(@(?P<nth>\d+)(?P<on>\+)?)?"
    r"(#(?P<child>\d+))?(~(?P<text>.+))?"
)


def _hang() -> None:
    threading.Event().wait(HANG_S)


def _slow() -> None:
    threading.Event().wait(SLOW_S)


def _freeze() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)  # every thread, as one that hangs without letting go of the interpreter


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)  # as the kernel does when the host runs out of memory


def _segfault() -> None:
    ctypes.string_at(0)


def _exit() -> None:
    os._exit(EXIT_CODE)


def _oom() -> None:
    raise MemoryError("a failpoint ran out of memory")


def _error() -> None:
    raise ValueError("a failpoint failed")


def _device() -> None:
    raise RuntimeError("CUDA error: an illegal memory access was encountered (a failpoint)")


ACTIONS: dict[str, Callable[[], None]] = {
    "hang": _hang,
    "slow": _slow,
    "freeze": _freeze,
    "kill": _kill,
    "segfault": _segfault,
    "exit": _exit,
    "oom": _oom,
    "error": _error,
    "device": _device,
}


@dataclass
class _Failpoint:
    point: str
    action: str
    nth: int
    goes_on: bool
    child: int | None
    text: str
    passed: int = 0
    is_armed: bool = False

    def is_due(self) -> bool:
        self.passed += 1
        return self.passed == self.nth or (self.goes_on and self.passed > self.nth)


class Failpoints:
    """The failpoints of one process, the `child`-th engine process or (None) a worker; safe to use from any thread.

    Raises:
        ValueError: a failpoint is not of the form above.
    """

    def __init__(self, specification: str, child: int | None) -> None:
        found = [_parse(part) for part in specification.split(";") if part.strip()]
        self._points = [each for each in found if each.child in (None, child)]
        self._lock = threading.Lock()

    @classmethod
    def from_environment(cls, child: int | None, environ: Mapping[str, str] | None = None) -> Failpoints:
        """Those that the environment names for the `child`-th engine process or (None) for the worker."""
        return cls((os.environ if environ is None else environ).get(VARIABLE, ""), child)

    def has(self, point: str) -> bool:
        """Whether anything may happen at `point`."""
        return any(each.point == point for each in self._points)

    def hit(self, point: str, text: str = "") -> None:
        """Pass `point`, with a sequence's prompt where there is one; may raise, hang, or not come back."""
        if not self._points:
            return
        with self._lock:
            if point == "submit":
                self._arm(text)
            due = [each for each in self._points if each.point == point and each.is_armed and each.is_due()]
        for each in due:
            ACTIONS[each.action]()

    def _arm(self, prompt: str) -> None:
        for each in self._points:
            if each.point == "submit":
                each.is_armed = each.text in prompt
            elif each.point == "sweep" and each.text and each.text in prompt:
                each.is_armed, each.passed = True, 0


@cache
def of_worker() -> Failpoints:
    """Return the failpoints of this worker process, read from its environment the first time.

    Raises:
        ValueError: a failpoint is not of the form above.
    """
    return Failpoints.from_environment(None)


def pass_point(point: str) -> None:
    """Pass a point of the worker; may raise, hang, or not come back."""
    of_worker().hit(point)


def _parse(part: str) -> _Failpoint:
    match = _FORM.fullmatch(part.strip())
    if match is None or match["action"] not in ACTIONS or not _fits(match):
        raise ValueError(
            f"{VARIABLE} names {part.strip()!r}; a failpoint is point=action[@nth][#child][~text], with the points "
            f"{', '.join(ENGINE_POINTS)} and (without #child and ~text) {', '.join(WORKER_POINTS)}, and the actions "
            f"{', '.join(ACTIONS)}"
        )
    child = None if match["child"] is None else int(match["child"])
    text = match["text"] or ""
    return _Failpoint(
        match["point"], match["action"], int(match["nth"] or 1), bool(match["on"]), child, text, is_armed=not text
    )


def _fits(match: re.Match[str]) -> bool:
    return match["point"] in ENGINE_POINTS or (match["child"] is None and match["text"] is None)
