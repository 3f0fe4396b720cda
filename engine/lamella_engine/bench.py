"""Measures an engine in this process: seconds a sweep at several numbers of sequences, beside the machine's own limit.

Owns the run: calibration, prompts, warm-up, timing and peaks. The engine is used as any caller uses it; `estimate`
makes the limit from bandwidths measured in the same run; `bench_cli` has the options and shows the report.
"""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import combinations, pairwise
from pathlib import Path

import torch

from lamella_engine import architecture
from lamella_engine.architecture import Architecture
from lamella_engine.bench_engine import BenchEngine, ended
from lamella_engine.binding import TORCH_DTYPES
from lamella_engine.calibration import DiskProfile, measure_bandwidths, measure_disk
from lamella_engine.compute_dtype import choose_dtype
from lamella_engine.device import peak_rss_bytes, resolve_device
from lamella_engine.engine import MAX_WAITING, Engine
from lamella_engine.errors import EngineError, OptionError, PlanError
from lamella_engine.estimate import Prediction, predict
from lamella_engine.expansion_times import ExpansionTimes
from lamella_engine.host_memory import peak_pinned_bytes
from lamella_engine.kv_cache import PAGE_TOKENS, pages_for
from lamella_engine.model_sizes import sizes_of_sharded
from lamella_engine.options import EngineOptions
from lamella_engine.outbox import MAX_UNDELIVERED
from lamella_engine.placement import Bandwidths, ModelSizes, Plan, Tier
from lamella_engine.sequence_types import (
    EngineFacts,
    Sampling,
    SequenceRequest,
    SequenceTokens,
)
from lamella_engine.shard import ShardedModel
from lamella_engine.sweep_profile import SweepProfile
from lamella_engine.timeline import StreamTotals

WARM_UP_SWEEPS = 3  # not timed: read-ahead settles, repeated shapes are recorded
# The engine stalls once nobody takes its events, so a first sequence is so many sweeps ahead of the last submitted.
_HEAD_START = MAX_UNDELIVERED + 2
_CLEAR_PEAK = "5"  # what the kernel takes as the order to forget the peak, see proc_pid_clear_refs(5)
_PROMPT_SPAN = 1000  # prompts use so many ids of the vocabulary, behind the first few, which tend to be special


@dataclass(frozen=True)
class BenchRequest:
    """What to measure.

    Attributes:
        sequences: how many decode side by side, one measurement each.
        tokens: sweeps that are timed in each, every one a token for each sequence.
        prompt_tokens: length of the prompts.
        options: of the engine; sequences and, unless given, tokens of cache are set to what is measured.
        trace: file for a Chrome trace of the last sweeps, or None.
    """

    sequences: tuple[int, ...]
    tokens: int
    prompt_tokens: int
    options: EngineOptions
    trace: Path | None = None

    def __post_init__(self) -> None:
        for count in self.sequences or (0,):
            if not 1 <= count <= MAX_WAITING:
                raise OptionError(f"--sequences names {count}; use numbers from 1 to {MAX_WAITING}, such as 1,8,64")
        for option, value in (("--tokens", self.tokens), ("--prompt-tokens", self.prompt_tokens)):
            if value < 1:
                raise OptionError(f"{option} is {value}; it must be at least 1")
        if self.trace is not None and not self.trace.parent.is_dir():
            raise OptionError(f"--trace: there is no directory {self.trace.parent}; make it first")
        if self.trace is not None and self.trace.is_dir():
            raise OptionError(f"--trace: {self.trace} is a directory; name a file in it")

    @property
    def generated_tokens(self) -> int:
        """Tokens a sequence may generate: those it is asked for, and those it is ahead of the last to begin.

        Each sequence that reads its prompt gets at least a token of every sweep, so none waits longer than the
        prompt is long.
        """
        ahead = self.prompt_tokens + _HEAD_START if max(self.sequences) > 1 else 0
        return WARM_UP_SWEEPS + self.tokens + ahead

    @property
    def sequence_tokens(self) -> int:
        """Tokens of cache that a sequence needs: whole pages, and one to grow into."""
        return (pages_for(self.prompt_tokens + self.generated_tokens) + 1) * PAGE_TOKENS

    def engine_options(self, context_length: int) -> EngineOptions:
        """The engine's options, with room for the most sequences.

        Raises:
            OptionError: the sequences do not fit the model's context, or the cache that was asked for.
        """
        length, most = self.prompt_tokens + self.generated_tokens, max(self.sequences)
        if length > context_length:
            raise OptionError(
                f"a sequence would have {length} tokens ({self.prompt_tokens} of prompt, up to {self.generated_tokens} "
                f"generated), and the model's context has {context_length}; lower --prompt-tokens or --tokens"
            )
        needed, given = most * self.sequence_tokens, self.options.kv_tokens
        if given is not None and given < needed:
            raise OptionError(
                f"{most} sequences of up to {length} tokens need {needed} tokens of cache, and --kv-tokens is {given}; "
                f"give at least {needed}, leave it out, or lower --sequences, --prompt-tokens or --tokens"
            )
        return dataclasses.replace(
            self.options, max_sequences=most, kv_tokens=given or needed, trace=self.trace is not None
        )


