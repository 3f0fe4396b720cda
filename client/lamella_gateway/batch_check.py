"""The input of a batch, looked through before anything is asked: every line that cannot be is named, up to a bound.

Owns what a whole input must be. Neighbours: `line_form` (what a line must be), `batch_models` (which models there are),
`batch_execution`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, NamedTuple

from lamella.batch_lines import BatchError, BatchUrl, raw_lines
from lamella.batch_run import BatchStopped
from lamella.batch_tasks import BatchTasks
from lamella.embed_draft import EmbedDraft
from lamella_gateway.api_keys import ApiKey
from lamella_gateway.batch_record import BatchFault
from lamella_gateway.line_form import HttpForm
from lamella_gateway.order import draft_cost

MOST_LINES = 50_000
MOST_TEXTS = 50_000  # to be embedded, in all lines together
MOST_FAULTS = 100  # that are told
LOOK_EVERY = 100  # lines, for whether to stop


class Checked(NamedTuple):
    """How many lines there are, and what is wrong with them."""

    total: int
    faults: tuple[BatchFault, ...]


def check_input(
    source: Path, url: BatchUrl, form: HttpForm, key: ApiKey | None, is_stopped: Callable[[], bool]
) -> Checked:
    """Look an input through.

    Raises:
        BatchStopped: it was asked to stop.
        OSError: it cannot be read.
        ServerError: the queue's server did not say which models there are.
    """
    with open(source, "rb") as file:
        total = 0
        for raw in raw_lines(file):
            total += 1
            if total > MOST_LINES:
                said = f"the input has more than {MOST_LINES} lines; make several batches of it"
                return Checked(total, (BatchFault(code="too_many_lines", message=said, line=raw.number),))
        if total == 0:
            return Checked(0, (BatchFault(code="empty_file", message="the input has no line"),))
        file.seek(0)
        tasks = BatchTasks(file, "0" * 16, form, urls=(url,))
        return Checked(total, tuple(_faults(file, tasks, key, is_stopped)))


def _faults(file: BinaryIO, tasks: BatchTasks, key: ApiKey | None, is_stopped: Callable[[], bool]) -> list[BatchFault]:
    faults: list[BatchFault] = []
    num_texts = 0
    for count, raw in enumerate(raw_lines(file)):
        if count % LOOK_EVERY == 0 and is_stopped():
            raise BatchStopped("stopped")
        try:
            drafts = tasks.check(raw).drafts
            _check_quota(sum(map(draft_cost, drafts)), key)
            num_texts += sum(len(draft.wanted.texts) for draft in drafts if isinstance(draft, EmbedDraft))
            _check_texts(num_texts)
        except BatchError as error:
            faults.append(BatchFault(code=error.code, message=str(error), line=raw.number, param=error.param))
            if len(faults) == MOST_FAULTS:
                break
    return faults


def _check_texts(num_texts: int) -> None:
    if num_texts > MOST_TEXTS:
        raise BatchError(
            "too_many_inputs",
            f"with this line the batch has more than {MOST_TEXTS} texts to embed; make several batches of it",
            "body.input",
        )


def _check_quota(tokens: int, key: ApiKey | None) -> None:
    """Refuse a line that would wait for ever: it may take more than its key may use on any day."""
    if key is not None and key.tokens_per_day is not None and tokens > key.tokens_per_day:
        raise BatchError(
            "insufficient_quota",
            f"the line may take {tokens} tokens (prompt and max_tokens), and the API key may use {key.tokens_per_day} "
            "a day; ask for a smaller max_tokens",
            "body",
        )
