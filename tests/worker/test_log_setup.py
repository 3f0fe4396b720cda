"""The form of log lines: whom they name, and what they never say."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator

import pytest
from pydantic import BaseModel

from lamella_worker.log_context import JobLabel, ProcessLabels, about_job, job_of, sequence_id
from lamella_worker.log_setup import WITHHELD, JsonFormatter, LineFormatter

LABELS = ProcessLabels("json", "w1", "tiny")
log = logging.getLogger("a.logger")


class Lines(logging.Handler):
    """Keeps lines as both formatters make them."""

    def __init__(self) -> None:
        super().__init__()
        self.json: list[dict[str, object]] = []
        self.text: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        line = JsonFormatter(LABELS).format(record)
        assert "\n" not in line
        self.json.append(json.loads(line))
        self.text.append(LineFormatter(LABELS).format(record))


@pytest.fixture
def lines() -> Iterator[Lines]:
    lines = Lines()
    log.addHandler(lines)
    log.setLevel(logging.DEBUG)
    yield lines
    log.removeHandler(lines)


def test_a_line_of_no_job_names_the_worker_only(lines: Lines) -> None:
    log.info("the heartbeat is left to expire: %s", "why")

    (line,) = lines.json
    assert (line["worker"], line["model"], line["level"]) == ("w1", "tiny", "INFO")
    assert line["message"] == "the heartbeat is left to expire: why"
    assert "job" not in line
    assert lines.text[0].endswith("INFO a.logger: the heartbeat is left to expire: why")


def test_a_line_that_names_a_job_is_labelled_with_it(lines: Lines) -> None:
    log.warning("job=%s dropped here: %s", "abc", "its record is gone")

    assert (lines.json[0]["job"], lines.json[0]["attempt"]) == ("abc", None)
    assert lines.text[0].endswith("its record is gone [attempt=- worker=w1 model=tiny]")


def test_lines_of_other_threads_about_a_claimed_job_know_its_attempt(lines: Lines) -> None:
    with about_job("abc", 3):
        other = threading.Thread(target=lambda: log.info("job=abc cancel requested"))
        other.start()
        other.join(40)
    log.info("job=abc again")

    assert [(line["job"], line["attempt"]) for line in lines.json] == [("abc", 3), ("abc", None)]


def test_what_a_library_logs_while_a_thread_works_on_a_job_is_about_that_job(lines: Lines) -> None:
    with about_job("abc"), about_job("abc", 2):
        log.info("token indices sequence length is longer than the maximum")
    log.info("afterwards")

    assert (lines.json[0]["job"], lines.json[0]["attempt"]) == ("abc", 2)
    assert "[job=abc attempt=2 worker=w1 model=tiny]" in lines.text[0]
    assert "job" not in lines.json[1]


def test_what_concerns_several_sequences_lists_their_jobs(lines: Lines) -> None:
    names = [sequence_id("abc", 7, 2), sequence_id("d.e", 1, 1)]

    log.error("a sweep of 2 sequences failed", extra={"sequences": names})

    assert lines.json[0]["jobs"] == [{"job": "abc", "attempt": 2}, {"job": "d.e", "attempt": 1}]
    assert "[job=abc,d.e attempt=2,1 worker=w1 model=tiny]" in lines.text[0]


def test_celerys_own_lines_about_a_task_are_about_its_job(lines: Lines) -> None:
    log.error("Task %(name)s[%(id)s] raised", {"name": "n", "id": "abc"}, extra={"data": {"id": "abc"}})

    assert lines.json[0]["job"] == "abc"


@pytest.mark.parametrize(("sequence", "label"), [("a.1.2", JobLabel("a", 2)), ("odd", JobLabel("odd", None))])
def test_a_sequence_tells_its_job(sequence: str, label: JobLabel) -> None:
    assert job_of(sequence) == label


class Message(BaseModel):
    """Refuses what is no number, and quotes it."""

    number: int


def test_an_exception_has_its_frames_and_causes_but_not_the_input_it_quotes(lines: Lines) -> None:
    quoted = "".join(["zan", "zibar"])  # a traceback shows lines of source
    try:
        try:
            Message.model_validate({"number": quoted})
        except ValueError as error:
            raise RuntimeError("no message") from error
    except RuntimeError:
        log.exception("job=%s failed", "abc")

    trouble = str(lines.json[0]["exception"])
    assert quoted not in trouble + lines.text[0]
    assert "ValidationError: number: Input should be a valid integer" in trouble
    assert trouble.endswith("RuntimeError: no message")
    assert "test_log_setup.py" in trouble


def test_a_withheld_exception_says_its_kind_and_place_only(lines: Lines) -> None:
    try:
        raise KeyError("zanzibar in a template")
    except KeyError:
        log.exception("cannot be taken", extra=WITHHELD)

    # The line of source is shown, as in any traceback; a prompt is never in the source.
    assert str(lines.json[0]["exception"]).splitlines()[-1] == "KeyError"
    assert lines.text[0].splitlines()[-1] == "KeyError"


def test_labels_survive_a_command_line() -> None:
    labels = ProcessLabels("json", "w 1 'ü", "own/er@12")

    assert ProcessLabels.decoded(labels.encoded()) == labels
