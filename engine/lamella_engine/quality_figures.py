"""From two models' logits to figures with intervals: perplexity, divergence, agreement.

Pure arithmetic, in float64. A window is the unit of chance: tokens of one window are not independent of each other, so
every interval comes from how much the windows' sums differ (a paired t interval of a ratio of sums, 95 %), not from the
number of tokens. `quality` calls it; docs/quality.md says how to read the figures.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import torch

from lamella_engine.errors import EngineError

CONFIDENCE = 0.95
_SERIES_LIMIT = 200  # degrees of freedom up to which the distribution is summed up exactly
_BISECTIONS = 80
_LARGEST_LOG = 700.0  # the largest float is near e^709; an end of an interval of that size says it all
_FAR = 1e3  # beyond every quantile that is asked for


@dataclass(frozen=True)
class Figure:
    """A figure and its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Figures:
    """What two models' logits say.

    Attributes:
        reference_perplexity, candidate_perplexity: e to the mean negative log-probability of the text's own tokens.
        perplexity_ratio: the candidate's by the reference's, paired: both saw the same windows.
        divergence: mean Kullback-Leibler divergence from the reference to the candidate, nats a token.
        divergence_p99: the divergence that 99 % of the tokens do not exceed.
        agreement: share of tokens for which both models' first choice is the same.
        tokens, windows: how many were scored.
    """

    reference_perplexity: Figure
    candidate_perplexity: Figure
    perplexity_ratio: Figure
    divergence: Figure
    divergence_p99: float
    agreement: Figure
    tokens: int
    windows: int


@dataclass(frozen=True)
class Scores:
    """Some tokens, one number each, float64 on the host: negative log-probabilities, divergence, and 1 if agreed."""

    reference: torch.Tensor
    candidate: torch.Tensor
    divergence: torch.Tensor
    agreed: torch.Tensor


def score(reference: torch.Tensor, candidate: torch.Tensor, targets: torch.Tensor) -> Scores:
    """Compare logits [n, vocabulary] of two models; `targets` [n] are the text's own tokens.

    Raises:
        EngineError: a model gives a token no probability that is a number.
    """
    if reference.shape != candidate.shape:
        raise EngineError(
            f"the reference has logits for {reference.shape[-1]} tokens and the candidate for {candidate.shape[-1]}: "
            "they are not the same model, and cannot be compared"
        )
    is_same = (reference.argmax(-1) == candidate.argmax(-1)).double()
    known = torch.log_softmax(reference.double(), -1)
    found = torch.log_softmax(candidate.double(), -1)
    place = targets[:, None]
    own, other = -known.gather(-1, place)[:, 0], -found.gather(-1, place)[:, 0]
    _check_numbers("reference", own)
    _check_numbers("candidate", other)
    # Where the reference gives nothing, nothing is added: 0 log 0 = 0.
    terms = known.sub(found).mul_(known.exp_()).nan_to_num_(nan=0.0, posinf=math.inf, neginf=-math.inf)
    divergence = terms.sum(-1).clamp_(min=0.0)  # rounding can bring it below
    _check_numbers("candidate", divergence)
    return Scores(own.cpu(), other.cpu(), divergence.cpu(), is_same.cpu())


def summarise(scores: list[Scores], windows: list[int]) -> Figures:
    """The figures of all `scores`; ``scores[i]`` is a part of window ``windows[i]``, of 0, 1, 2, ..."""
    own, other = (torch.cat([getattr(part, name) for part in scores]) for name in ("reference", "candidate"))
    divergence = torch.cat([part.divergence for part in scores])
    agreed = torch.cat([part.agreed for part in scores])
    sizes = torch.tensor([len(part.agreed) for part in scores])
    numbers = torch.tensor(windows).repeat_interleave(sizes)
    return Figures(
        reference_perplexity=_exponential(mean_figure(own, numbers)),
        candidate_perplexity=_exponential(mean_figure(other, numbers)),
        perplexity_ratio=_exponential(mean_figure(other - own, numbers)),
        divergence=_not_below_zero(mean_figure(divergence, numbers)),
        divergence_p99=_p99(divergence),
        agreement=share_figure(agreed, numbers),
        tokens=len(own),
        windows=int(numbers.max()) + 1,
    )


