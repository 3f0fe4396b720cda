"""What people may write for a budget or a rate, and what they are told when it cannot be understood."""

from __future__ import annotations

import pytest

from lamella_engine.budget import AUTO_SHARE, parse_budget, parse_flops, parse_rate
from lamella_engine.errors import OptionError

TOTAL, FREE = 10_000_000_000, 6_000_000_000
BUDGETS: dict[int | str, int] = {
    0: 0,
    4096: 4096,
    "0": 0,
    "4294967296": 4 * 1024**3,
    "4GiB": 4 * 1024**3,
    "4gib": 4 * 1024**3,
    "4GB": 4 * 10**9,
    "512 MiB": 512 * 1024**2,
    " 1.5GiB ": 3 * 1024**3 // 2,
    "0.1kb": 100,
    "16 TiB": 16 * 1024**4,
    "7b": 7,
    "9007199254740993B": 9007199254740993,  # more than a float holds
    "80%": 8_000_000_000,
    "12.5 %": 1_250_000_000,
    "100%": TOTAL,
    "auto": int(FREE * AUTO_SHARE),
    "AUTO": int(FREE * AUTO_SHARE),
}
NOT_BUDGETS: list[int | str] = [
    "", "  ", "-1", -1, "-4GiB", "4 GiBs", "4G", "GiB", "101%", "-5%", "%", "1.5", "1e9", "1_000", "4,5GiB", "inf",
    "nan", "auto 80%", "٤GiB", True,
]  # fmt: skip


@pytest.mark.parametrize("value", BUDGETS, ids=repr)
def test_a_budget_means_bytes(value: int | str) -> None:
    assert parse_budget(value, TOTAL, FREE, "vram") == BUDGETS[value]


@pytest.mark.parametrize("value", NOT_BUDGETS, ids=repr)
def test_what_is_no_budget_is_refused_with_examples(value: int | str) -> None:
    with pytest.raises(OptionError) as caught:
        parse_budget(value, TOTAL, FREE, "vram")

    message = str(caught.value)
    assert message.startswith(f"vram is {value!r}: ")
    assert '"4GiB"' in message
    assert '"80%"' in message


def test_a_unit_that_may_mean_two_things_is_refused_with_both() -> None:
    with pytest.raises(OptionError, match="GB or GiB"):
        parse_budget("4G", TOTAL, FREE, "ram")


def test_auto_of_nothing_is_nothing() -> None:
    assert parse_budget("auto", TOTAL, -5, "vram") == 0


@pytest.mark.parametrize(
    ("text", "rate"),
    [("12GB/s", 12e9), ("500 mb/s", 5e8), ("1.5GiB/s", 1.5 * 1024**3), ("2000000000", 2e9), ("3 GB/s", 3e9)],
)
def test_a_rate_means_bytes_a_second(text: str, rate: float) -> None:
    assert parse_rate(text, "--disk") == rate


@pytest.mark.parametrize("text", ["", "fast", "0", "0GB/s", "-1GB/s", "12G/s", "12GB/h", "80%", "auto"])
def test_what_is_no_rate_is_refused(text: str) -> None:
    with pytest.raises(OptionError, match="--disk is "):
        parse_rate(text, "--disk")


@pytest.mark.parametrize(("text", "flops"), [("6.5T", 6.5e12), ("900 GFLOPS", 9e11), ("1", 1.0), ("1.2P", 1.2e15)])
def test_operations_a_second(text: str, flops: float) -> None:
    assert parse_flops(text, "--flops") == pytest.approx(flops)


@pytest.mark.parametrize("text", ["", "0", "-1T", "many", "6.5TB", "0.5"])
def test_what_is_no_number_of_operations_is_refused(text: str) -> None:
    with pytest.raises(OptionError, match="--flops is "):
        parse_flops(text, "--flops")
