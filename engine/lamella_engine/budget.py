"""Budgets, shares and rates as people write them: bytes, "4GiB", "80%", "auto", "12GB/s".

Owns the forms and their messages, not what is free: callers say that. `planner` takes the bytes, `estimate` the rates.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType

from lamella_engine.errors import OptionError

AUTO_SHARE = 0.8  # of what is free: the rest is for other processes, and for what no budget counts (code, drivers)

_DECIMAL = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
_UNITS: Mapping[str, int] = MappingProxyType(
    {f"{letter}b": 1000**power for letter, power in _DECIMAL.items()}
    | {f"{letter}ib": 1024**power for letter, power in _DECIMAL.items() if letter}
)
_AMOUNT = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([a-z]*)", re.ASCII)
_SHARE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*%", re.ASCII)
_BUDGET_EXAMPLES = 'bytes (4294967296), "4GiB", "4GB", "512 MiB", "80%" or "auto"'
_BYTES_EXAMPLES = 'bytes (4294967296), "4GiB", "4GB" or "512 MiB"'
_RATE_EXAMPLES = '"12GB/s", "500 MB/s", "1.5GiB/s" or bytes a second'
_FLOPS_EXAMPLES = '"6.5T", "900G" or operations a second'


def parse_budget(value: int | str, total: int, free: int, what: str) -> int:
    """The bytes that `value` means.

    ``GB`` is 10^9 and ``GiB`` 2^30, in any case; a percentage is of `total`; ``auto`` is `AUTO_SHARE` of `free`.
    A budget above what is there is not refused here: a plan may be for another machine.

    Args:
        value: as given by the user.
        total: bytes there are, for percentages.
        free: bytes that can still be taken, for ``auto``.
        what: name of the option, for the message.

    Raises:
        OptionError: it is none of these forms, negative, or more than 100 %.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        if value < 0:
            raise _refused(what, value, "a budget cannot be negative", _BUDGET_EXAMPLES)
        return value
    text = value.strip().lower() if isinstance(value, str) else ""
    if text == "auto":
        return int(max(free, 0) * AUTO_SHARE)
    if share := _SHARE.fullmatch(text):
        percent = float(share[1])
        if percent > 100:
            raise _refused(what, value, f"there is no more than 100 % of {total:,} bytes", _BUDGET_EXAMPLES)
        return int(total * percent / 100)
    amount = _amount(text)
    if amount is None:
        raise _refused(what, value, _why(text), _BUDGET_EXAMPLES)
    return amount


def parse_bytes(value: str, what: str) -> int:
    """The bytes that `value`, such as ``4GiB``, means; at least 1.

    Raises:
        OptionError: it is not an amount of bytes, or zero.
    """
    text = value.strip().lower()
    amount = _amount(text)
    if not amount:
        raise _refused(what, value, "nothing fits that" if amount == 0 else _why(text), _BYTES_EXAMPLES)
    return amount


def parse_share(value: str, what: str) -> float:
    """The part of something that ``25%`` means, 0.0 to 1.0; ``auto`` is 0.0.

    Raises:
        OptionError: it is neither.
    """
    text = value.strip().lower()
    if text == "auto":
        return 0.0
    share = _SHARE.fullmatch(text)
    if share is None or float(share[1]) > 100:
        raise _refused(what, value, "it is not a share", '"25%" or "auto"')
    return float(share[1]) / 100


def parse_rate(value: str, what: str) -> float:
    """Bytes a second that `value`, such as ``12GB/s``, means.

    Raises:
        OptionError: it is not a rate, or zero.
    """
    text = value.strip().lower()
    amount = _amount(text.removesuffix("/s").strip())
    if not amount:
        why = "nothing would ever arrive" if amount == 0 else "it is not a number of bytes a second"
        raise _refused(what, value, why, _RATE_EXAMPLES)
    return float(amount)


def parse_flops(value: str, what: str) -> float:
    """Operations a second that `value`, such as ``6.5T`` or ``6.5 TFLOPS``, means; a multiply-add counts as two.

    Raises:
        OptionError: it is not such a number, or zero.
    """
    text = value.strip().lower().removesuffix("/s").removesuffix("flops").strip()
    found = _AMOUNT.fullmatch(text)
    if found is None or found[2] not in {*_DECIMAL, "p"}:
        raise _refused(what, value, "it is not a number of operations a second", _FLOPS_EXAMPLES)
    flops = float(found[1]) * 1000.0 ** {**_DECIMAL, "p": 5}[found[2]]
    if flops < 1:
        raise _refused(what, value, "nothing would ever be computed", _FLOPS_EXAMPLES)
    return flops


def _amount(text: str) -> int | None:
    """Bytes of a number with or without a unit; None if it is neither."""
    found = _AMOUNT.fullmatch(text)
    if found is None or (found[2] and found[2] not in _UNITS):
        return None
    whole, _, fraction = found[1].partition(".")
    if fraction and not found[2]:
        return None  # there is no half byte
    unit = _UNITS.get(found[2], 1)
    # In whole numbers: a float would lose the last bytes of a large one.
    return int(whole) * unit + (int(fraction) * unit // 10 ** len(fraction) if fraction else 0)


def _why(text: str) -> str:
    found = _AMOUNT.fullmatch(text)
    if found is not None and found[2] in _DECIMAL and found[2]:
        return f"{found[2].upper()!r} alone may mean 10^n or 2^n: write {found[2].upper()}B or {found[2].upper()}iB"
    if found is not None and found[2]:
        return f"{found[2]!r} is not a unit of bytes"
    if found is not None:
        return "there are no fractions of a byte"
    return "it is not an amount of bytes"


def _refused(what: str, value: object, why: str, examples: str) -> OptionError:
    return OptionError(f"{what} is {value!r}: {why}. Use {examples}.")