def mean_figure(values: torch.Tensor, windows: torch.Tensor) -> Figure:
    """Mean of `values` [n], with the t interval that follows from the differences between windows 0, 1, ..."""
    mean, error, degrees = _mean_and_error(values, windows)
    reach = t_quantile(degrees) * error
    return Figure(mean, mean - reach, mean + reach)


def share_figure(hits: torch.Tensor, windows: torch.Tensor) -> Figure:
    """Share of ones in `hits` [n], with Wilson's interval for as many independent tokens as would differ as much.

    Tokens of a window hang together, so they count as fewer: by the ratio of the variance that independent tokens
    would have to the one that the windows show.
    """
    share, error, degrees = _mean_and_error(hits, windows)
    independent = share * (1 - share) / error**2 if error > 0 else math.inf
    count = min(float(len(hits)), independent)
    z2 = t_quantile(degrees) ** 2
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    reach = math.sqrt(z2) / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2))
    # Rounding must not put the share itself outside.
    return Figure(share, max(0.0, min(share, middle - reach)), min(1.0, max(share, middle + reach)))


def t_quantile(degrees: int) -> float:
    """What Student's t of so many degrees of freedom stays below, in absolute value, with `CONFIDENCE`.

    Up to 200 by bisection of the finite series (Abramowitz and Stegun 26.7.3, 26.7.4), beyond by the first terms of
    the expansion about the normal quantile (26.7.5).
    """
    if degrees > _SERIES_LIMIT:
        z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
        return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
    low, high = 0.0, _FAR
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_within(middle, degrees) < CONFIDENCE else (low, middle)
    return (low + high) / 2


def _t_within(t: float, degrees: int) -> float:
    """Probability that Student's t is within -t and t."""
    angle = math.atan(t / math.sqrt(degrees))
    cosine, sine = math.cos(angle), math.sin(angle)
    is_odd = degrees % 2 == 1
    term = cosine if is_odd else 1.0
    total = 0.0
    for step in range(degrees // 2):
        total += term
        term *= cosine**2 * ((2 * step + 2) / (2 * step + 3) if is_odd else (2 * step + 1) / (2 * step + 2))
    return 2 / math.pi * (angle + sine * total) if is_odd else sine * total


def _mean_and_error(values: torch.Tensor, windows: torch.Tensor) -> tuple[float, float, int]:
    """Mean, its standard error by the windows' sums, and degrees of freedom; windows may be of different lengths."""
    count = int(windows.max()) + 1
    assert count > 1, "windows are made so"
    sums = torch.zeros(count, dtype=torch.float64).index_add_(0, windows, values)
    sizes = torch.bincount(windows).double()
    mean = float(values.mean())
    spread = float((sums - mean * sizes).square().sum()) * count / (count - 1)
    return mean, math.sqrt(spread) / len(values), count - 1


def _p99(values: torch.Tensor) -> float:
    ordered = values.sort().values
    return float(ordered[math.ceil(0.99 * len(ordered)) - 1])


def _exponential(figure: Figure) -> Figure:
    return Figure(*(_exp(value) for value in (figure.value, figure.low, figure.high)))


def _exp(value: float) -> float:
    return math.exp(min(value, _LARGEST_LOG))


def _not_below_zero(figure: Figure) -> Figure:
    return Figure(figure.value, max(0.0, figure.low), figure.high)


def _check_numbers(which: str, values: torch.Tensor) -> None:
    wrong = int((~values.isfinite()).sum())
    if wrong:
        raise EngineError(
            f"the {which} gives {wrong} of {len(values)} tokens no probability that is a number: its weights or its "
            "compute type are at fault; try --dtype float32, and `lamella models verify`"
        )
