"""Where a gateway keeps what callers leave with it: a directory for each API key, ids that sort by age, safe writes.

Owns the layout below the directory of ``--files-dir``, and that no name of a caller's ever becomes a path: paths are
made of ids that are checked by form. Neighbours: `file_store` and `batch_store`, which keep their things there.

    <files-dir>/<owner>/files/<file id>.json, .data    an uploaded or written file: what is known of it, what is in it
    <files-dir>/<owner>/files/<file id>.part           one that is being uploaded
    <files-dir>/<owner>/batches/<batch id>/            a batch: see `batch_store`
    <files-dir>/active/<owner>.<batch id>              a mark for each batch that has not ended
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, ParamSpec, TypeVar

from lamella.errors import DecodeError
from lamella_gateway.api_error import SERVER, ApiError
from lamella_gateway.api_keys import ApiKey

Given = ParamSpec("Given")
Result = TypeVar("Result")
Kept = TypeVar("Kept")
NOBODY = "local"  # the owner where no key is asked for
MODE = 0o700
_OWNER = re.compile(r"[0-9a-f]{12}|local", re.ASCII)
_ID = re.compile(r"(file-|batch_)[0-9a-f]{24}", re.ASCII)


log = logging.getLogger(__name__)


class Page(NamedTuple):
    """Which part of a list is asked for; `after` is the id it goes on behind."""

    limit: int
    after: str | None = None
    newest_first: bool = True


def owner_of(key: ApiKey | None) -> str:
    """Return the name of a caller's directory: keys see what was made with them alone."""
    return NOBODY if key is None else key.key_id


def is_owner(name: str) -> bool:
    """Return whether a directory's name is an owner's."""
    return _OWNER.fullmatch(name) is not None


def new_id(kind: str) -> str:
    """Return a new id, ``file-...`` or ``batch_...``; later ones sort behind."""
    return f"{kind}{time.time_ns():016x}{secrets.token_hex(4)}"


def is_id(text: str, kind: str) -> bool:
    """Return whether text has the form of an id of this kind."""
    return text.startswith(kind) and _ID.fullmatch(text) is not None


def directory(root: Path, owner: str, *parts: str) -> Path:
    """Return a directory of an owner's, made if it is not there.

    Raises:
        ApiError: 503 where it cannot be made.
    """
    path = root.joinpath(owner, *parts)
    with written():
        root.mkdir(mode=MODE, parents=True, exist_ok=True)
        path.mkdir(mode=MODE, parents=True, exist_ok=True)
    return path


def write_whole(path: Path, text: str) -> None:
    """Write a small file so that there is the old or the new one, whatever happens."""
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with open(draft, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


@contextmanager
def written() -> Iterator[None]:
    """Turn an error of the disk into an answer.

    Raises:
        ApiError: 503, the gateway's disk failed or is full.
    """
    try:
        yield
    except OSError as error:
        raise ApiError(
            503,
            f"the gateway cannot keep files now: {error.strerror or type(error).__name__}; tell whoever runs it "
            "(`lamella serve --files-dir`), and try again",
            type=SERVER,
            code="storage_unavailable",
            retry_after_s=30.0,
        ) from error


async def on_disk(function: Callable[Given, Result], *args: Given.args, **kwargs: Given.kwargs) -> Result:
    """Call what reads or writes in a thread; raises ApiError as `written` does."""
    with written():
        return await asyncio.to_thread(function, *args, **kwargs)


def page_of(ids: list[str], page: Page) -> list[str]:
    """Return the ids behind the page's start, in its order, however many they are."""
    ordered = sorted(ids, reverse=page.newest_first)
    if page.after is None:
        return ordered
    after = page.after
    return [each for each in ordered if (each < after if page.newest_first else each > after)]


def read_page(ids: list[str], page: Page, read: Callable[[str], Kept | None]) -> tuple[list[Kept], bool]:
    """Return a page of what `read` gives for `ids`, and whether there are more; what cannot be decoded is left out."""
    found: list[Kept] = []
    for each in page_of(ids, page):
        try:
            kept = read(each)
        except DecodeError as error:
            log.warning("left out of the listing: %s", error)
            continue
        if kept is None:
            continue
        if len(found) == page.limit:
            return found, True
        found.append(kept)
    return found, False