@dataclass(frozen=True)
class BenchRow:
    """One number of sequences.

    Attributes:
        num_sequences: that decoded side by side.
        seconds: of each timed sweep, in order; `s_per_sweep` is their median.
        tokens_per_second: of all sequences together.
        limit: what the plan could reach at best with the bandwidths measured; `efficiency` is limit / measured.
        profile: where a timed sweep's bytes came from, and what its time went to.
        expand_s_per_layer: seconds of expanding that a layer takes, in the mean over all layers.
        other_s_per_layer: what else a layer takes once its bytes are there, in the mean; a head in blocks included.
        preemptions: sequences sent back to wait meanwhile.
    """

    num_sequences: int
    seconds: tuple[float, ...]
    s_per_sweep: float
    tokens_per_second: float
    limit: Prediction
    efficiency: float
    profile: SweepProfile
    expand_s_per_layer: float
    other_s_per_layer: float
    preemptions: int


@dataclass(frozen=True)
class BenchMemory:
    """Peaks since the engine was opened, in bytes; those of a device are None on a CPU."""

    peak_rss: int
    peak_device_reserved: int | None = None
    peak_device_allocated: int | None = None
    peak_pinned: int | None = None


@dataclass(frozen=True)
class BenchReport:
    """Everything measured.

    Attributes:
        facts, plan: the engine that was measured.
        open_s: seconds that opening it took, shards not counted.
        prompt_tokens: length of the prompts.
        bandwidths: of this machine, measured in this run.
        is_disk_direct: the disk was measured past the file cache.
        rows: by number of sequences.
        expansion: what of a sweep goes to expanding packed weights, measured on its own after the run.
        memory: peaks.
        trace: where the trace was written, or None.
    """

    facts: EngineFacts
    plan: Plan
    open_s: float
    prompt_tokens: int
    bandwidths: Bandwidths
    is_disk_direct: bool
    rows: tuple[BenchRow, ...]
    expansion: ExpansionTimes
    memory: BenchMemory
    trace: Path | None


