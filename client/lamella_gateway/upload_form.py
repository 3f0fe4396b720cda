"""The form that uploads a file, read piece by piece: bytes go to the disk as they come, fields are kept.

Owns ``multipart/form-data`` as far as an upload needs it: one file, a few short fields, each once. Neighbours: `files`
(the route), `file_store` (which takes the bytes).
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, NamedTuple

from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header
from starlette.requests import ClientDisconnect, Request

from lamella_gateway.api_error import ApiError
from lamella_gateway.file_store import Upload

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

FIELDS = ("purpose", "expires_after[anchor]", "expires_after[seconds]")
MAX_FIELD_BYTES = 1000
MAX_NAME_CHARS = 255
MAX_PARTS = 8
WRITE_BYTES = 1 << 20
_SHOWN = 60


class UploadForm(NamedTuple):
    """What a form said besides the file's bytes."""

    fields: dict[str, str]
    filename: str | None


async def read_form(request: Request, upload: Upload) -> UploadForm:
    """Read the form of a request, and write its file to `upload`.

    Raises:
        ApiError: it is no such form, has something that is not known, or is too large.
    """
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    boundary = options.get(b"boundary")
    if kind != b"multipart/form-data" or not boundary:
        shown = kind.decode("latin-1")[:_SHOWN]
        raise ApiError(
            415, f"the content type is {shown!r}; send `multipart/form-data` with purpose and file", code="not_a_form"
        )
    reader = _Reader()
    try:
        parser = MultipartParser(boundary, reader.callbacks())
        async for piece in request.stream():
            if piece:
                parser.write(piece)
                reader.check_fields()
            if len(reader.pending) >= WRITE_BYTES:
                await asyncio.to_thread(upload.write, reader.take())
        await asyncio.to_thread(upload.write, reader.take())
        parser.finalize()
    except FormParserError as error:
        raise _broken(str(error)) from error
    except ClientDisconnect as error:
        raise ApiError(400, "the request ended before its body did", code="incomplete_body") from error
    return reader.form()


class _Reader:
    """Takes what the parser finds."""

    def __init__(self) -> None:
        self.pending = bytearray()  # bytes of the file that are not written yet
        self._fields: dict[str, bytearray] = {}
        self._filename: str | None = None
        self._has_file = False
        self._is_whole = False
        self._num_parts = 0
        self._header_name, self._header_value = bytearray(), bytearray()
        self._headers: dict[bytes, bytes] = {}
        self._current: bytearray | None = None

    def callbacks(self) -> MultipartCallbacks:
        return {
            "on_part_begin": self._part_begins,
            "on_header_field": lambda data, start, end: self._header_name.extend(data[start:end]),
            "on_header_value": lambda data, start, end: self._header_value.extend(data[start:end]),
            "on_header_end": self._header_ends,
            "on_headers_finished": self._headers_end,
            "on_part_data": self._data,
            "on_end": self._end,
        }

    def take(self) -> bytes:
        data = bytes(self.pending)
        self.pending.clear()
        return data

    def check_fields(self) -> None:
        for name, value in self._fields.items():
            if len(value) > MAX_FIELD_BYTES:
                raise ApiError(400, f"{name!r} has more than {MAX_FIELD_BYTES} bytes", param=name, code="invalid_value")

    def form(self) -> UploadForm:
        if not self._is_whole:
            raise _broken("it ends before its closing boundary")
        fields = {name: value.decode("utf-8", "replace") for name, value in self._fields.items()}
        return UploadForm(fields, (self._filename or "") if self._has_file else None)

    def _part_begins(self) -> None:
        self._headers = {}
        self._current = None
        self._num_parts += 1
        if self._num_parts > MAX_PARTS:
            raise _broken(f"it has more than {MAX_PARTS} parts")

    def _header_ends(self) -> None:
        self._headers[bytes(self._header_name).lower()] = bytes(self._header_value)
        self._header_name.clear()
        self._header_value.clear()

    def _headers_end(self) -> None:
        disposition, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        name = options.get(b"name", b"").decode("utf-8", "replace")
        if disposition != b"form-data" or not name:
            raise _broken("a part of it has no name")
        if name == "file":
            if self._has_file:
                raise ApiError(400, "there is more than one file; upload them one by one", param="file")
            self._has_file = True
            self._filename = options.get(b"filename", b"").decode("utf-8", "replace")
            self._current = self.pending
            return
        if name not in FIELDS:
            raise ApiError(400, f"unknown field {name[:_SHOWN]!r}", param=name[:_SHOWN], code="unknown_parameter")
        if name in self._fields:
            raise ApiError(400, f"{name!r} is given twice", param=name, code="invalid_value")
        self._current = self._fields.setdefault(name, bytearray())

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._current is not None:
            self._current.extend(data[start:end])

    def _end(self) -> None:
        self._is_whole = True


def _broken(what: str) -> ApiError:
    return ApiError(400, f"the form cannot be read: {what[:200]}", code="invalid_form")
