"""What the routes of files send back; the types are also what ``/openapi.json`` says."""

from __future__ import annotations

from typing import Literal

from typing_extensions import TypedDict

from lamella_gateway.file_store import StoredFile


class FileBody(TypedDict):
    """A file."""

    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    expires_at: int | None
    filename: str
    purpose: Literal["batch", "batch_output"]
    status: Literal["processed"]


class FilesBody(TypedDict):
    """A page of files."""

    object: Literal["list"]
    data: list[FileBody]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeletedFileBody(TypedDict):
    """A file that is gone."""

    id: str
    object: Literal["file"]
    deleted: Literal[True]


def file_body(file: StoredFile) -> FileBody:
    """Return a file as it is shown."""
    return FileBody(
        id=file.file_id,
        object="file",
        bytes=file.size_bytes,
        created_at=file.created_at,
        expires_at=file.expires_at,
        filename=file.filename,
        purpose=file.purpose,
        status="processed",
    )


def files_body(files: list[StoredFile], *, has_more: bool) -> FilesBody:
    """Return a page of files."""
    data = [file_body(file) for file in files]
    return FilesBody(
        object="list",
        data=data,
        first_id=data[0]["id"] if data else None,
        last_id=data[-1]["id"] if data else None,
        has_more=has_more,
    )