def run_bench(sharded: ShardedModel, request: BenchRequest, say: Callable[[str], None]) -> BenchReport:
    """Open `sharded` and decode with every number of sequences; `say` is told how far it is.

    Raises:
        OptionError: the request does not go with the model.
        PlanError: the model does not fit the budgets.
        EngineError: the engine failed, or nothing came from it for a long time.
    """
    device = resolve_device(request.options.device)
    built = _build(sharded, request.options, device)
    sizes = sizes_of_sharded(sharded, built)
    options = request.engine_options(sizes.context_length)
    say("measuring disk, memory and arithmetic")
    paths = sharded.layer_files
    disk = measure_disk(paths)
    bandwidths = measure_bandwidths(device, built.model.dtype, disk)
    _reset_peaks(device)
    began_s = time.perf_counter()
    opened = _open(sharded, device, options, request)
    with opened.engine as engine:
        open_s = time.perf_counter() - began_s
        say(f"open after {open_s:.1f} s")
        decoded = [_decode(opened, count, request, int(built.config.vocab_size), say) for count in request.sequences]
        if request.trace is not None:
            engine.write_trace(request.trace)
        plan, facts, memory = engine.plan, engine.facts, _memory(device)
        expansion = opened.expansion_times()
    if plan.layer_bytes(Tier.DISK):
        bandwidths, disk = _faster_disk(bandwidths, disk, paths)
    return BenchReport(
        facts=facts,
        plan=plan,
        open_s=open_s,
        prompt_tokens=request.prompt_tokens,
        bandwidths=bandwidths,
        is_disk_direct=disk.direct,
        rows=tuple(_row(run, sizes, plan, bandwidths, expansion) for run in decoded),
        expansion=expansion,
        memory=memory,
        trace=request.trace,
    )


@dataclass
class _Decoding:
    """What sequences that decode side by side have brought so far; a full sweep brought a token to each of them.

    Attributes:
        count: of the sequences.
        stamps, totals: time and the engine's totals at every full sweep, the warm-up included.
        profile: bytes of any sweep, times of all of them, prompts included.
        preemptions: sequences that the engine sent back to wait.
    """

    count: int
    stamps: list[float] = field(default_factory=list)
    totals: list[StreamTotals] = field(default_factory=list)
    profile: SweepProfile | None = None
    preemptions: int = 0


def _build(sharded: ShardedModel, options: EngineOptions, device: torch.device) -> Architecture:
    """The tree without weights, in the type that the engine computes in."""
    config = architecture.load_config(sharded.directory)
    wanted = None if options.dtype is None else TORCH_DTYPES[options.dtype]
    return architecture.build(config, choose_dtype(wanted, TORCH_DTYPES[sharded.dtype], device, str(config.model_type)))


def _open(sharded: ShardedModel, device: torch.device, options: EngineOptions, request: BenchRequest) -> BenchEngine:
    try:
        return BenchEngine(Engine.open_sharded(sharded, device, options))
    except PlanError as error:
        raise PlanError(
            f"{error} The cache is for {options.max_sequences} sequences of {request.sequence_tokens} tokens each: "
            "lower --sequences need less.",
            error.missing_bytes,
        ) from error


def _decode(
    opened: BenchEngine, count: int, request: BenchRequest, vocabulary: int, say: Callable[[str], None]
) -> _Decoding:
    """Decode with `count` sequences until enough full sweeps were timed, and let the engine come to rest."""
    engine, run, wanted = opened.engine, _Decoding(count), WARM_UP_SWEEPS + request.tokens
    sampling = Sampling(max_tokens=request.generated_tokens, ignore_eos=True)
    live = {f"bench-{count}-{index}" for index in range(count)}
    before = engine.counters()
    # Nothing is taken from the engine meanwhile, or the first sequences would be far ahead of the last.
    for index, name in enumerate(sorted(live)):
        engine.submit(SequenceRequest(name, sampling, prompt_ids=_prompt(index, request.prompt_tokens, vocabulary)))
    for events in opened.batches():
        if len(run.stamps) < wanted and sum(isinstance(event, SequenceTokens) for event in events) == count:
            run.stamps.append(time.perf_counter())
            run.totals.append(engine.counters())
            if len(run.stamps) == wanted:
                for name in live:
                    engine.cancel(name)
        live -= ended(events)
        if not live:
            break
    if len(run.stamps) < wanted:
        raise EngineError(f"{count} sequences ended after {len(run.stamps)} sweeps together; {wanted} were to be timed")
    after = engine.counters()
    run.profile = SweepProfile.between(before, after)
    run.preemptions = after.preemptions - before.preemptions
    seconds = run.stamps[-1] - run.stamps[WARM_UP_SWEEPS - 1]
    say(f"{count} side by side: {request.tokens} sweeps in {seconds:.2f} s")
    return run


