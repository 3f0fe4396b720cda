"""Intervals from differences between windows: right in size, paired, honest where little is known."""

from __future__ import annotations

import math

import pytest
import torch

from lamella_engine.quality_figures import Scores, mean_figure, share_figure, summarise, t_quantile

# Two-sided 95 %, from published tables.
T_TABLE = {1: 12.706205, 2: 4.302653, 3: 3.182446, 5: 2.570582, 10: 2.228139, 29: 2.045230, 30: 2.042272, 120: 1.979930}


@pytest.mark.parametrize(("degrees", "quantile"), T_TABLE.items())
def test_quantiles_are_those_of_the_tables(degrees: int, quantile: float) -> None:
    assert t_quantile(degrees) == pytest.approx(quantile, abs=2e-6)


def test_quantiles_fall_towards_the_normal_one_without_a_step() -> None:
    falling = [t_quantile(degrees) for degrees in (199, 200, 201, 202, 10**4, 10**7)]

    assert falling == sorted(falling, reverse=True)
    assert falling[1] - falling[2] == pytest.approx(falling[2] - falling[3], rel=0.05)
    assert falling[-1] == pytest.approx(1.959964, abs=1e-6)


def drawn(windows: int, each: int, between: float, within: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers with mean 2 that differ between windows as well as within; the last window is shorter."""
    random = torch.Generator().manual_seed(seed)
    levels = 2 + between * torch.randn(windows, generator=random, dtype=torch.float64)
    values = (levels[:, None] + within * torch.randn(windows, each, generator=random, dtype=torch.float64)).flatten()
    numbers = torch.arange(windows).repeat_interleave(each)
    cut = each // 2
    return values[:-cut], numbers[:-cut]


def by_window(whole: Scores, numbers: torch.Tensor) -> list[Scores]:
    rows = [numbers == number for number in range(int(numbers.max()) + 1)]
    return [
        Scores(whole.reference[row], whole.candidate[row], whole.divergence[row], whole.agreed[row]) for row in rows
    ]


@pytest.mark.parametrize(("windows", "between"), [(3, 0.0), (4, 0.5), (40, 0.5), (40, 0.0)])
def test_intervals_cover_the_truth_as_often_as_they_say(windows: int, between: float) -> None:
    hits = 0
    for seed in range(600):
        figure = mean_figure(*drawn(windows, 30, between, 1.0, seed))
        hits += figure.low <= 2 <= figure.high

    assert 0.91 <= hits / 600 <= 0.99


def test_tokens_that_hang_together_count_as_fewer() -> None:
    numbers = torch.arange(20).repeat_interleave(50)
    alike = (torch.arange(20) % 2).repeat_interleave(50).double()  # a window agrees as a whole or not at all
    mixed = (torch.arange(1000) % 2).double()

    wide, narrow = share_figure(alike, numbers), share_figure(mixed, numbers)

    assert wide.value == narrow.value == 0.5
    assert wide.high - wide.low > 5 * (narrow.high - narrow.low)
    assert narrow.low == pytest.approx(0.5 - 2.093 * math.sqrt(0.25 / 1000), abs=1e-3)  # as independent ones would


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_share_of_all_or_none_is_not_taken_for_certain(share: float) -> None:
    figure = share_figure(torch.full((500,), share, dtype=torch.float64), torch.arange(10).repeat_interleave(50))

    assert figure.value == share
    assert 0 < figure.high - figure.low < 0.02
    assert 0 <= figure.low <= share <= figure.high <= 1


def test_the_ratio_is_paired() -> None:
    own, numbers = drawn(12, 20, 2.0, 1.0, 5)
    shift = torch.full_like(own, 0.01)
    whole = Scores(own, own + shift, shift, torch.ones_like(own))

    figures = summarise(by_window(whole, numbers), list(range(12)))

    assert figures.perplexity_ratio.value == pytest.approx(math.exp(0.01))
    assert figures.perplexity_ratio.high - figures.perplexity_ratio.low < 1e-9
    assert figures.reference_perplexity.high / figures.reference_perplexity.low > 2
    assert (figures.tokens, figures.windows) == (len(own), 12)


def test_pieces_of_a_window_are_one_window() -> None:
    own, numbers = drawn(6, 10, 1.0, 1.0, 1)
    windows = by_window(Scores(own, own * 1.1, own.abs() / 100, (own > 2).double()), numbers)
    halves, places = [], []
    for number, part in enumerate(windows):
        for rows in (slice(0, 3), slice(3, None)):
            fields = (part.reference, part.candidate, part.divergence, part.agreed)
            halves.append(Scores(*(field[rows] for field in fields)))
            places.append(number)

    assert summarise(halves, places) == summarise(windows, list(range(6)))


def test_the_99th_percentile_is_one_of_the_values() -> None:
    values = torch.arange(200, dtype=torch.float64)
    parts = [
        Scores(values[rows], values[rows], values[rows], values[rows] % 2) for rows in (slice(100), slice(100, 200))
    ]

    assert summarise(parts, [0, 1]).divergence_p99 == 197.0
