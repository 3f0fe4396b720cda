"""The engine process: ``python -m lamella_worker.engine_child FD PARENT LEVEL LABELS``, started by the worker alone.

Owns this process: its end with the worker's, its signals, opening the engines, the exit code. It pins no device, the
worker has done so in the environment that both share. It ignores the signals that stop a worker, because a stop is the
worker's to carry out, and a service manager sends them to every process of a service.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence

from lamella.collector import spare_started
from lamella_engine.errors import EngineError
from lamella_engine.progress import Progress as Progressing
from lamella_worker.channel import Channel, ChannelBroken
from lamella_worker.engine_messages import Open, Opened, Progress, Refused, Report, decode_order, encode, plain
from lamella_worker.engine_port import EngineSet
from lamella_worker.engine_server import EngineServer
from lamella_worker.failpoints import Failpoints
from lamella_worker.log_context import ProcessLabels
from lamella_worker.log_setup import adopt_library_logs, set_up_logging
from lamella_worker.worker_error import WorkerError

log = logging.getLogger(__name__)

EXIT_REFUSED = 4
EXIT_BROKEN = 5
REPORT_EVERY_S = 0.25
CLOSE_S = 30.0  # after the worker is gone; a worker that lives has a shorter deadline of its own
_PR_SET_PDEATHSIG = 1

Opener = Callable[[Open, Progressing], EngineSet]


def main(arguments: Sequence[str], opener: Opener | None = None) -> int:
    """Open the engines that the first message orders, and serve them until the worker is done with them."""
    descriptor, parent, level, labels = arguments
    _end_with(int(parent))
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: None)  # not SIG_IGN, which programs started from here would inherit
    faulthandler.enable()
    set_up_logging(is_verbose=int(level) <= logging.DEBUG, labels=ProcessLabels.decoded(labels))
    end = socket.socket(fileno=int(descriptor))
    end.set_inheritable(False)
    channel = Channel(end)
    try:
        return _serve(channel, opener or _open_engines)
    finally:
        channel.close()


def _serve(channel: Channel, opener: Opener) -> int:
    frame = channel.receive()
    order = None if frame is None else decode_order(frame)
    if not isinstance(order, Open):
        return EXIT_REFUSED
    try:
        failpoints = Failpoints.from_environment(order.child)
    except ValueError as error:
        _tell(channel, Refused(str(error), is_out_of_memory=False))
        return EXIT_REFUSED
    try:
        failpoints.hit("open")
        opened = opener(order, _Reporter(channel))
    except WorkerError as error:
        _tell(channel, Refused(plain(str(error)), error.is_out_of_memory))
        return EXIT_REFUSED
    except MemoryError as error:
        names = ", ".join(model.name for model in order.models)
        message = f"cannot serve {names}: the host's memory is too short ({error})"
        _tell(channel, Refused(plain(message), is_out_of_memory=True))
        return EXIT_REFUSED
    if failpoints.has("sweep"):
        for engine in opened.engines.values():
            engine.before_sweep = lambda: failpoints.hit("sweep")
    spare_started()
    try:
        _tell(channel, Opened({name: engine.facts for name, engine in opened.engines.items()}))
        EngineServer(opened.engines, channel, failpoints, _end_broken).serve()
    finally:
        _close(opened)
    return 0


def _open_engines(order: Open, report: Progressing) -> EngineSet:
    from lamella_worker.open_engine import open_engines  # loads torch

    adopt_library_logs()
    return open_engines(order.models, order.engine, order.device, report)


class _Reporter:
    """Tells the worker how far opening is, a few times a second."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._told_at = float("-inf")
        self._phase = ""

    def __call__(self, phase: str, done_bytes: int, total_bytes: int) -> None:
        now = time.monotonic()
        if phase != self._phase or now - self._told_at >= REPORT_EVERY_S:
            self._told_at, self._phase = now, phase
            _tell(self._channel, Progress(phase, done_bytes, total_bytes))


def _tell(channel: Channel, report: Report) -> None:
    try:
        channel.send(encode(report))
    except ChannelBroken as error:
        log.debug("the worker is gone: %s", error)


def _end_with(parent: int) -> None:
    """Let the kernel kill this process when the worker dies; elsewhere the end of the channel must do."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:
        os._exit(0)  # it died before the kernel knew


def _end_broken(why: str) -> None:
    """End at once: closing an engine whose device is lost may hang. What it shared is removed by whoever opens next."""
    log.error("the engine process ends: %s", why)
    logging.shutdown()
    with contextlib.suppress(OSError):
        sys.stderr.flush()
    os._exit(EXIT_BROKEN)


def _close(opened: EngineSet) -> None:
    late = threading.Timer(CLOSE_S, os._exit, (1,))
    late.daemon = True
    late.start()
    try:
        opened.close()
    except EngineError:
        log.exception("the engines did not close in time")
    finally:
        late.cancel()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
