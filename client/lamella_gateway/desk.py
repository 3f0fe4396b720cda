"""Where callers leave files and batches: the two stores on the gateway's disk, and who runs the batches.

Owns the order in which they are opened and closed. Neighbours: `app` (opens it beside `service`), `files` and `batches`
(get it from `of`).
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from types import TracebackType

from starlette.requests import Request

from lamella_gateway.batch_keeper import BatchKeeper
from lamella_gateway.batch_store import BatchStore
from lamella_gateway.file_store import FileStore
from lamella_gateway.settings import Settings


@dataclass(frozen=True)
class Desk:
    """One gateway's part in a directory that several may share; an async context manager."""

    files: FileStore
    batches: BatchStore
    keeper: BatchKeeper

    @classmethod
    def make(cls, settings: Settings) -> Desk:
        """Return a desk that does nothing yet; nothing is written before the first file comes."""
        files = FileStore(settings.files_root, settings.max_file_bytes, settings.max_storage_bytes)
        batches = BatchStore(settings.files_root)
        return cls(files, batches, BatchKeeper(settings, batches, files))

    async def __aenter__(self) -> Desk:
        """Begin to run batches."""
        self.keeper.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave what runs to the next gateway."""
        await asyncio.to_thread(self.keeper.close)


def of(request: Request) -> Desk:
    """Return the desk that answers a request."""
    desk = request.app.state.desk
    assert isinstance(desk, Desk)  # noqa: S101  # put there by `app`, for every request
    return desk
