"""What worker and engine process say to each other arrives as it was said, and nothing else is taken for it."""

from __future__ import annotations

import math
import socket
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from lamella_engine.sequence_types import (
    EngineCounters,
    EngineFacts,
    FinishReason,
    Sampling,
    SequenceFinished,
    SequencePrefill,
    SequenceRequest,
    SequenceTokens,
    TokenLogprobs,
)
from lamella_worker import channel as channel_module
from lamella_worker.channel import Channel, ChannelBroken
from lamella_worker.config import EngineTable
from lamella_worker.engine_messages import (
    Answer,
    Beat,
    Broken,
    Cancel,
    Close,
    Open,
    Opened,
    Order,
    Progress,
    Refused,
    Report,
    Submit,
    Sweep,
    Taken,
    decode_order,
    decode_report,
    encode,
    plain,
)
from lamella_worker.engine_port import ServedModel

COUNTERS = EngineCounters(
    running=1, waiting=2, sweeps=3, tokens=4, streamed_bytes=5, peak_rss_bytes=6, last_sweep_at=7.5, read_s=0.25,
    out_of_memory=1, batch_limit=4,
)  # fmt: skip
REQUEST = SequenceRequest(
    "job.1",
    Sampling(max_tokens=3, temperature=0.5, top_k=4, seed=2**63 - 1, stop=("\n", "Ω"), logprobs=2, ignore_eos=True),
    messages=(("system", "a"), ("user", "こんにちは 🍎")),
    generated_ids=(1, 2, 3),
)
EVENTS = (
    SequencePrefill("a", 5, 10),
    SequenceTokens("b", 7, (1, 2), "text", (TokenLogprobs(1, -math.inf, ((1, -0.5), (2, -math.inf))),), sample=1),
    SequenceFinished("c", FinishReason.ERROR, 1, 2, 3, 4, 0.5, "engine", "why"),
    SequenceFinished("d", FinishReason.LENGTH, 1, 2, 3, 4, 0.5),
)
ORDERS: list[Order] = [
    Open(
        (ServedModel("owner/name", "owner/name@abcdef0", 2.0), ServedModel("b", "b")),
        EngineTable(store=Path("/a b"), shared_memory=Path("/s"), kv_tokens=64),
        "cuda:0",
        3,
    ),
    Submit("b", 1, REQUEST),
    Submit("b", 2, replace(REQUEST, messages=None, prompt_ids=(9, 8))),
    Cancel("b", "job.1"),
    Taken("b"),
    Close(),
]
REPORTS: list[Report] = [
    Progress("build", 1, 2),
    Opened({"b": EngineFacts("m", "llama", "float32", "cpu", 4, 512, 1 << 40, 8)}),
    Refused("no", True),
    Answer("b", 1),
    Answer("b", 2, "prompt_too_long", "shorten it"),
    Sweep("b", EVENTS, COUNTERS),
    Beat("b", COUNTERS, True),
    Broken("gone"),
]


@pytest.fixture
def ends() -> Iterator[tuple[Channel, Channel]]:
    left, right = (Channel(end) for end in socket.socketpair())
    yield left, right
    left.close()
    right.close()


@pytest.mark.parametrize("order", ORDERS, ids=lambda order: order.kind)
def test_an_order_arrives_as_it_was_given(order: Order) -> None:
    assert decode_order(encode(order)) == order


@pytest.mark.parametrize("report", REPORTS, ids=lambda report: report.kind)
def test_a_report_arrives_as_it_was_made(report: Report) -> None:
    arrived = decode_report(encode(report))

    assert arrived == report
    assert type(arrived) is type(report)


@pytest.mark.parametrize("frame", [b"", b"junk", b"[]", b"{}", b'{"kind": "explode"}', b'{"kind": "cancel"}', b"\xff"])
def test_what_is_no_message_is_refused(frame: bytes) -> None:
    with pytest.raises(ChannelBroken, match="not an order"):
        decode_order(frame)
    with pytest.raises(ChannelBroken, match="not a report"):
        decode_report(frame)


def test_an_error_that_quotes_no_text_can_still_be_told() -> None:
    broken = Broken(plain("cannot read '/data/\udcff'"))

    assert decode_report(encode(broken)) == broken


def test_frames_arrive_whole_and_in_order_from_many_threads(ends: tuple[Channel, Channel]) -> None:
    frames = [bytes([number]) * (number * 20_000) for number in range(1, 30)]
    threads = [threading.Thread(target=ends[0].send, args=(frame,)) for frame in frames]

    for thread in threads:
        thread.start()
    arrived = [ends[1].receive() for _ in frames]

    for thread in threads:
        thread.join(40)
    assert sorted(arrived) == sorted(frames)


def test_the_end_of_the_other_side_ends_reading_and_writing(ends: tuple[Channel, Channel]) -> None:
    ends[0].send(b"last")

    ends[0].close()

    assert ends[1].receive() == b"last"
    assert ends[1].receive() is None
    with pytest.raises(ChannelBroken, match="the other side is gone"):
        ends[1].send(b"x" * 1_000_000)


def test_closing_wakes_a_thread_that_reads_here(ends: tuple[Channel, Channel]) -> None:
    seen: list[bytes | None] = []
    reader = threading.Thread(target=lambda: seen.append(ends[0].receive()))
    reader.start()

    ends[0].close()

    reader.join(40)
    assert seen == [None]


def test_a_frame_beyond_the_bound_is_neither_sent_nor_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    left, right = socket.socketpair()
    channel = Channel(left)
    monkeypatch.setattr(channel_module, "MAX_FRAME_BYTES", 100)

    with pytest.raises(ChannelBroken, match="101 bytes is more than the bound"):
        channel.send(b"x" * 101)
    right.sendall(b"\xff\xff\xff\xff")
    with pytest.raises(ChannelBroken, match="was announced"):
        channel.receive()

    channel.close()
    right.close()
