"""Measures what a packed model loses: the same text through it and through the model in full precision, token by token.

Owns the run from text to report. `quality_text` makes windows, `quality_pair` sweeps them through both models,
`quality_figures` turns logits into figures; `quality_cli` has the options and shows the report.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Final

from lamella_engine import architecture
from lamella_engine.device import resolve_device
from lamella_engine.errors import ModelError, OptionError
from lamella_engine.kv_shape import context_tokens
from lamella_engine.options import EngineOptions
from lamella_engine.progress import MEASURE, Progress, silent
from lamella_engine.quality_figures import Figures, Scores, summarise
from lamella_engine.quality_pair import ModelPair, PairRequest, open_pair
from lamella_engine.quality_text import MIN_WINDOW, QualityText, Window, windows_of
from lamella_engine.shard import ShardedModel
from lamella_engine.text import load_codec

DEFAULT_WINDOW: Final = 512
DEFAULT_TOKENS: Final = 20480


@dataclass(frozen=True)
class QualityRequest:
    """What to measure.

    Attributes:
        text: what both models read.
        options: of both; budgets are for the two together.
        reference_dtype: compute type of the reference; None means as `options` say.
        tokens: how many are scored at most.
        window: tokens of a window; None means 512, or the model's context where that is less.
    """

    text: QualityText
    options: EngineOptions
    reference_dtype: str | None = None
    tokens: int = DEFAULT_TOKENS
    window: int | None = None

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise OptionError(f"--tokens is {self.tokens}; it must be at least 1")
        if self.window is not None and self.window < MIN_WINDOW:
            raise OptionError(f"--window is {self.window}; it must be at least {MIN_WINDOW}")


@dataclass(frozen=True)
class ModelFacts:
    """One of the two: its shards, their bytes, and the type it computed in."""

    name: str
    size_bytes: int
    dtype: str


@dataclass(frozen=True)
class QualityReport:
    """Everything measured.

    Attributes:
        reference, candidate: the two models.
        figures: what their logits say.
        text, text_sha256: what they read.
        window: tokens of a window.
        device: where they computed.
        windows_per_sweep, sweeps: how many windows rode a sweep, and how many sweeps each model made.
        seconds: of it all, models opened included.
    """

    reference: ModelFacts
    candidate: ModelFacts
    figures: Figures
    text: str
    text_sha256: str
    window: int
    device: str
    windows_per_sweep: int
    sweeps: int
    seconds: float


def run_quality(
    reference: ShardedModel, candidate: ShardedModel, request: QualityRequest, progress: Progress | None = None
) -> QualityReport:
    """Sweep the text through both models and compare; `progress` is told how many tokens are scored.

    Raises:
        OptionError: the request does not go with the model or the text.
        PlanError: the two models do not fit the budgets.
        ModelError: a model cannot run, or has no tokenizer.
        EngineError: a model gives logits that are no numbers.
    """
    began_s = time.perf_counter()
    device = resolve_device(request.options.device)
    config = architecture.load_config(reference.directory).get_text_config(decoder=True)
    window = _window(request, context_tokens(config))
    windows = windows_of(request.text, _tokenizer(reference), int(config.vocab_size), window, request.tokens)
    longest = windows[0]
    wanted = PairRequest(
        reference=reference,
        candidate=candidate,
        options=request.options,
        reference_dtype=request.reference_dtype,
        window_tokens=len(longest.token_ids),
        scored_tokens=len(longest.targets),
        num_windows=len(windows),
    )
    with open_pair(wanted, device) as pair:
        figures = _measure(pair, windows, progress or silent)
        each = pair.windows_per_sweep
        return QualityReport(
            reference=_facts(reference, pair.reference.model.dtype),
            candidate=_facts(candidate, pair.candidate.model.dtype),
            figures=figures,
            text=request.text.title,
            text_sha256=request.text.digest,
            window=window,
            device=str(device),
            windows_per_sweep=each,
            sweeps=-(-len(windows) // each),
            seconds=time.perf_counter() - began_s,
        )


def _window(request: QualityRequest, context: int) -> int:
    if request.window is not None and request.window > context:
        raise OptionError(f"--window is {request.window}, and the model's context has {context} tokens; give no more")
    window = request.window or min(DEFAULT_WINDOW, context)
    if window < MIN_WINDOW:
        raise OptionError(f"the model's context has {context} tokens; a window needs at least {MIN_WINDOW}")
    return window


def _tokenizer(sharded: ShardedModel) -> Any:
    codec = load_codec(sharded.directory)
    if codec is None:
        raise ModelError(
            f"{sharded.name} has no tokenizer, so no text can be brought to its tokens; import it again from a "
            "directory that holds tokenizer.json or tokenizer.model as well"
        )
    return codec.tokenizer


def _measure(pair: ModelPair, windows: list[Window], report: Progress) -> Figures:
    total = sum(len(window.targets) for window in windows)
    scores: list[Scores] = []
    numbers: list[int] = []
    done = 0
    report(MEASURE, done, total)
    for first in range(0, len(windows), pair.windows_per_sweep):
        for number, piece in pair.compare(windows[first : first + pair.windows_per_sweep]):
            scores.append(piece)
            numbers.append(first + number)
            done += len(piece.agreed)
            report(MEASURE, done, total)
    return summarise(scores, numbers)


def _facts(sharded: ShardedModel, dtype: object) -> ModelFacts:
    return ModelFacts(sharded.name, sharded.size_bytes, str(dtype).removeprefix("torch."))
