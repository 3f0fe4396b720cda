"""The gate to the engine: many together, or one alone."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from lamella_worker.gate import Gate
from tests.waiting import wait_until


class Visitor:
    """A thread that enters the gate and stays inside until told to leave."""

    def __init__(self, gate: Gate, *, is_alone: bool) -> None:
        self.entered: bool | None = None
        self.called_off = threading.Event()
        self.leave = threading.Event()
        self._gate, self._is_alone = gate, is_alone
        self.thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        with self._gate.pass_through(is_alone=self._is_alone, is_called_off=self.called_off.is_set) as entered:
            self.entered = entered
            if entered:
                self.leave.wait(40)


@contextmanager
def visit(gate: Gate, *, is_alone: bool = False) -> Iterator[Visitor]:
    visitor = Visitor(gate, is_alone=is_alone)
    visitor.thread.start()
    yield visitor
    visitor.called_off.set()
    visitor.leave.set()
    visitor.thread.join(40)
    assert not visitor.thread.is_alive()


def test_many_are_inside_together() -> None:
    gate = Gate()

    with visit(gate) as first, visit(gate) as second:
        wait_until(lambda: first.entered and second.entered)


def test_one_alone_waits_for_all_and_keeps_newcomers_out() -> None:
    gate = Gate()

    with visit(gate) as first:
        wait_until(lambda: first.entered)
        with visit(gate, is_alone=True) as alone, visit(gate) as newcomer:
            assert (alone.entered, newcomer.entered) == (None, None)
            first.leave.set()
            wait_until(lambda: alone.entered)
            assert newcomer.entered is None
            alone.leave.set()
            wait_until(lambda: newcomer.entered)


def test_a_wait_can_be_called_off_and_lets_the_others_go_on() -> None:
    gate = Gate()

    with visit(gate) as first:
        wait_until(lambda: first.entered)
        with visit(gate, is_alone=True) as alone, visit(gate) as newcomer:
            alone.called_off.set()
            wait_until(lambda: alone.entered is False)
            wait_until(lambda: newcomer.entered)
