"""``/openapi.json``: the description of what is served, made once."""

from __future__ import annotations

import json
from functools import cache

from starlette.requests import Request
from starlette.responses import Response

from lamella_gateway.openapi import document


async def openapi(request: Request) -> Response:
    """Return the OpenAPI document."""
    return Response(_text(), media_type="application/json")


@cache
def _text() -> bytes:
    return json.dumps(document()).encode()
