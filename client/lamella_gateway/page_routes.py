"""``/`` and ``/ui/``: the web page, read once from the package and served with headers that let nothing else in.

Owns what may be fetched (the files of ``ui/``, by their exact names), their types, caching, and the page's security
policy: scripts, styles and requests of this origin only, nothing inline, no text that becomes markup. The page holds
no data of its own: it asks the API with the reader's key. Neighbours: `fleet_routes`, `job_routes`, `chat`.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from types import MappingProxyType

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from lamella_gateway.api_error import ApiError

INDEX = "index.html"
_TYPES = MappingProxyType(
    {
        "html": "text/html; charset=utf-8",
        "css": "text/css; charset=utf-8",
        "js": "text/javascript; charset=utf-8",
        "svg": "image/svg+xml",
    }
)
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
_HEADERS = MappingProxyType(
    {
        "content-security-policy": POLICY,
        "x-content-type-options": "nosniff",
        "x-frame-options": "DENY",
        "referrer-policy": "no-referrer",
        "cross-origin-opener-policy": "same-origin",
        "cross-origin-resource-policy": "same-origin",
        "permissions-policy": "camera=(), microphone=(), geolocation=()",
        # Always asked for again, answered with 304: a page never runs with the scripts of another version.
        "cache-control": "no-cache",
    }
)


@dataclass(frozen=True)
class PageFile:
    """One file of the page."""

    body: bytes
    media_type: str
    etag: str


async def to_page(request: Request) -> Response:
    """Send the reader to the page; relative, so that it holds behind a proxy's path as well."""
    return RedirectResponse("ui/", 307, {"cache-control": "no-cache"})


async def page(request: Request) -> Response:
    """Return a file of the page, or 304 where the reader has it.

    Raises:
        ApiError: there is no such file.
    """
    name = request.path_params.get("name") or INDEX
    found = page_files().get(name)
    if found is None:
        raise ApiError(404, f"there is no file {name[:80]!r}; the page is at /ui/", code="not_served")
    headers = {**_HEADERS, "etag": found.etag}
    known = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
    if found.etag in known or known == ["*"]:
        return Response(status_code=304, headers=headers)
    return Response(found.body, headers={**headers, "content-type": found.media_type})


@cache
def page_files() -> dict[str, PageFile]:
    """Return the files of the page by name."""
    found = {}
    for entry in files("lamella_gateway").joinpath("ui").iterdir():
        media_type = _TYPES.get(entry.name.rpartition(".")[2])
        if media_type is not None and entry.is_file():
            body = entry.read_bytes()
            found[entry.name] = PageFile(body, media_type, f'"{hashlib.sha256(body).hexdigest()[:32]}"')
    return found


ROUTES = (
    Route("/", to_page, methods=["GET"]),
    Route("/ui", to_page, methods=["GET"]),
    Route("/ui/", page, methods=["GET"]),
    Route("/ui/{name}", page, methods=["GET"]),
)
