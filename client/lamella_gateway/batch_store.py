"""Batches on the gateway's disk: what is known of each, its input and outputs, and who runs it.

Owns the files of a batch's directory, and the lock by which of several gateways only one runs it: the system frees it
when its holder dies, however that is. Only the holder writes the record; who wants a batch cancelled leaves a mark.
Blocking: called from threads. Neighbours: `owned_place` (where), `batches` (the routes), `batch_keeper`.

    batch.json    the record            input.jsonl    another name of the input file, which may be deleted meanwhile
    lock          held by who runs it   output.jsonl, output.errors.jsonl    the answers and the errors, while it runs
    cancel        there once it is to be cancelled
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from pathlib import Path
from typing import BinaryIO

from pydantic import ValidationError

from lamella.errors import DecodeError
from lamella_gateway.batch_record import BatchRecord, Phase
from lamella_gateway.owned_place import MODE, Page, directory, is_id, is_owner, read_page, write_whole, written

BATCH = "batch_"
KEPT_S = 30 * 86400  # a batch that has ended is shown for so long
MAX_KEPT = 10_000  # of an owner; of more the oldest that have ended are forgotten
LOST_S = 600.0  # a mark without a batch, or a batch half made, is of a gateway that died


class InputGone(Exception):
    """The input of a batch was deleted before the batch was made."""


class BatchStore:
    """The batches of all owners below one directory, which several gateways may share."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def place(self, owner: str, batch_id: str) -> Path:
        """Return a batch's directory; `batch_id` is one of the form that ids have."""
        return self.root / owner / "batches" / batch_id

    def create(self, record: BatchRecord, source: Path) -> None:
        """Keep a new batch, whose input is `source`.

        Raises:
            ApiError: 503 where it cannot be kept.
            InputGone: the input has just been deleted.
        """
        batches = directory(self.root, record.owner, "batches")
        mark = directory(self.root, "active") / f"{record.owner}.{record.batch_id}"
        draft = batches / f".{record.batch_id}"
        try:
            with written():
                draft.mkdir(mode=MODE)
                _link(source, draft / "input.jsonl")
                write_whole(draft / "batch.json", record.model_dump_json())
                mark.touch(mode=0o600)
                draft.replace(batches / record.batch_id)
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise

    def read(self, owner: str, batch_id: str) -> BatchRecord | None:
        """Return what is known of a batch, None if the owner has none of this id; raises DecodeError."""
        if not is_id(batch_id, BATCH):
            return None
        place = self.place(owner, batch_id)
        try:
            record = BatchRecord.model_validate_json((place / "batch.json").read_bytes())
        except FileNotFoundError:
            return None
        except ValidationError as error:
            raise DecodeError(f"the record of {batch_id} is not of a form this version reads") from error
        return record

    def write(self, record: BatchRecord) -> None:
        """Replace what is known of a batch; only by the holder of its lock. Raises OSError."""
        write_whole(self.place(record.owner, record.batch_id) / "batch.json", record.model_dump_json())

    def page(self, owner: str, page: Page) -> tuple[list[BatchRecord], bool]:
        """Return a page of an owner's batches, and whether there are more."""
        return read_page(self._ids(owner), page, lambda batch_id: self.read(owner, batch_id))

    def cancel(self, owner: str, batch_id: str) -> None:
        """Leave the mark that a batch is to be cancelled; raises ApiError (503)."""
        with written():
            (self.place(owner, batch_id) / "cancel").touch(mode=0o600)

    def is_cancelled(self, owner: str, batch_id: str) -> bool:
        """Return whether a batch is to be cancelled."""
        return (self.place(owner, batch_id) / "cancel").exists()

    def active(self) -> list[tuple[str, str]]:
        """Return owner and id of the batches that have not ended, oldest first."""
        try:
            names = os.listdir(self.root / "active")
        except FileNotFoundError:
            return []
        pairs = (name.partition(".") for name in names)
        known = [(owner, batch_id) for owner, _, batch_id in pairs if is_owner(owner) and is_id(batch_id, BATCH)]
        return sorted(known, key=lambda pair: pair[1])

    def retire(self, owner: str, batch_id: str) -> None:
        """Take away a batch's mark, and the input's second name, once it has ended. Raises OSError."""
        place = self.place(owner, batch_id)
        mark = self.root / "active" / f"{owner}.{batch_id}"
        if not (place / "batch.json").exists():
            if mark.exists() and time.time() - mark.stat().st_mtime > LOST_S:
                mark.unlink(missing_ok=True)
            return
        for name in ("input.jsonl", "output.jsonl", "output.errors.jsonl"):
            (place / name).unlink(missing_ok=True)
        mark.unlink(missing_ok=True)

    def lock(self, owner: str, batch_id: str) -> BinaryIO | None:
        """Return the lock of a batch, held until it is closed; None if another gateway holds it. Raises OSError."""
        try:
            file = open(self.place(owner, batch_id) / "lock", "ab")  # noqa: SIM115  whoever locked it closes it
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
        except BaseException:
            file.close()
            raise
        return file

    def sweep(self) -> None:
        """Forget batches that ended long ago, and what a gateway left that died while it made one; raises OSError."""
        try:
            owners = [name for name in os.listdir(self.root) if is_owner(name)]
        except FileNotFoundError:
            return
        for owner in owners:
            for draft in (self.root / owner / "batches").glob(".batch_*"):
                if time.time() - draft.stat().st_mtime > LOST_S:
                    shutil.rmtree(draft, ignore_errors=True)
            ids = sorted(self._ids(owner), reverse=True)
            for place, batch_id in enumerate(ids):
                self._forget_old(owner, batch_id, KEPT_S if place < MAX_KEPT else 0.0)

    def _forget_old(self, owner: str, batch_id: str, keep_s: float) -> None:
        try:
            record = self.read(owner, batch_id)
        except DecodeError:
            return  # of a newer version, whose it is
        if record is None or record.phase is not Phase.ENDED or record.ended_at is None:
            return
        if time.time() - record.ended_at > keep_s:
            shutil.rmtree(self.place(owner, batch_id), ignore_errors=True)

    def _ids(self, owner: str) -> list[str]:
        try:
            names = os.listdir(self.root / owner / "batches")
        except FileNotFoundError:
            return []
        return [name for name in names if is_id(name, BATCH)]


def _link(source: Path, target: Path) -> None:
    """Give a file a second name; where the disk knows no such thing, copy it."""
    try:
        os.link(source, target)
    except FileNotFoundError as error:
        raise InputGone(source.name) from error
    except OSError:
        shutil.copyfile(source, target)
