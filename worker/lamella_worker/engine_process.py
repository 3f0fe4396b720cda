"""One engine process as the worker sees it: started, spoken to, ended; never started twice.

Owns the process, its channel, and the two threads that read and write there, so that no caller ever waits for it.
`supervisor` makes one after the other; `engine_child` is what runs in it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence

from lamella.key_ring import KEYS_VARIABLE
from lamella.secret_sources import SERVER_VARIABLES
from lamella_worker.channel import Channel, ChannelBroken
from lamella_worker.engine_messages import Close, Open, Order, Report, decode_report, encode
from lamella_worker.engine_port import EngineAway
from lamella_worker.log_setup import current_labels

NOT_FOR_ENGINES = (*SERVER_VARIABLES, KEYS_VARIABLE)  # an engine speaks to no server and opens no box
log = logging.getLogger(__name__)

COMMAND = (sys.executable, "-m", "lamella_worker.engine_child")
MAX_ORDERS = 16_384  # on their way to it: a few for each sequence it may run
KILL_S = 30.0  # for the kernel to end a killed process; one that is stuck in a driver may stay
_LOOK_S = 0.5

Hear = Callable[["EngineProcess", Report], None]


class EngineStuck(Exception):
    """A killed engine process does not end, so its device and memory are not to be had."""


class EngineProcess:
    """A running engine process.

    Its end is tied to the thread that makes it (on Linux), which must live as long as it does.

    Args:
        order: what it is to open.
        hear: called with this process and each report, in one thread.
        command: the program, to which its four arguments are added.
    """

    def __init__(
        self, order: Open, hear: Callable[[EngineProcess, Report], None], command: Sequence[str] = COMMAND
    ) -> None:
        self.has_ended = threading.Event()  # its end of the channel is closed, or cannot be understood
        self._hear = hear
        self._orders: queue.Queue[Order | None] = queue.Queue(maxsize=MAX_ORDERS)
        ours, theirs = socket.socketpair()
        level = str(logging.getLogger().getEffectiveLevel())
        try:
            self._process = subprocess.Popen(
                [*command, str(theirs.fileno()), str(os.getpid()), level, current_labels().encoded()],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                env={name: value for name, value in os.environ.items() if name not in NOT_FOR_ENGINES},
                start_new_session=True,  # an interrupt from a terminal is for the worker; and all of it can be killed
            )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        self.pid = self._process.pid
        self._channel = Channel(ours)
        self._threads = [
            threading.Thread(target=work, name=name, daemon=True)
            for name, work in (("engine-writer", self._write), ("engine-reader", self._read))
        ]
        for thread in self._threads:
            thread.start()
        self.tell(order)

    def tell(self, order: Order) -> None:
        """Send an order; never waits.

        Raises:
            EngineAway: it takes no orders any more.
        """
        if self.has_ended.is_set():
            raise EngineAway("the engine process has ended")
        try:
            self._orders.put_nowait(order)
        except queue.Full as error:
            raise EngineAway(f"{MAX_ORDERS} orders wait for the engine process already") from error

    def end(self, grace_s: float) -> int:
        """Ask it to close, kill it if it has not ended after `grace_s` seconds; returns its exit code.

        Raises:
            EngineStuck: it does not end even then.
        """
        if grace_s > 0:
            with contextlib.suppress(EngineAway, subprocess.TimeoutExpired):
                self.tell(Close())
                self._process.wait(grace_s)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)  # what it started itself goes too
        try:
            code = self._process.wait(KILL_S)
        except subprocess.TimeoutExpired as error:
            raise EngineStuck(
                f"the engine process {self.pid} was killed and does not end; a driver may hold it. "
                "Look at the kernel's log; the host may need a restart"
            ) from error
        self._orders_end()
        for thread in self._threads:
            thread.join(KILL_S)
        self._channel.close()
        return code

    def wait(self, timeout_s: float) -> int | None:
        """Wait for it to end by itself; its exit code, or None."""
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None

    def _orders_end(self) -> None:
        self.has_ended.set()
        with contextlib.suppress(queue.Full):
            self._orders.put_nowait(None)

    def _write(self) -> None:
        while not self.has_ended.is_set():
            try:
                order = self._orders.get(timeout=_LOOK_S)
            except queue.Empty:
                continue
            if order is None:
                return
            try:
                self._channel.send(encode(order))
            except ChannelBroken as error:
                log.debug("engine process %d takes no orders: %s", self.pid, error)
                return

    def _read(self) -> None:
        try:
            while (frame := self._channel.receive()) is not None:
                self._hear(self, decode_report(frame))
        except ChannelBroken as error:
            log.error("engine process %d cannot be understood: %s", self.pid, error)
        finally:
            self.has_ended.set()
