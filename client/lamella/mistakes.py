"""Words for a caller's mistake in an argument: the key, the value, what is wrong, and the keys that are known.

Owns no rule of any argument. Neighbours: `request_draft` and `answer_terms`, which find the mistakes.
"""

from __future__ import annotations

import difflib

from pydantic import ValidationError


def explained(error: ValidationError, where: str, known: tuple[str, ...]) -> str:
    """Say the first mistake: key, value, what is wrong, and the known keys if the key is not one."""
    first = error.errors(include_url=False)[0]
    if not first["loc"]:  # of the whole; it is not shown
        return f"{where.rstrip('.')}: {first['msg'].removeprefix('Value error, ')}"
    key = str(first["loc"][0])
    place = where + key + "".join(f"[{part}]" for part in first["loc"][1:])
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, known, n=len(known), cutoff=0.5)
        ordered = ", ".join([*near, *(name for name in known if name not in near)])
        hint = f"did you mean {near[0]!r}? " if near else ""
        return f"unknown key {place!r}; {hint}known keys: {ordered}"
    if first["type"] == "missing":
        return f"{place} is missing; the keys are {', '.join(known)}"
    wrong = first["msg"].removeprefix("Value error, ").replace("valid tuple", "list")
    return f"{place} is {shown(first['input'])}: {wrong[0].lower()}{wrong[1:]}"


def shown(value: object) -> str:
    """Return `value` as it would be written in Python, cut to a length that fits a message."""
    try:
        text = repr(value)
    except ValueError:  # Python writes out no integer of more than 4300 digits
        text = "a number with thousands of digits"
    return text if len(text) <= 60 else f"{text[:57]}..."
