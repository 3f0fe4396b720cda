"""``/v1/files``: inputs of batches uploaded, listed, read and deleted, and outputs read; each key sees its own."""

from __future__ import annotations

from pathlib import Path

from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse

from lamella_gateway import desk as desks
from lamella_gateway.access import identify
from lamella_gateway.api_error import ApiError
from lamella_gateway.api_keys import Endpoint
from lamella_gateway.file_shapes import DeletedFileBody, file_body, files_body
from lamella_gateway.file_store import FILE, FileStore, StoredFile
from lamella_gateway.owned_place import on_disk, owner_of
from lamella_gateway.page_query import page_query
from lamella_gateway.upload_form import MAX_NAME_CHARS, UploadForm, read_form

MOST_FILES = 10_000
SHORTEST_KEEP_S, LONGEST_KEEP_S = 3600, 30 * 86400
PURPOSES = ("batch", "batch_output")


async def create_file(request: Request) -> JSONResponse:
    """Keep an uploaded file."""
    store, owner = await _store(request)
    upload = await on_disk(store.begin, owner)
    try:
        form = await read_form(request, upload)
        name, keep_s = _name(form), _keep_s(form)
        _check_purpose(form)
        file = await on_disk(upload.finish, name, "batch", keep_s)
    finally:
        await on_disk(upload.close)
    return JSONResponse(file_body(file))


async def list_files(request: Request) -> JSONResponse:
    """List files, newest first."""
    store, owner = await _store(request)
    page = page_query(request, FILE, MOST_FILES, MOST_FILES, ("order", "purpose"))
    purpose = request.query_params.get("purpose")
    if purpose is not None and purpose not in PURPOSES:
        raise ApiError(
            400,
            f"purpose is {purpose[:60]!r}; files have the purposes {' and '.join(PURPOSES)}",
            param="purpose",
            code="invalid_value",
        )
    found, has_more = await on_disk(store.page, owner, page, purpose)
    return JSONResponse(files_body(found, has_more=has_more))


async def stored_file(request: Request) -> JSONResponse:
    """Tell about a file, or delete it."""
    store, owner = await _store(request)
    file = await _found(request, store, owner)
    if request.method == "DELETE":
        await on_disk(store.delete, owner, file.file_id)
        return JSONResponse(DeletedFileBody(id=file.file_id, object="file", deleted=True))
    return JSONResponse(file_body(file))


async def file_content(request: Request) -> FileResponse:
    """Return what is in a file, as it was written."""
    store, owner = await _store(request)
    file = await _found(request, store, owner)
    data: Path = store.data(owner, file.file_id)
    if not await on_disk(data.is_file):
        raise not_found(file.file_id)
    headers = {"x-content-type-options": "nosniff", "content-disposition": "attachment", "cache-control": "no-store"}
    return FileResponse(data, media_type="application/octet-stream", headers=headers)


async def _store(request: Request) -> tuple[FileStore, str]:
    caller = await identify(request, Endpoint.BATCHES)
    return desks.of(request).files, owner_of(caller.key)


async def _found(request: Request, store: FileStore, owner: str) -> StoredFile:
    given = request.path_params["file_id"]
    file = await on_disk(store.read, owner, given)
    if file is None:
        raise not_found(given)
    return file


def not_found(given: str, param: str = "file_id") -> ApiError:
    """Return the error for a file that is not there, or not the caller's."""
    return ApiError(
        404,
        f"there is no file {given[:80]!r}: the id is wrong, it was deleted or has expired, or it belongs to another "
        "API key; GET /v1/files lists those there are",
        param=param,
        code="file_not_found",
    )


def _check_purpose(form: UploadForm) -> None:
    purpose = form.fields.get("purpose")
    if purpose is None:
        raise ApiError(
            400, "the field 'purpose' is missing; send batch", param="purpose", code="missing_required_parameter"
        )
    if purpose != "batch":
        raise ApiError(
            400,
            f"purpose is {purpose[:60]!r}; files are kept for batches only, so use batch",
            param="purpose",
            code="invalid_value",
        )


def _name(form: UploadForm) -> str:
    """Return what the file is called; a name is shown and is no path."""
    if form.filename is None:
        raise ApiError(
            400, "the field 'file' is missing; send the file in it", param="file", code="missing_required_parameter"
        )
    printable = "".join(each for each in form.filename if each.isprintable())
    return printable[-MAX_NAME_CHARS:] or "upload"


def _keep_s(form: UploadForm) -> float:
    anchor, seconds = form.fields.get("expires_after[anchor]"), form.fields.get("expires_after[seconds]")
    if anchor is None and seconds is None:
        return LONGEST_KEEP_S
    if anchor != "created_at":
        raise ApiError(
            400,
            f"expires_after[anchor] is {str(anchor)[:60]!r}; use created_at",
            param="expires_after[anchor]",
            code="invalid_value",
        )
    given = seconds or ""
    is_number = given.isascii() and given.isdecimal() and len(given) <= 8
    if not is_number or not SHORTEST_KEEP_S <= int(given) <= LONGEST_KEEP_S:
        raise ApiError(
            400,
            f"expires_after[seconds] is {given[:60]!r}; use a whole number from {SHORTEST_KEEP_S} to {LONGEST_KEEP_S}",
            param="expires_after[seconds]",
            code="invalid_value",
        )
    return float(given)
