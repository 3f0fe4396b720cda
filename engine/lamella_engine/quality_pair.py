"""Two models open at the same time within one budget, and the same windows swept through both.

Owns how the budget is shared, how many windows ride a sweep, and the pages they take. The two sweep one after the
other, then their logits are compared piece by piece, so that never more than a piece of either has to be there.
`quality` drives it; `sweep` runs the windows.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace

import torch

from lamella_engine import architecture
from lamella_engine.architecture import Architecture
from lamella_engine.budget import parse_budget
from lamella_engine.device import available_host_bytes, free_memory_bytes, total_memory_bytes
from lamella_engine.errors import PlanError
from lamella_engine.family_path import FamilyPath
from lamella_engine.kv_cache import PAGE_TOKENS, KVCache, PageTable, pages_for
from lamella_engine.open_model import open_sweep_model
from lamella_engine.options import EngineOptions
from lamella_engine.packing import Span
from lamella_engine.quality_figures import Scores, score
from lamella_engine.quality_text import Window
from lamella_engine.shard import ShardedModel
from lamella_engine.state_pool import StatePool, StateTable
from lamella_engine.stepwise import StepSpan
from lamella_engine.sweep import SweepModel

MIB = 1024**2
PIECE_BYTES = 192 * MIB  # logits that are compared at a time, as both models give them and as they are compared
SPILL_BYTES = 512 * MIB  # of logits that wait in host memory, for each model whose head streams
MAX_SWEEP_TOKENS = 4096
_COMPARED_BYTES = 40  # of a row and a token: twice float32, and four times float64
_PLANNED_BYTES = 32  # that the two plans together count for logits, of each of their sequences
_MAX_PIECE_ROWS = 512
_STATE_TOKENS = 256  # a state's fixed part takes no more pages than so many tokens, see `state_pool.unit_bytes`
_WIDE_SHARE, _NARROW_SHARE = 0.5, 0.25  # of the budget, for the candidate at most


@dataclass(frozen=True)
class PairRequest:
    """Two models to open.

    Attributes:
        reference, candidate: their shards.
        options: of both; budgets are for the two together.
        reference_dtype: compute type of the reference; None means as `options` say.
        window_tokens, scored_tokens: of the longest window.
        num_windows: how many there are.
    """

    reference: ShardedModel
    candidate: ShardedModel
    options: EngineOptions
    reference_dtype: str | None
    window_tokens: int
    scored_tokens: int
    num_windows: int


class ModelPair:
    """Two models that see the same windows; used by one thread at a time. Does not own the models.

    Attributes:
        reference, candidate: the models.
        windows_per_sweep: how many windows both have room for.
    """

    def __init__(self, reference: SweepModel, candidate: SweepModel, window_tokens: int, scored_tokens: int) -> None:
        self.reference = _Side(reference)
        self.candidate = _Side(candidate)
        vocabulary = max(reference.config.vocab_size, candidate.config.vocab_size)
        self._piece_rows = piece_rows(vocabulary)
        self.windows_per_sweep = min(
            side.room(window_tokens, scored_tokens, vocabulary) for side in (self.reference, self.candidate)
        )

    def compare(self, windows: Sequence[Window]) -> Iterator[tuple[int, Scores]]:
        """Sweep `windows`, at most `windows_per_sweep`, through both; number of a window and scores of some of it."""
        assert 0 < len(windows) <= self.windows_per_sweep, "the caller asks for no more"
        targets = [
            (number, piece)
            for number, window in enumerate(windows)
            for piece in torch.split(torch.tensor(window.targets), self._piece_rows)
        ]
        with (
            closing(self.reference.sweep(windows, self._piece_rows)) as known,
            closing(self.candidate.sweep(windows, self._piece_rows)) as found,
        ):
            for (number, piece), first, second in zip(targets, known, found, strict=True):
                yield number, score(first, second.to(first.device), piece.to(first.device))


class _Side:
    """One of the models and the pages of its windows."""

    def __init__(self, model: SweepModel) -> None:
        self.model = model
        self.pool: KVCache | StatePool = model.open_pool()

    def room(self, window_tokens: int, scored_tokens: int, vocabulary: int) -> int:
        """Windows that a sweep can carry, at least one."""
        model = self.model
        limits = [
            model.plan.sweep_tokens // window_tokens,
            self.pool.free_pages // max(1, self.pool.pages_for(window_tokens)),
        ]
        if model.plan.head.num_blocks:
            spilled = scored_tokens * vocabulary * model.dtype.itemsize
            limits.append(1 if model.path is FamilyPath.STEPWISE else SPILL_BYTES // spilled)
        return max(1, min(limits))

    def sweep(self, windows: Sequence[Window], rows: int) -> Generator[torch.Tensor, None, None]:
        """Logits of what the windows score, in pieces of at most `rows` rows."""
        tables: list[PageTable | StateTable] = []
        try:
            spans: list[Span | StepSpan] = []
            for window in windows:
                table = self.pool.open_table(len(window.token_ids))
                assert table is not None, "there are pages for as many as `room` says"
                tables.append(table)
                spans.append(table.span(window.token_ids, 0))
            pack = self.model.pack(spans)
            yield from self.model.run_rows(pack, self.pool, [len(window.targets) for window in windows], rows)
        finally:
            for table in tables:
                self.pool.release(table)  # type: ignore[arg-type]  # each pool made its own tables


def piece_rows(vocabulary: int) -> int:
    """Rows of logits that are compared at a time."""
    return max(1, min(_MAX_PIECE_ROWS, PIECE_BYTES // (_COMPARED_BYTES * vocabulary)))


@contextmanager
def open_pair(request: PairRequest, device: torch.device) -> Iterator[ModelPair]:
    """Open both models, with room for as many windows a sweep as the budgets allow.

    Raises:
        PlanError: the two do not fit the budgets, even with a window at a time.
        ModelError, DeviceError: as for one model.
    """
    with ExitStack() as resources:
        yield _open(request, device, resources)


def _open(request: PairRequest, device: torch.device, resources: ExitStack) -> ModelPair:
    config = architecture.load_config(request.reference.directory)
    built = architecture.build(config, torch.float32)
    most = max(1, min(request.num_windows, MAX_SWEEP_TOKENS // request.window_tokens))
    counts = [most >> step for step in range(most.bit_length())]
    attempts = [(count, _WIDE_SHARE) for count in counts] + [(1, _NARROW_SHARE)]
    refusal: PlanError | None = None
    for count, share in attempts:
        with ExitStack() as attempt:
            try:
                models = _open_both(request, _options(request, built, count), share, device, attempt)
            except PlanError as error:
                refusal = error if share == _WIDE_SHARE else refusal
                continue
            resources.push(attempt.pop_all())
        pair = ModelPair(*models, request.window_tokens, request.scored_tokens)
        pair.windows_per_sweep = min(count, pair.windows_per_sweep)
        resources.callback(pair.reference.pool.close)
        resources.callback(pair.candidate.pool.close)
        return pair
    assert refusal is not None, "there was an attempt"
    raise PlanError(
        f"{refusal} Both models, full and packed, are open at the same time and share the budget (the first of them "
        "gets half of it): give more, or a smaller --window.",
        refusal.missing_bytes,
    ) from refusal


def _options(request: PairRequest, built: Architecture, count: int) -> EngineOptions:
    """Room for `count` windows, and for a piece of logits."""
    vocabulary = int(built.config.vocab_size)
    is_stepwise = built.path is FamilyPath.STEPWISE
    rows = -(-min(piece_rows(vocabulary), request.scored_tokens) * _COMPARED_BYTES // _PLANNED_BYTES)
    sequences = max(rows, request.scored_tokens) if is_stepwise else rows
    pages = pages_for(request.window_tokens + (_STATE_TOKENS if is_stepwise else 0))
    return replace(
        request.options,
        max_sequences=sequences,
        sweep_tokens=max(count * request.window_tokens, sequences, PAGE_TOKENS),
        kv_tokens=count * pages * PAGE_TOKENS,
    )


def _open_both(
    request: PairRequest, options: EngineOptions, share: float, device: torch.device, resources: ExitStack
) -> tuple[SweepModel, SweepModel]:
    """Open the candidate with no more than `share` of the budgets, then the reference with what that leaves."""
    cap = _DeviceCap(device)
    resources.callback(cap.lift)
    host = torch.device("cpu")
    ram = parse_budget(options.ram, total_memory_bytes(host), available_host_bytes(), "ram")
    vram = 0
    if device.type == "cuda":
        vram = parse_budget(options.vram, total_memory_bytes(device), free_memory_bytes(device), "vram")
    small = replace(options, ram=int(ram * share), vram=int(vram * share))
    candidate = resources.enter_context(closing(open_sweep_model(request.candidate, small, device)))
    cap.lift()
    plan = candidate.plan
    left = replace(
        options,
        dtype=request.reference_dtype or options.dtype,
        ram=max(0, ram - plan.ram.used) if ram else 0,
        vram=max(0, vram - (0 if plan.vram is None else plan.vram.used)),
    )
    reference = resources.enter_context(closing(open_sweep_model(request.reference, left, device)))
    cap.lift(vram)
    return reference, candidate


class _DeviceCap:
    """What this process may take of a GPU: opening a model limits it to that model's budget, which is not all of ours.

    Without a GPU it does nothing.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._is_card = device.type == "cuda"
        if self._is_card:
            torch.cuda.empty_cache()
            self._share = torch.cuda.memory.get_per_process_memory_fraction(device)
            self._taken = torch.cuda.memory_reserved(device)

    def lift(self, budget: int | None = None) -> None:
        """Back to what it was, or to `budget` bytes beside what was taken already."""
        if not self._is_card:
            return
        share = self._share
        if budget is not None:
            share = min(share, (self._taken + budget) / torch.cuda.mem_get_info(self._device)[1])
        torch.cuda.set_per_process_memory_fraction(share, self._device)
