"""Order, gaps, duplicates and ends of a stream, without any I/O."""

from __future__ import annotations

import pytest

from lamella.errors import DecodeError, JobError, JobNotFound
from lamella.keys import Keys
from lamella.messages import Failed, Progress, TerminalEvent, TokenEvent
from lamella.registry_calls import encode_event
from lamella.stream_order import PAGE, StreamItem, StreamOrder
from tests.client.acting_worker import done, failed, token


def published(seq: int, event: TokenEvent | TerminalEvent) -> str:
    return f"{seq} {encode_event(event)}"


def entries(first: int, *events: TokenEvent | TerminalEvent) -> list[tuple[str, dict[str, str]]]:
    return [(f"{first + i}-0", {"e": encode_event(event)}) for i, event in enumerate(events)]


def running(seq: int) -> list[object]:
    return ["running", str(seq), None]


def ended(seq: int, outcome: TerminalEvent) -> list[object]:
    return ["done", str(seq), encode_event(outcome)]


def caught_up(last: int = 0) -> StreamOrder:
    order = StreamOrder("j1", 0)
    order.stored([running(last), entries(1, *(token("x") for _ in range(last)))])
    return order


def test_starts_behind_and_reads_after_the_last_event_seen() -> None:
    order = StreamOrder("j1", 5)

    assert order.behind
    assert order.stored_commands(Keys()).commands[1][2] == "(5-0"


def test_live_events_in_order_pass() -> None:
    order = caught_up()

    items = order.live(published(1, token("a"))) + order.live(published(2, done()))

    assert items == [StreamItem(1, token("a")), StreamItem(2, done())]
    assert order.ended


def test_duplicates_are_dropped() -> None:
    order = caught_up(2)

    assert order.live(published(2, token("x"))) == []
    assert not order.behind


def test_a_gap_is_filled_from_what_is_stored() -> None:
    order = caught_up(1)

    assert order.live(published(3, token("c"))) == []
    assert order.behind
    items = order.stored([running(3), entries(2, token("b"), token("c"))])

    assert [item.seq for item in items] == [2, 3]
    assert not order.behind


def test_a_full_page_asks_for_the_next_one() -> None:
    order = StreamOrder("j1", 0)

    order.stored([running(PAGE + 1), entries(1, *(token("x") for _ in range(PAGE)))])
    assert order.behind
    order.stored([running(PAGE + 1), entries(PAGE + 1, token("y"))])

    assert (order.behind, order.last) == (False, PAGE + 1)


def test_progress_has_no_number() -> None:
    progress = Progress(prefilled_tokens=3, prompt_tokens=9)

    assert caught_up().live(f"- {progress.model_dump_json()}") == [StreamItem(None, progress)]


def test_a_missing_record_is_not_found() -> None:
    with pytest.raises(JobNotFound):
        StreamOrder("j1", 0).stored([[None, None, None], []])


def test_an_end_whose_stream_is_gone_delivers_the_outcome() -> None:
    order = StreamOrder("j1", 0)

    assert order.stored([ended(7, done()), []]) == [StreamItem(7, done())]
    assert order.ended


def test_an_end_already_seen_is_not_delivered_again() -> None:
    order = StreamOrder("j1", 7)

    assert order.stored([ended(7, failed()), []]) == []
    assert order.ended


def test_events_deleted_behind_our_back_are_an_error() -> None:
    with pytest.raises(JobError, match="events 1 to 2"):
        StreamOrder("j1", 0).stored([running(3), entries(3, token("c"))])
    with pytest.raises(JobError, match="events 1 to 3"):
        StreamOrder("j1", 0).stored([running(3), []])


def test_a_server_that_lost_its_last_second_catches_up() -> None:
    order = StreamOrder("j1", 5)

    assert order.stored([running(3), []]) == []
    assert order.live(published(5, token("again"))) == []
    assert order.live(published(6, token("new"))) == [StreamItem(6, token("new"))]


@pytest.mark.parametrize("message", ["", "x {}", "1", "1 {}", '- {"type":"x"}', "-1 {}"])
def test_a_malformed_message_is_a_decode_error(message: str) -> None:
    with pytest.raises(DecodeError):
        caught_up().live(message)


def test_failed_ends_the_stream() -> None:
    order = caught_up()

    assert isinstance(order.live(published(1, failed()))[0].event, Failed)
    assert order.ended
