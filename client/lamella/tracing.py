"""Traces of submits, where they are asked for: a span a submit, and its traceparent along with the job.

Owns the only place of the client that knows OpenTelemetry, and loads it when tracing is configured, not before: by
`use_tracing(provider)` in a program, or by LAMELLA_TRACES (an OTLP endpoint) in the environment. Otherwise a submit
costs one look at the environment. Neighbours: `operations` opens a `submission`; the worker goes on with the trace.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from lamella.errors import ConfigError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider as ExportingProvider
    from opentelemetry.trace import Span, TracerProvider

TRACES_VARIABLE = "LAMELLA_TRACES"
SEND_S = 5  # whole seconds that sending may take before spans are dropped
_INSTALL = 'run `pip install "lamella[tracing]"`'


class _Chosen:
    """Who makes the spans of this process."""

    lock = threading.Lock()
    provider: TracerProvider | None = None


class Submission:
    """One submit under way; `traceparent` goes with the job, None where nothing is traced."""

    def __init__(self, span: Span | None = None, traceparent: str | None = None) -> None:
        self._span = span
        self.traceparent = traceparent

    def accepted(self, job_id: str, status: str) -> None:
        """The server has answered; the id may be an earlier job's."""
        if self._span is not None:
            self._span.set_attribute("lamella.job", job_id)
            self._span.set_attribute("lamella.submit_status", status)


_UNTRACED = Submission()


def use_tracing(provider: TracerProvider | None = None) -> None:
    """Trace every submit of this process with `provider`, None for OpenTelemetry's global one.

    Raises:
        ConfigError: OpenTelemetry is not installed.
    """
    try:
        from opentelemetry.trace import get_tracer_provider
    except ImportError as error:
        raise ConfigError(f"traces need OpenTelemetry, which is not installed ({error}); {_INSTALL}") from error
    with _Chosen.lock:
        _Chosen.provider = provider or get_tracer_provider()


def stop_tracing() -> None:
    """Trace no submits any more; the provider is its opener's to shut down."""
    with _Chosen.lock:
        _Chosen.provider = None


def open_exporting(endpoint: str, service: str) -> ExportingProvider:
    """Return a provider that sends spans to an OTLP endpoint (HTTP) from a thread of its own; shut it down when done.

    Raises:
        ImportError: OpenTelemetry is not installed.
    """
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider as Exporting
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    provider = Exporting(resource=Resource.create({"service.name": service}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint, timeout=SEND_S)))
    return provider


@contextmanager
def submission(name: str, model: str) -> Iterator[Submission]:
    """A span around a submit for `model`, below whatever span is current; nothing where tracing is not configured.

    Raises:
        ConfigError: LAMELLA_TRACES asks for traces and OpenTelemetry is not installed.
    """
    provider = _provider()
    if provider is None:
        yield _UNTRACED
        return
    from opentelemetry.trace import SpanKind, Status, StatusCode, format_span_id, format_trace_id

    span = provider.get_tracer("lamella").start_span(name, kind=SpanKind.PRODUCER, attributes={"lamella.model": model})
    about = span.get_span_context()
    traceparent = None
    if about.is_valid:
        flags = f"{about.trace_flags:02x}"
        traceparent = f"00-{format_trace_id(about.trace_id)}-{format_span_id(about.span_id)}-{flags}"
    try:
        yield Submission(span, traceparent)
    except BaseException as error:
        span.set_status(Status(StatusCode.ERROR, type(error).__name__))
        raise
    finally:
        span.end()


def _provider() -> TracerProvider | None:
    if _Chosen.provider is not None:
        return _Chosen.provider
    endpoint = os.environ.get(TRACES_VARIABLE)
    if not endpoint:
        return None
    with _Chosen.lock:
        if _Chosen.provider is None:
            try:
                _Chosen.provider = open_exporting(endpoint, "lamella-client")
            except ImportError as error:
                raise ConfigError(
                    f"{TRACES_VARIABLE} asks for traces, but OpenTelemetry is not installed ({error}); {_INSTALL}"
                ) from error
        return _Chosen.provider
