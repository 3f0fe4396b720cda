"""Files that callers uploaded, and outputs of batches, on the gateway's disk.

Owns how a file comes to be (whole or not at all), how much a key may keep, and how long. A file is there once what is
known of it (``.json``) is; its bytes (``.data``) are written before. Blocking: called from threads. Neighbours:
`owned_place` (where), `files` (the routes), `batch_execution` (which reads inputs and leaves outputs).
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Literal

from pydantic import ValidationError

from lamella.errors import DecodeError
from lamella.messages import Wire
from lamella_gateway.api_error import ApiError
from lamella_gateway.owned_place import Page, directory, is_id, is_owner, new_id, read_page, write_whole, written

FILE = "file-"
ABANDONED_S = 3600.0  # an upload that nothing was added to for so long
MAX_FILES = 10_000  # of an owner
CHECK_EVERY_BYTES = 16 * 1024 * 1024

Purpose = Literal["batch", "batch_output"]


class StoredFile(Wire):
    """What is known of a file; times are Unix seconds."""

    version: Literal[1] = 1
    file_id: str
    filename: str
    purpose: Purpose
    size_bytes: int
    created_at: int
    expires_at: int | None = None

    @property
    def is_expired(self) -> bool:
        """Whether its time is over."""
        return self.expires_at is not None and time.time() >= self.expires_at


class FileStore:
    """The files of all owners below one directory, which several gateways may share.

    Args:
        root: the directory; made when it is first needed.
        max_file_bytes: the largest upload.
        max_owner_bytes: what the files of one owner may have together.
    """

    def __init__(self, root: Path, max_file_bytes: int, max_owner_bytes: int) -> None:
        self.root = root
        self.max_file_bytes = max_file_bytes
        self.max_owner_bytes = max_owner_bytes

    def begin(self, owner: str) -> Upload:
        """Return an upload to be written to; raises ApiError (413, 503) where there is no room for it."""
        self.check_room(owner, 1)
        return Upload(self, owner, self._place(owner))

    def read(self, owner: str, file_id: str) -> StoredFile | None:
        """Return what is known of a file, None if the owner has none of this id."""
        if not is_id(file_id, FILE):
            return None
        try:
            text = (self.root / owner / "files" / f"{file_id}.json").read_bytes()
        except FileNotFoundError:
            return None
        try:
            found = StoredFile.model_validate_json(text)
        except ValidationError as error:
            raise DecodeError(f"what is known of {file_id} is not of a form this version reads") from error
        return None if found.is_expired else found

    def data(self, owner: str, file_id: str) -> Path:
        """Return where a file's bytes are; `file_id` is that of a file that was read."""
        return self.root / owner / "files" / f"{file_id}.data"

    def page(self, owner: str, page: Page, purpose: str | None) -> tuple[list[StoredFile], bool]:
        """Return a page of an owner's files, and whether there are more."""

        def read(file_id: str) -> StoredFile | None:
            file = self.read(owner, file_id)
            return file if file is not None and purpose in (None, file.purpose) else None

        return read_page(self._ids(owner), page, read)

    def delete(self, owner: str, file_id: str) -> bool:
        """Delete a file; False if there was none."""
        if self.read(owner, file_id) is None:
            return False
        self._remove(self.root / owner / "files", file_id)
        return True

    def adopt(self, owner: str, file_id: str, source: Path, filename: str, keep_s: float) -> bool:
        """Make a written file a file of the owner's; False for an empty one. The same again does no harm."""
        place = self._place(owner)
        target = place / f"{file_id}.data"
        with written():
            if source.exists() and source.stat().st_size == 0:
                return False
            if source.exists():
                source.replace(target)
            if (place / f"{file_id}.json").exists():
                return True
            now = int(time.time())
            if not target.exists():
                return False
            size = target.stat().st_size
            known = StoredFile(
                file_id=file_id,
                filename=filename,
                purpose="batch_output",
                size_bytes=size,
                created_at=now,
                expires_at=now + int(keep_s),
            )
            write_whole(place / f"{file_id}.json", known.model_dump_json())
        return True

    def check_room(self, owner: str, more_bytes: int) -> None:
        """Raise ApiError (413) where an owner's files would be too much with so many bytes more."""
        used, num_entries = self._used(owner)
        if num_entries > 2 * MAX_FILES:
            raise ApiError(
                413,
                f"this API key has {MAX_FILES} files, and may have no more; delete some with DELETE /v1/files/{{id}}",
                param="file",
                code="storage_full",
            )
        if used + more_bytes > self.max_owner_bytes:
            raise ApiError(
                413,
                f"the files of this API key have {used} bytes, and may have {self.max_owner_bytes} together; delete "
                "some with DELETE /v1/files/{id}",
                param="file",
                code="storage_full",
            )

    def sweep(self) -> None:
        """Remove files whose time is over, and uploads that were given up; raises OSError."""
        for owner in self._owners():
            place = self.root / owner / "files"
            for path in list(place.glob("*.json")):
                if is_id(path.stem, FILE) and self._is_over(path):
                    self._remove(place, path.stem)
            known = set(self._ids(owner))
            for path in [*place.glob("*.part"), *place.glob(".*")]:
                _remove_old(path)
            for path in place.glob("*.data"):
                if path.stem not in known:
                    _remove_old(path)

    @contextmanager
    def locked(self, owner: str) -> Iterator[None]:
        """Hold the owner's files against other uploads that are about to be complete."""
        with open(self._place(owner) / "lock", "ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _place(self, owner: str) -> Path:
        return directory(self.root, owner, "files")

    def _owners(self) -> list[str]:
        try:
            return [name for name in os.listdir(self.root) if is_owner(name)]
        except FileNotFoundError:
            return []

    def _ids(self, owner: str) -> list[str]:
        try:
            names = os.listdir(self.root / owner / "files")
        except FileNotFoundError:
            return []
        ids = (name.removesuffix(".json") for name in names if name.endswith(".json"))
        return [file_id for file_id in ids if is_id(file_id, FILE)]

    def _used(self, owner: str) -> tuple[int, int]:
        """Return the bytes of an owner's files, and how many entries there are, two a file."""
        try:
            with os.scandir(self.root / owner / "files") as entries:
                sizes = [entry.stat().st_size for entry in entries]
        except FileNotFoundError:
            return 0, 0  # nothing is there yet, or a file has just gone: the next look counts again
        return sum(sizes), len(sizes)

    def _is_over(self, path: Path) -> bool:
        try:
            return StoredFile.model_validate_json(path.read_bytes()).is_expired
        except (FileNotFoundError, ValidationError):
            return False  # gone already, or of a newer version, whose it is

    @staticmethod
    def _remove(place: Path, file_id: str) -> None:
        for suffix in (".json", ".data"):
            (place / f"{file_id}{suffix}").unlink(missing_ok=True)


class Upload:
    """A file that is being written; it is nobody's until it is finished. Closed in any case."""

    def __init__(self, store: FileStore, owner: str, place: Path) -> None:
        self._store = store
        self._owner = owner
        self._place = place
        self._file_id = new_id(FILE)
        self._part = place / f"{self._file_id}.part"
        with written():
            self._file: BinaryIO = open(self._part, "xb")  # noqa: SIM115  it stays open
        self._checked = 0
        self.size_bytes = 0

    def write(self, data: bytes) -> None:
        """Add bytes; raises ApiError (413, 503)."""
        self.size_bytes += len(data)
        if self.size_bytes > self._store.max_file_bytes:
            raise ApiError(
                413,
                f"the file is larger than {self._store.max_file_bytes} bytes; upload it in parts, as several files",
                param="file",
                code="file_too_large",
            )
        with written():
            self._file.write(data)
        if self.size_bytes - self._checked >= CHECK_EVERY_BYTES:
            self._checked = self.size_bytes
            self._store.check_room(self._owner, 0)

    def finish(self, filename: str, purpose: Purpose, keep_s: float) -> StoredFile:
        """Make it a file of the owner's; raises ApiError (413, 503)."""
        with written():
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        now = int(time.time())
        known = StoredFile(
            file_id=self._file_id,
            filename=filename,
            purpose=purpose,
            size_bytes=self.size_bytes,
            created_at=now,
            expires_at=now + int(keep_s),
        )
        with written(), self._store.locked(self._owner):
            self._store.check_room(self._owner, 0)
            self._part.replace(self._place / f"{self._file_id}.data")
            write_whole(self._place / f"{self._file_id}.json", known.model_dump_json())
        return known

    def close(self) -> None:
        """Remove what was not finished; harmless when repeated."""
        try:
            self._file.close()
        finally:
            self._part.unlink(missing_ok=True)


def _remove_old(path: Path) -> None:
    try:
        if time.time() - path.stat().st_mtime > ABANDONED_S:
            path.unlink(missing_ok=True)
    except FileNotFoundError:
        return  # somebody else removed it
