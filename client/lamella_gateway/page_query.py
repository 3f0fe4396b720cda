"""Which page of a list a request asks for: ``after``, ``limit``, ``order``, and no parameter that is not known."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.requests import Request

from lamella_gateway.api_error import ApiError
from lamella_gateway.owned_place import Page, is_id

_SHOWN = 60


def page_query(request: Request, kind: str, most: int, default: int, others: Sequence[str] = ()) -> Page:
    """Return the page that a request asks for.

    Args:
        request: it; of its parameters `others` are somebody else's to read.
        kind: what ids begin with.
        most: the largest page.
        default: its size where the request does not say.

    Raises:
        ApiError: a parameter is unknown or cannot be; it is named.
    """
    given = request.query_params
    for name in given:
        if name not in ("after", "limit", *others):
            raise ApiError(400, f"unknown parameter {name[:_SHOWN]!r}", param=name[:_SHOWN], code="unknown_parameter")
    after = given.get("after")
    if after is not None and not is_id(after, kind):
        raise _invalid("after", after, f"use an id of this list, such as {kind}...")
    order = given.get("order", "desc")
    if order not in ("asc", "desc"):
        raise _invalid("order", order, "use asc or desc")
    limit = given.get("limit", str(default))
    if not (limit.isascii() and limit.isdecimal() and len(limit) <= 6 and 1 <= int(limit) <= most):
        raise _invalid("limit", limit, f"use a whole number from 1 to {most}")
    return Page(int(limit), after, newest_first=order == "desc")


def _invalid(name: str, value: str, fix: str) -> ApiError:
    return ApiError(400, f"{name} is {value[:_SHOWN]!r}; {fix}", param=name, code="invalid_value")
