"""One batch, from wherever it stands to its end: looked through, answered, its outputs made files.

Owns the way through the phases, each of which can be begun again after a crash; the running itself is
`lamella.batch_run`, as for the command. Runs in a thread of its own that holds the batch's lock. Neighbours:
`batch_keeper` (starts it), `batch_store`, `file_store`, `billed_submit`.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lamella.batch_files import BatchFiles, BatchInput, errors_path
from lamella.batch_lines import BatchError, BatchUrl
from lamella.batch_run import BatchSettings, run_batch
from lamella.connection import Connection
from lamella.errors import ServerError
from lamella.map_closing import Closing
from lamella.map_meter import MapProgress
from lamella_gateway.api_keys import ApiKey, read_key
from lamella_gateway.batch_check import check_input
from lamella_gateway.batch_models import BatchModels
from lamella_gateway.batch_record import BatchFault, BatchRecord, End, Phase, Tally
from lamella_gateway.batch_store import BatchStore
from lamella_gateway.billed_submit import billed_submit
from lamella_gateway.file_store import FILE, FileStore
from lamella_gateway.line_form import HttpForm, counted
from lamella_gateway.owned_place import new_id

TOLD_EVERY_S = 1.0  # how often its counts are written
LOOK_EVERY_S = 0.2  # for a mark to cancel it
KEY_EVERY_S = 2.0  # for whether its key is still valid
CANCEL_GRACE_S = 600.0  # so long jobs that run are waited for once it is cancelled
SEARCHED = 20_000  # jobs that an earlier run can have sent for lines without a record, and more

_WHY = {
    End.CANCELLED: ("batch_cancelled", "the batch was cancelled before this line was answered"),
    End.EXPIRED: ("batch_expired", "the completion window ended before this line was answered"),
    End.FAILED: ("batch_stopped", "the batch's API key was revoked before this line was answered"),
}

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stores:
    """Where batches and files are, and the way to the queue."""

    batches: BatchStore
    files: FileStore
    connection: Connection


class BatchExecution:
    """Runs one batch; `is_stopped` says that the gateway is about to end, which leaves the batch to the next one."""

    def __init__(self, stores: Stores, record: BatchRecord, is_stopped: Callable[[], bool]) -> None:
        self._stores = stores
        self._record = record
        self._is_stopped = is_stopped
        self._place = stores.batches.place(record.owner, record.batch_id)
        self._was_begun = record.phase is Phase.RUN  # an earlier run may have sent jobs that no record tells of
        self._told_at = self._looked_at = self._asked_at = float("-inf")
        self._is_revoked = False

    def run(self) -> None:
        """Bring it to its end.

        Raises:
            BatchStopped: the gateway is about to end.
            LamellaError, OSError: it can be gone on with later, from where it is.
        """
        key = self._key()
        self._look(is_due=True)
        if self._record.phase is Phase.CHECK:
            self._check(key)
            self._look(is_due=True)
        if self._record.phase is Phase.RUN:
            self._answer(key)
        if self._record.phase is Phase.FINISH:
            self._finish()
        self._stores.batches.retire(self._record.owner, self._record.batch_id)

    def fail(self, code: str, message: str) -> None:
        """End it as failed, with what there is of its outputs; raises OSError."""
        fault = BatchFault(code=code, message=message)
        self._change(ends_as=End.FAILED, errors=(*self._record.errors, fault), phase=Phase.FINISH)
        self._finish()
        self._stores.batches.retire(self._record.owner, self._record.batch_id)

    def _key(self) -> ApiKey | None:
        """Return the key that pays, and note if it may not any more."""
        if self._record.key_id is None:
            return None
        connection = self._stores.connection
        stored = connection.run(read_key(connection.keys, self._record.key_id))
        self._asked_at = time.monotonic()
        self._is_revoked = stored is None or stored.key.revoked_at is not None
        return None if stored is None else stored.key

    def _form(self, models: BatchModels, key: ApiKey | None) -> HttpForm:
        return HttpForm(BatchUrl(self._record.endpoint), None if key is None else key.user, models.default_tokens)

    def _check(self, key: ApiKey | None) -> None:
        record = self._record
        if record.ends_as is not End.COMPLETED:
            self._end()
            return
        models = BatchModels({}, record.default_tokens, key, self._stores.connection)
        checked = check_input(
            self._place / "input.jsonl", BatchUrl(record.endpoint), self._form(models, key), key, self._is_stopped
        )
        if checked.faults:
            self._change(errors=checked.faults, ends_as=End.FAILED)
            self._end()
            return
        self._change(phase=Phase.RUN, total=checked.total, contexts=models.contexts, in_progress_at=int(time.time()))

    def _answer(self, key: ApiKey | None) -> None:
        record = self._record
        form = self._form(BatchModels(record.contexts, record.default_tokens, key, None), key)
        batch = BatchInput(hashlib.sha256(record.batch_id.encode()).hexdigest()[:16], record.total)
        settings = BatchSettings(
            form=form,
            leaves=True,
            urls=(BatchUrl(record.endpoint),),
            place_name=record.batch_id,
            submit=billed_submit(key),
            closing=self._closing,
        )

        def progress(_: MapProgress) -> None:
            self._look()
            self._tell(form.tally)

        with open(self._place / "input.jsonl", "rb") as source, BatchFiles(self._place / "output.jsonl") as files:
            files.resume(source, batch.batch_id)
            form.tally = recounted(files)
            run_batch(self._stores.connection, source, batch, files, settings, progress, self._is_stopped)
        self._change(tally=form.tally, phase=Phase.FINISH)

    def _finish(self) -> None:
        """Make the outputs files of the owner's; begun again, it finds what it has done."""
        record = self._record
        if record.finalizing_at is None:
            self._change(finalizing_at=int(time.time()), output_file_id=new_id(FILE), error_file_id=new_id(FILE))
            record = self._record
        output = self._place / "output.jsonl"
        kept = {
            "output_file_id": self._adopt(record.output_file_id, output, "output"),
            "error_file_id": self._adopt(record.error_file_id, errors_path(output), "error"),
        }
        self._change(**kept)
        self._end()

    def _adopt(self, file_id: str | None, source: Path, what: str) -> str | None:
        record = self._record
        name = f"{record.batch_id}_{what}.jsonl"
        if file_id is None or not self._stores.files.adopt(record.owner, file_id, source, name, record.keep_s):
            return None
        return file_id

    def _end(self) -> None:
        self._change(phase=Phase.ENDED, ended_at=int(time.time()))
        log.info("batch=%s %s: %s", self._record.batch_id, self._record.status, self._record.tally)

    def _closing(self) -> Closing | None:
        record = self._record
        if record.ends_as is End.COMPLETED:
            return None
        waited_s = time.time() - (record.cancelling_at or 0)
        return Closing(
            BatchError(*_WHY[record.ends_as]),
            stops_running=record.ends_as is not End.CANCELLED or waited_s > CANCEL_GRACE_S,
            searched=SEARCHED if self._was_begun else 0,
        )

    def _look(self, *, is_due: bool = False) -> None:
        """Note that it is to end early: cancelled, out of time, or without a key."""
        now = time.monotonic()
        if self._record.ends_as is not End.COMPLETED or (now - self._looked_at < LOOK_EVERY_S and not is_due):
            return
        self._looked_at = now
        if self._stores.batches.is_cancelled(self._record.owner, self._record.batch_id):
            self._change(ends_as=End.CANCELLED, cancelling_at=int(time.time()))
        elif time.time() >= self._record.expires_at:
            self._change(ends_as=End.EXPIRED)
        elif self._is_key_gone():
            fault = BatchFault(code="invalid_api_key", message="the API key that made the batch was revoked")
            self._change(ends_as=End.FAILED, errors=(fault,))

    def _is_key_gone(self) -> bool:
        if self._record.key_id is not None and time.monotonic() - self._asked_at >= KEY_EVERY_S:
            with contextlib.suppress(ServerError):  # away for now: the run itself sees to that
                self._key()
        return self._is_revoked

    def _tell(self, tally: Tally) -> None:
        if tally != self._record.tally and time.monotonic() - self._told_at >= TOLD_EVERY_S:
            self._told_at = time.monotonic()
            self._change(tally=tally)

    def _change(self, **changes: object) -> None:
        self._record = self._record.changed(**changes)
        self._stores.batches.write(self._record)


def recounted(files: BatchFiles) -> Tally:
    """Return what the records that are there already say."""
    tally = Tally()
    for path in (files.output, files.errors):
        with open(path, "rb") as file:
            for line in file:
                tally = counted(tally, line)
    return tally
