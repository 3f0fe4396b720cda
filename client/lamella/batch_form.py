"""How the lines of a batch are understood: which jobs a line is, and what is written of their results.

Owns what `batch_tasks` asks of a form, and the form of the command (`batch_body`, `batch_results`); the HTTP gateway
has another one. Does no I/O.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from lamella.batch_body import NO_DEFAULTS, BodyDefaults, submit_arguments
from lamella.batch_lines import BatchError, BatchLine
from lamella.batch_results import answer_record, error_record
from lamella.completion import Completion
from lamella.errors import LamellaError
from lamella.map_flight import Brought
from lamella.map_run import Draft
from lamella.request_draft import draft_request


@dataclass(frozen=True)
class LineJobs:
    """The jobs of a line, at least one, and what makes the line's record of the batch's id and what they brought."""

    drafts: tuple[Draft, ...]
    record: Callable[[str, Sequence[Brought]], str]


class LineForm(Protocol):
    """What lines mean."""

    def read(self, line: BatchLine) -> LineJobs:
        """Return the jobs of a line; raises BatchError where it cannot be one."""

    def failure(self, batch_id: str, number: int, custom_id: str | None, error: LamellaError) -> str:
        """Return the record of a line that brought no answer."""


@dataclass(frozen=True)
class SubmitForm:
    """A line is one job with the arguments of a submit; with `queues` it waits where no worker serves its model."""

    defaults: BodyDefaults = NO_DEFAULTS
    queues: bool = False

    def read(self, line: BatchLine) -> LineJobs:
        """Return the job of a line; raises BatchError where it cannot be one."""
        prompt, options = submit_arguments(line.url, line.body, self.defaults)
        draft = draft_request(prompt, options)
        if self.queues:
            draft = replace(draft, require_worker=False)

        def record(batch_id: str, results: Sequence[Brought]) -> str:
            (result,) = results
            if not isinstance(result, Completion):
                raise BatchError("invalid_answer", f"line {line.number} brought no text")
            return answer_record(batch_id, line, str(options["model"]), result)

        return LineJobs((draft,), record)

    def failure(self, batch_id: str, number: int, custom_id: str | None, error: LamellaError) -> str:
        """Return the record of a line that brought no answer."""
        return error_record(batch_id, number, custom_id, error)