def _prompt(index: int, length: int, vocabulary: int) -> tuple[int, ...]:
    """Token ids that differ from prompt to prompt and are the same in every run."""
    first = min(3, vocabulary - 1)
    span = min(vocabulary - first, _PROMPT_SPAN)
    return tuple(first + (index * 31 + place * 7) % span for place in range(length))


def _row(run: _Decoding, sizes: ModelSizes, plan: Plan, bandwidths: Bandwidths, expansion: ExpansionTimes) -> BenchRow:
    timed = run.stamps[WARM_UP_SWEEPS - 1 :]
    seconds = tuple(later - earlier for earlier, later in pairwise(timed))
    median = statistics.median(seconds)
    limit = predict(sizes, plan, bandwidths, run.count)
    profile = _timed_profile(run)
    expand_s = expansion.of_sweep(profile.experts_visited, sizes.experts.count if sizes.experts else 0)
    profile = dataclasses.replace(profile, expand_s=expand_s)
    num_layers = len(plan.layers)
    return BenchRow(
        num_sequences=run.count,
        seconds=seconds,
        s_per_sweep=median,
        tokens_per_second=run.count / median,
        limit=limit,
        efficiency=limit.seconds / median,
        profile=profile,
        expand_s_per_layer=(expand_s - expansion.head_s) / num_layers,
        other_s_per_layer=max(0.0, profile.compute_s - expand_s) / num_layers,
        preemptions=run.preemptions,
    )


def _timed_profile(run: _Decoding) -> SweepProfile:
    """The profile of the timed sweeps alone.

    Totals are seen while the next sweep is under way, and a GPU's grow by whole sweeps: a line through all of them is
    nearer to the truth than the difference of the first and the last. Bytes are those of all sweeps: only the few
    embedding rows differ.
    """
    assert run.profile is not None, "set when the sequences have ended"
    totals = run.totals[WARM_UP_SWEEPS - 1 :]
    compute_s = slope([each.compute_s for each in totals])
    return dataclasses.replace(
        run.profile,
        sweeps=len(totals) - 1,
        read_s=slope([each.read_s for each in totals]),
        copy_s=slope([each.copy_s for each in totals]),
        compute_s=compute_s,
        bubble_s=max(0.0, slope([each.sweep_s for each in totals]) - compute_s),
    )


def slope(values: Sequence[float]) -> float:
    """What a total grows by from one look to the next: the median of all pairs' slopes (Theil and Sen).

    A sweep that was recorded takes many times as long as the others and may be told of late; one such jump at the
    beginning changes a mean, and does not change this. `values` are two at least.
    """
    places = combinations(enumerate(values), 2)
    return statistics.median((later - earlier) / (end - begin) for (begin, earlier), (end, later) in places)


def _faster_disk(bandwidths: Bandwidths, disk: DiskProfile, paths: list[Path]) -> tuple[Bandwidths, DiskProfile]:
    """With the better of two measurements of the disk, one before and one after: others may have used it meanwhile."""
    again = measure_disk(paths)
    best = again if again.bandwidth > disk.bandwidth else disk
    return dataclasses.replace(bandwidths, disk=best.bandwidth), best


def _reset_peaks(device: torch.device) -> None:
    """Forget the peaks of building shards and calibrating, as far as the system can."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text(_CLEAR_PEAK)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _memory(device: torch.device) -> BenchMemory:
    if device.type != "cuda":
        return BenchMemory(peak_rss_bytes())
    return BenchMemory(
        peak_rss=peak_rss_bytes(),
        peak_device_reserved=torch.cuda.max_memory_reserved(device),
        peak_device_allocated=torch.cuda.max_memory_allocated(device),
        peak_pinned=peak_pinned_bytes(),
    )
