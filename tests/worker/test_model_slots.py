"""Places of models beside each other: none takes another's, and a queue whose model has enough is left alone."""

from __future__ import annotations

import threading
from contextlib import ExitStack

from lamella_worker.model_slots import ModelSlots, celery_concurrency
from tests.waiting import wait_until


def never() -> bool:
    return False


def test_a_model_has_its_slots_and_no_more() -> None:
    slots = ModelSlots(2)

    with ExitStack() as stack:
        places = [stack.enter_context(slots.place("a", 0.0, never)) for _ in range(3)]
        other = stack.enter_context(slots.place("b", 0.0, never))

    assert (places, other) == ([True, True, False], True)


def test_a_queue_is_left_alone_while_a_message_of_its_model_waits() -> None:
    slots = ModelSlots(1)
    full = slots.full

    with slots.place("owner/a", 0.0, never):
        assert full == []
        with slots.place("owner/a", 0.0, never) as has_place:
            assert (has_place, full) == (False, ["generate.owner/a"])
        assert full == []


def test_who_waits_gets_the_slot_that_becomes_free() -> None:
    slots, got = ModelSlots(1), threading.Event()

    def wait() -> None:
        with slots.place("a", 40.0, never) as has_place:
            if has_place:
                got.set()

    with slots.place("a", 0.0, never):
        thread = threading.Thread(target=wait)
        thread.start()
        wait_until(lambda: slots.full)
        assert not got.is_set()
    thread.join(40)

    assert got.is_set()


def test_a_wait_can_be_called_off() -> None:
    slots = ModelSlots(1)

    with slots.place("a", 0.0, never), slots.place("a", 40.0, lambda: True) as has_place:
        assert not has_place


def test_one_model_has_a_thread_a_slot_and_several_one_more_each() -> None:
    assert (celery_concurrency(8, 1), celery_concurrency(8, 3)) == (8, 27)
