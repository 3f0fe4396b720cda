"""The files of a batch: the input's identity, and the two outputs, read back, cut where incomplete, and added to.

Owns locking, resuming and flushing; not what records say (`batch_results`). Every input line that is not blank gets one
record, in one of the two files, each in the order of the lines. So what is there tells where to go on: all lines up to
the first one without a record are done. Records after it (after a power failure one file may be behind the other) are
cut away, as is a half-written last line; their jobs are found again by their idempotency keys.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, NamedTuple

from lamella.batch_lines import raw_lines
from lamella.batch_results import read_record_id
from lamella.errors import RequestError

SYNC_EVERY_S = 2.0
CHUNK_BYTES = 1 << 20


class BatchInput(NamedTuple):
    """What identifies an input: `batch_id` is 16 hexadecimal digits of its content and the options; lines not blank."""

    batch_id: str
    num_lines: int


class Resumed(NamedTuple):
    """What an earlier run left: the number of the last line that is done (0: none), and how many are, and failed."""

    last: int
    done: int
    failed: int


def identify(source: BinaryIO, options: str) -> BatchInput:
    """Read an input through and return its identity; it is at its beginning again afterwards."""
    digest = hashlib.sha256(options.encode() + b"\0")
    while chunk := source.read(CHUNK_BYTES):
        digest.update(chunk)
    source.seek(0)
    num_lines = sum(1 for _ in raw_lines(source))
    source.seek(0)
    return BatchInput(digest.hexdigest()[:16], num_lines)


def errors_path(output: Path) -> Path:
    """Return where the errors of a batch go: ``out.jsonl`` has ``out.errors.jsonl``."""
    return output.with_name(f"{output.stem}.errors{output.suffix or '.jsonl'}")


class BatchFiles:
    """The two outputs, open and locked; a context manager.

    Attributes:
        num_records: records in both, once they were read back.

    Raises:
        RequestError: another run writes them, or they are of another input.
        OSError: they cannot be opened.
    """

    def __init__(self, output: Path) -> None:
        self.output = output
        self.errors = errors_path(output)
        self._answers = _open_locked(output)
        try:
            self._failures = _open_locked(self.errors)
        except BaseException:
            self._answers.close()
            raise
        self._synced_at = time.monotonic()
        self.num_records = 0

    def __enter__(self) -> BatchFiles:
        """Return the files."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close them."""
        self.close()

    def resume(self, source: BinaryIO, batch_id: str) -> Resumed:
        """Read both back, cut what cannot be gone on from, and return how far they are.

        Raises:
            RequestError: they hold something else than this batch's records; nothing was changed.
        """
        answers, failures = (
            _Records(self._answers, self.output, batch_id),
            _Records(self._failures, self.errors, batch_id),
        )
        last = done = failed = 0
        for number, _ in raw_lines(source):
            if answers.number == number:
                answers.step()
            elif failures.number == number:
                failures.step()
                failed += 1
            else:
                break
            last, done = number, done + 1
        source.seek(0)
        answers.check_rest()
        failures.check_rest()
        answers.cut()
        failures.cut()
        self.num_records = done
        return Resumed(last, done, failed)

    def clear(self) -> None:
        """Empty both files."""
        self._answers.truncate(0)
        self._failures.truncate(0)

    def write(self, record: str, *, is_error: bool) -> None:
        """Add a record."""
        file = self._failures if is_error else self._answers
        file.write(record.encode("utf-8", "backslashreplace") + b"\n")
        self.num_records += 1

    def flush(self) -> None:
        """Hand what was written to the system; now and then, to the disk."""
        for file in (self._answers, self._failures):
            file.flush()
        if time.monotonic() - self._synced_at >= SYNC_EVERY_S:
            self._sync()

    def close(self) -> None:
        """Write everything to the disk and close; harmless when repeated."""
        if self._answers.closed:
            return
        try:
            for file in (self._answers, self._failures):
                file.flush()
            self._sync()
        finally:
            self._answers.close()
            self._failures.close()

    def _sync(self) -> None:
        for file in (self._answers, self._failures):
            os.fsync(file.fileno())
        self._synced_at = time.monotonic()


def _open_locked(path: Path) -> BinaryIO:
    file = open(path, "a+b")  # noqa: SIM115  it stays open
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise RequestError(f"{path} is being written by another run; wait for it, or choose another output") from error
    except BaseException:
        file.close()
        raise
    return file


class _Records:
    """Goes through the records of one file; `number` is the line of the one at hand, None after the last whole one."""

    def __init__(self, file: BinaryIO, path: Path, batch_id: str) -> None:
        self._file = file
        self._path = path
        self._batch_id = batch_id
        file.seek(0)
        self._numbers = self._read()
        self._end = 0
        self._next_end = 0
        self.number: int | None = None
        self.step()

    def step(self) -> None:
        """Keep the record at hand and go to the next one."""
        self._end = self._next_end
        self.number, self._next_end = next(self._numbers, (None, self._end))

    def check_rest(self) -> None:
        """Read what is left, so that a file of something else is noticed before it is cut."""
        for _ in self._numbers:
            pass

    def cut(self) -> None:
        """Cut the file after the last record that was kept."""
        self._file.truncate(self._end)
        self._file.seek(0, os.SEEK_END)

    def _read(self) -> Iterator[tuple[int, int]]:
        end, before = 0, 0
        for raw in self._file:
            end += len(raw)
            found = read_record_id(raw)
            if not raw.endswith(b"\n") and (found is None or found[0] == self._batch_id):
                if found is None and not b'{"id": "batch_req_'.startswith(raw[:18]):
                    raise self._foreign("holds something that is no record of a batch")
                return
            if found is None:
                raise self._foreign("holds something that is no record of a batch")
            if found[0] != self._batch_id:
                raise self._foreign("was written for another input, or with other options")
            if found[1] <= before:
                raise self._foreign("has records that are out of order")
            before = found[1]
            yield found[1], end

    def _foreign(self, what: str) -> RequestError:
        return RequestError(
            f"{self._path} {what}, so this run cannot go on with it; choose another output, remove it, or start it "
            "anew with --overwrite"
        )
