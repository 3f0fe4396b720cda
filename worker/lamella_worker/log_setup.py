"""Logging of a worker process: one line an event on stderr, for people or as JSON, and no user's text in any.

Owns the form of lines; what they are labelled with is in `log_context`. Libraries are quiet where we say the same
better. Exceptions are written without what they quote of their input, because that may be a prompt.
"""

from __future__ import annotations

import json
import logging
import traceback
import warnings
from datetime import UTC, datetime
from types import TracebackType

from pydantic import ValidationError

from lamella_worker.log_context import JobLabel, ProcessLabels, jobs_of

_TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_NOISY = ("celery.worker.strategy", "celery.bootsteps", "kombu", "urllib3", "opentelemetry")
_WITH_OWN_HANDLERS = ("transformers", "huggingface_hub")
WITHHELD = {"is_withheld": True}  # `extra` of a line whose exception may quote a user's text: its messages are left out

ExcInfo = tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]


class LineFormatter(logging.Formatter):
    """A line for people; one about a job ends with its attempt, worker and model."""

    def __init__(self, labels: ProcessLabels) -> None:
        super().__init__(_TEXT)
        self._labels = labels

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The line without its exception."""
        line = super().formatMessage(record)
        jobs = jobs_of(record, record.message)
        if not jobs:
            return line
        named = "" if "job=" in record.message else f"job={','.join(label.job for label in jobs)} "
        attempts = ",".join("-" if label.attempt is None else str(label.attempt) for label in jobs)
        return f"{line} [{named}attempt={attempts} worker={self._labels.worker} model={self._labels.model}]"

    def format(self, record: logging.LogRecord) -> str:
        """The line with its exception, which is never kept in the record: others may show more of it than is due."""
        record.message = record.getMessage()
        record.asctime = self.formatTime(record)
        text = self.formatMessage(record)
        return f"{text}\n{trouble}" if (trouble := _trouble(record)) else text


class JsonFormatter(logging.Formatter):
    """A JSON object a line; one about a job has its id, its attempt, the worker and the model."""

    def __init__(self, labels: ProcessLabels) -> None:
        super().__init__()
        self._labels = labels

    def format(self, record: logging.LogRecord) -> str:
        """The whole event on one line."""
        message = record.getMessage()
        fields: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": message,
            "worker": self._labels.worker,
            "model": self._labels.model,
            "pid": record.process,
            "thread": record.threadName,
        }
        fields |= _job_fields(jobs_of(record, message))
        if trouble := _trouble(record):
            fields["exception"] = trouble
        return json.dumps(fields)


def _job_fields(jobs: list[JobLabel]) -> dict[str, object]:
    if len(jobs) == 1:
        return {"job": jobs[0].job, "attempt": jobs[0].attempt}
    return {"jobs": [{"job": label.job, "attempt": label.attempt} for label in jobs]} if jobs else {}


def _trouble(record: logging.LogRecord) -> str:
    parts = []
    if record.exc_info and record.exc_info[1] is not None:
        parts.append(describe(record.exc_info[1], is_withheld=getattr(record, "is_withheld", False)))
    if record.stack_info:
        parts.append(record.stack_info)
    return "\n".join(parts)


def describe(error: BaseException, *, is_withheld: bool = False) -> str:
    """An exception with its causes and where they came from, oldest first, without what they quote of their input."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.insert(0, link)
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
    parts = []
    for each in chain:
        frames = "".join(traceback.format_list(traceback.extract_tb(each.__traceback__)))
        words = "" if is_withheld else _words(each)
        name = type(each).__qualname__
        parts.append(f"Traceback (most recent call last):\n{frames}{name}{': ' + words if words else ''}")
    return "\n\n".join(parts)


def _words(error: BaseException) -> str:
    if isinstance(error, ValidationError):
        told = error.errors(include_url=False, include_context=False, include_input=False)
        return "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in told[:10])
    return str(error)


_UNLABELLED = ProcessLabels()


class _Current:
    """The labels in use; changed where a process starts, before its threads do."""

    labels = _UNLABELLED


def current_labels() -> ProcessLabels:
    """What the lines of this process are labelled with."""
    return _Current.labels


def set_up_logging(*, is_verbose: bool, labels: ProcessLabels = _UNLABELLED) -> None:
    """Set up the root logger; call it once, when the process starts."""
    handler = logging.StreamHandler()
    logging.basicConfig(level=logging.DEBUG if is_verbose else logging.INFO, handlers=[handler])
    label_logs(labels)
    for noisy in _NOISY:
        logging.getLogger(noisy).setLevel(logging.WARNING)
    logging.getLogger("celery.app.trace").setLevel(logging.ERROR)  # it warns of each job that is given back
    # The danger it warns of is pickle in messages; ours are JSON only.
    warnings.filterwarnings("ignore", message="You're running the worker with superuser privileges")
    # It announces another default of a setting that `app` sets.
    warnings.filterwarnings("ignore", message=r"\s*In Celery 5\.1 we introduced an optional breaking change")


def label_logs(labels: ProcessLabels) -> None:
    """Label and shape all lines from now on."""
    _Current.labels = labels
    is_json = labels.log_format == "json"
    logging.captureWarnings(is_json)
    for handler in logging.getLogger().handlers:
        if type(handler) is logging.StreamHandler:
            handler.setFormatter(JsonFormatter(labels) if is_json else LineFormatter(labels))


def adopt_library_logs() -> None:
    """Let libraries that write lines of their own log like everybody else; call it once they are loaded."""
    for name in _WITH_OWN_HANDLERS:
        library = logging.getLogger(name)
        library.handlers.clear()
        library.propagate = True
