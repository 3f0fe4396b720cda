"""Spans of jobs in a session whose engine is a process of its own, kept in memory by OpenTelemetry's own exporter."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
import redis

pytest.importorskip("opentelemetry.sdk", reason="the extra [tracing] is not installed")

from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF

from lamella.keys import Keys
from lamella.messages import GenerateRequest
from lamella.queue_calls import serve_call
from lamella.registry_calls import cancel_call, submit_call
from lamella.tracing import stop_tracing, submission, use_tracing
from lamella_worker.child_engine import ChildEngine
from lamella_worker.child_host import ChildHost
from lamella_worker.config import WorkerConfig
from lamella_worker.job_table import JobTable
from lamella_worker.job_traces import MAX_PREFILL_EVENTS, JobTraces
from lamella_worker.publisher import Publisher
from lamella_worker.registry import Registry
from lamella_worker.session import Session
from tests.client.acting_worker import call
from tests.waiting import wait_until
from tests.worker.conftest import MODEL, Jobs
from tests.worker.driven_engine import Opener


class HostOf:
    """What a host's engines are to a session."""

    def __init__(self, host: ChildHost) -> None:
        self._host = host
        self.wait_ready = host.wait_ready

    def find(self, model: str) -> ChildEngine | None:
        return self._host.engines.get(model)


class Traced:
    """A session around an engine process, and the spans that it and the submits make."""

    def __init__(self, session: Session, engine: ChildEngine, jobs: Jobs, exporter: InMemorySpanExporter) -> None:
        self.session = session
        self.engine = engine
        self.jobs = jobs
        self._exporter = exporter

    def submit(self, job_id: str, prompt: str = "hello", max_tokens: int = 5) -> str | None:
        """Submit under a span, and return the traceparent that goes with the job."""
        with submission("lamella.submit", MODEL) as trace:
            self.jobs.submit(job_id, prompt, max_tokens=max_tokens)
            trace.accepted(job_id, "created")
        return trace.traceparent

    def spans(self, name: str) -> list[ReadableSpan]:
        return [span for span in self._exporter.get_finished_spans() if span.name == f"lamella.{name}"]


@pytest.fixture
def traced(opened: Opener, registry: Registry, config: WorkerConfig, jobs: Jobs) -> Iterator[Traced]:
    exporter = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    use_tracing(provider)
    driven = opened(takes=False)
    watch = JobTraces(provider, MODEL, "w1")
    table = JobTable()
    session = Session(HostOf(driven.host), registry, table, config, "w1", watch)
    publisher = Publisher(driven.engine, table, session.delivery, lambda has_failed: session.give_up(), watch, MODEL)
    publisher.start()
    yield Traced(session, driven.engine, jobs, exporter)
    session.give_up()
    driven.host.close()
    publisher.join(40)
    stop_tracing()
    provider.shutdown()


def test_an_attempt_is_below_the_submit_and_has_its_phases(traced: Traced) -> None:
    trace = traced.submit("j", max_tokens=20)

    traced.session.run("j", trace)

    (submit,), (queue,), (attempt,) = (traced.spans(name) for name in ("submit", "queue", "attempt"))
    (prefill,), (decode,) = traced.spans("prefill"), traced.spans("decode")
    assert {span.context.trace_id for span in (queue, attempt, prefill, decode)} == {submit.context.trace_id}
    assert queue.parent.span_id == attempt.parent.span_id == submit.context.span_id
    assert prefill.parent.span_id == decode.parent.span_id == attempt.context.span_id
    assert attempt.attributes["lamella.job"] == submit.attributes["lamella.job"] == "j"
    assert (attempt.attributes["lamella.outcome"], attempt.attributes["lamella.tokens"]) == ("ended", 20)
    assert [event.attributes["lamella.tokens"] for event in decode.events] == [1, 2, 4, 8, 16]


def test_each_attempt_is_a_span_of_the_same_trace(traced: Traced) -> None:
    trace = traced.submit("j", "crash now")

    for _ in range(2):
        traced.session.run("j", trace)

    attempts = traced.spans("attempt")
    assert [span.attributes["lamella.attempt"] for span in attempts] == [1, 2]
    assert {span.attributes["lamella.outcome"] for span in attempts} == {"attempt_failed"}
    assert all(span.status.status_code.name == "ERROR" for span in attempts)
    assert len({span.context.trace_id for span in attempts}) == len(traced.spans("queue")) == 1


def test_a_long_prompt_is_told_in_few_events(traced: Traced) -> None:
    trace = traced.submit("j", "slow one")
    task = threading.Thread(target=traced.session.run, args=("j", trace))
    task.start()
    wait_until(lambda: traced.engine.counters().sweeps > 2 * MAX_PREFILL_EVENTS)

    traced.session.begin_drain()
    task.join(40)

    (prefill,), (attempt,) = traced.spans("prefill"), traced.spans("attempt")
    assert len(prefill.events) == MAX_PREFILL_EVENTS
    assert attempt.attributes["lamella.outcome"] == "given_back"
    assert traced.spans("decode") == []


@pytest.mark.parametrize("trace", [None, "", "junk", "00-" + "0" * 32 + "-" + "0" * 16 + "-01", "ü" * 55])
def test_a_job_without_a_usable_traceparent_has_no_spans_and_ends_well(traced: Traced, trace: str | None) -> None:
    traced.jobs.submit("j")

    traced.session.run("j", trace)

    assert traced.jobs.state("j").value == "done"
    assert traced.spans("attempt") == []


def test_a_trace_that_its_client_does_not_sample_has_no_spans(traced: Traced) -> None:
    use_tracing(TracerProvider(sampler=ALWAYS_OFF, shutdown_on_exit=False))
    trace = traced.submit("j")

    traced.session.run("j", trace)

    assert trace is not None
    assert int(trace[-2:], 16) & 1 == 0
    assert traced.spans("attempt") == []


def test_the_traceparent_travels_beside_celerys_own_headers(fake_redis: redis.Redis) -> None:
    keys, request = Keys(), GenerateRequest(model=MODEL, prompt="hello")

    for job_id, trace in (("with", "00-1-2-01"), ("without", None)):
        call(fake_redis, serve_call(keys, "serving", MODEL, 8))
        call(fake_redis, submit_call(keys, job_id, request, trace=trace))

    messages = map(json.loads, fake_redis.lrange(keys.queue_list(MODEL), 0, -1))
    headers = {message["headers"]["id"]: message["headers"] for message in messages}
    assert headers["with"]["traceparent"] == "00-1-2-01"
    assert "traceparent" not in headers["without"]
    call(fake_redis, cancel_call(keys, "with"))
    assert fake_redis.llen(keys.queue_list(MODEL)) == 1, "the very message is found again"


def test_nothing_of_opentelemetry_is_loaded_unless_it_is_asked_for() -> None:
    program = (
        "import sys, redis.asyncio\n"  # which loads its metrics part by itself where it is installed
        "before = set(sys.modules)\n"
        "import lamella, lamella.cli\n"
        "from lamella.tracing import submission\n"
        "with submission('x', 'm') as trace: assert trace.traceparent is None\n"
        "print([name for name in set(sys.modules) - before if name.startswith('opentelemetry')])"
    )

    shown = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, timeout=60)

    assert shown.stdout.strip() == "[]"
