"""One sweep: every layer of the model passes the compute device once, for all sequences together.

Owns the model in memory: what lies outside the layers, and the binding of each layer to the bytes that the weight
stream brings. `Model.forward` of transformers is kept as it is; only the layers' own forward is wrapped.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import nn

from lamella_engine import architecture
from lamella_engine.alibi import slopes_of
from lamella_engine.architecture import Architecture
from lamella_engine.attention import IMPLEMENTATION, sweep_attention
from lamella_engine.binding import LayerBinding
from lamella_engine.disk_reader import ALL_TOKENS
from lamella_engine.errors import EngineError
from lamella_engine.expansion_times import ExpansionClock, ExpansionTimes
from lamella_engine.family_path import FamilyPath
from lamella_engine.graph_recorder import Recorder
from lamella_engine.kv_cache import KVCache
from lamella_engine.kv_shape import context_tokens
from lamella_engine.layer_graphs import DecodeBucket, LayerGraphs, RecordError
from lamella_engine.model_sizes import sizes_of_sharded
from lamella_engine.packing import Pack, PackedSweep, Span
from lamella_engine.placement import Plan, Tier
from lamella_engine.row_logits import RowLogits, rows_of
from lamella_engine.sequence_state import StateForward
from lamella_engine.sequence_types import PlanFacts
from lamella_engine.shard import ShardedModel
from lamella_engine.state_pool import StatePool, unit_bytes
from lamella_engine.stepwise import Forward, SideBySide, StepPack, StepSpan
from lamella_engine.streamed_head import StreamedHead
from lamella_engine.timeline import Timeline
from lamella_engine.weight_stream import BoundSlot, WeightStream
from lamella_engine.workspace import bytes_beside, gather_tokens


@dataclass(frozen=True)
class StreamedWeights:
    """Where the weights are, the layers' places for them, what brings them, and who is told of it.

    `recorder` records what decoding layers launch, all but those of the layers `unrecorded`; None where nothing is
    recorded. `head` is the one that passes in blocks, if it does.
    """

    plan: Plan
    bindings: list[LayerBinding]
    stream: WeightStream
    timeline: Timeline
    recorder: Recorder | None = None
    unrecorded: frozenset[int] = frozenset()
    head: StreamedHead | None = None


class SweepModel:
    """A model whose weights are where its plan says; used by one thread at a time, closed by its owner.

    `open_model.open_sweep_model` makes one.

    Attributes:
        sharded: the shards it runs from.
        plan: where everything is.
        plan_facts: the plan in figures, set by whoever opened the model.
        timeline: what moved, and when.
        swept_bytes: weight bytes that the last sweep moved, from disk or from RAM to a device.
        device, dtype: where and in which type it computes.
        path: how sequences meet its layers.
        reads_whole: a prompt must be read in one step.
        config: the text model's transformers config.
    """

    def __init__(
        self,
        sharded: ShardedModel,
        built: Architecture,
        weights: StreamedWeights,
        device: torch.device,
        resources: ExitStack,
    ) -> None:
        plan = weights.plan
        self.sharded = sharded
        self.plan = plan
        self.plan_facts: PlanFacts | None = None
        self.timeline = weights.timeline
        self.device = device
        self.dtype: torch.dtype = built.model.dtype
        self.config = built.config
        self.family = built.family
        self._tier_bytes = (plan.layer_bytes(Tier.DISK), plan.layer_bytes(Tier.RAM), plan.layer_bytes(Tier.VRAM))
        self.swept_bytes = 0
        self._model = built.model
        self._keeps_rows = "logits_to_keep" in signature(self._model.forward).parameters
        self._windows = architecture.sliding_windows(built.config, len(built.layers))
        slopes = slopes_of(built.config)
        self._slopes = None if slopes is None else torch.tensor(slopes, dtype=torch.float32, device=device)
        self._bindings = weights.bindings
        self._stream = weights.stream
        self._unrecorded = weights.unrecorded
        self._streamed_head = weights.head
        self._recorder = weights.recorder
        self._gather_tokens = gather_tokens(plan.kv_bytes, plan.kv_tokens * len(built.layers))
        self._graphs = LayerGraphs(self.device, weights.recorder, self._gather_tokens)
        self._bucket: DecodeBucket | None = None
        self._resources = resources
        self._layers_run = 0
        self._is_interrupted = False  # a sweep failed half-way, the stream is not at the first layer
        self.path = built.path
        self._sizes = None if built.state_size is None else sizes_of_sharded(sharded, built)
        self._state_size = built.state_size
        self._context_tokens = context_tokens(built.config)
        self.reads_whole = built.path is FamilyPath.STEPWISE and not built.reads_in_parts
        self._state_forward: StateForward | None = None
        if built.path is FamilyPath.STEPWISE:
            self._state_forward = StateForward(self._model, device)
            head = self._model.get_output_embeddings()
            self._side_by_side = SideBySide(
                built.layers, head, () if self._state_size is None else self._state_size.in_modules
            )
        else:
            self._model.set_attn_implementation(IMPLEMENTATION)
            owner = self._model.get_submodule(built.layers_path.rpartition(".")[0])
            self._row_logits = RowLogits(owner, self._model.get_output_embeddings())
            for index, layer in enumerate(built.layers):
                layer.forward = self._streamed(index, layer.forward)

    @property
    def keeps_state(self) -> bool:
        """False for families that compute the whole text again for every token."""
        return self._state_forward is None or self._state_forward.keeps_state

    def open_pool(self) -> KVCache | StatePool:
        """What its sequences are to run in; the caller closes it."""
        if self._state_size is None:
            return KVCache(self.plan.kv_tokens, self.device)
        assert self._sizes is not None, "what has states has their sizes"
        unit = unit_bytes(self._state_size, self._context_tokens)
        beside = partial(bytes_beside, self._sizes, self.plan.sweep_tokens, self.plan.kv_tokens)
        return StatePool(self.plan.kv_tokens, self._state_size, unit, beside)

    def pack(self, spans: Sequence[Span | StepSpan]) -> Pack | StepPack:
        """Pack the spans of the next sweep, which `run` then takes; always with the same cache, as graphs know it."""
        if self._state_forward is not None:
            return StepPack(tuple(span for span in spans if isinstance(span, StepSpan)))
        return self._packed_row([span for span in spans if isinstance(span, Span)])

    def _packed_row(self, spans: list[Span]) -> Pack:
        with torch.inference_mode():
            self._bucket = self._graphs.bucket(spans)
            return PackedSweep(spans, self.device, self._gather_tokens) if self._bucket is None else self._bucket.pack

    def run(self, pack: Pack | StepPack, cache: KVCache | StatePool) -> torch.Tensor:
        """Run one sweep, from the first layer whatever became of the one before.

        Returns:
            Logits of each span's last token, float32 [number of spans, vocabulary], in pack order.

        Raises:
            ShardError: a shard could not be read.
            EngineError: the model did not call its layers once each, in order.
        """
        before = self._begin_sweep(pack)
        with torch.inference_mode():
            if isinstance(pack, StepPack):
                logits = torch.stack(self._side_by_side.run(self._steps(pack), self._bring_layer, self._stream.release))
            else:
                assert isinstance(cache, KVCache), "`open_pool` gave it"
                logits = self._run_row(pack, cache)
            logits = logits.float()
        self._end_sweep(before)
        return logits

    def run_heard(self, pack: Pack | StepPack, cache: KVCache | StatePool) -> tuple[torch.Tensor, torch.Tensor]:
        """As `run`, with what the head is given: hidden states of all rows, [T, width]; on the packed path only.

        Raises:
            As `run`.
        """
        with self._row_logits.heard() as heard:
            logits = self.run(pack, cache)
        assert heard.hidden is not None, "the model ran"
        return logits, heard.hidden

    def run_rows(
        self, pack: Pack | StepPack, cache: KVCache | StatePool, counts: Sequence[int], piece_rows: int
    ) -> Generator[torch.Tensor, None, None]:
        """Run one sweep as `run` does, for logits of each span's last `counts[i]` tokens, in pieces.

        The whole sweep runs before the first piece; nothing else may run until the last one, or until the iterator is
        closed. What is held besides a piece: on the packed path nothing, unless the head streams, then the logits of
        all rows in host memory; on the stepwise path those of one span, of all of them where the head streams.

        Returns:
            Logits, float32 [at most `piece_rows`, vocabulary], in the order in which the spans were packed; a piece
            belongs to one span.

        Raises:
            As `run`.
        """
        before = self._begin_sweep(pack)
        if isinstance(pack, StepPack):
            pieces = self._step_pieces(pack, counts, piece_rows)
        else:
            assert isinstance(cache, KVCache), "`open_pool` gave it"
            pieces = self._row_pieces(pack, cache, counts, piece_rows)
        with closing(pieces):
            while True:
                with torch.inference_mode():  # not across a yield: the caller would compute in it as well
                    piece = next(pieces, None)
                if piece is None:
                    break
                yield piece.float()
        self._end_sweep(before)

    def expansion_times(self) -> ExpansionTimes:
        """Measure what bringing weights to the compute type takes in a sweep, in a sweep that does nothing else.

        Raises:
            ShardError: a shard could not be read.
        """
        clock = ExpansionClock(self.device, self._recorder if self._graphs.is_enabled else None)
        self._is_interrupted = True  # the next sweep begins anew, with what it needs
        self._stream.expect(ALL_TOKENS)
        self._stream.rewind()
        layers_s, experts_s, head = [], [], self._streamed_head
        with torch.inference_mode():
            for number, binding in enumerate(self._bindings):
                slot = self._stream.acquire(number)
                timed = partial(clock.seconds, is_recorded=number not in self._unrecorded)
                layers_s.append(timed(partial(binding.expand, slot)) if binding.expands(slot) else 0.0)
                if layers_s[-1] and self._stream.fetches(number):
                    rest_s = timed(partial(binding.expand, slot._replace(is_sparse=True)))
                    experts_s.append(max(0.0, layers_s[-1] - rest_s))
                self._stream.release(number)
            head_s = 0.0 if head is None else sum(self._timed_blocks(head, clock))
        return ExpansionTimes(tuple(layers_s), head_s, sum(layers_s) + head_s, sum(experts_s), len(experts_s))

    def _timed_blocks(self, head: StreamedHead, clock: ExpansionClock) -> Iterator[float]:
        for number in head.pieces:
            yield clock.seconds(partial(head.expand, number, self._stream.acquire(number)), is_recorded=False)
            self._stream.release(number)

    def close(self) -> None:
        """Stop reading and drop the weights; idempotent."""
        self._stream.close()
        self._graphs.close()
        self._bucket = None
        for binding in self._bindings:
            binding.unbind()
        if self._streamed_head is not None:
            self._streamed_head.close()
        for module in self._model.modules():
            module.__dict__.pop("forward", None)  # what took its place holds buffers, hooks hold tables
            module._forward_pre_hooks.clear()
            _forget_tensors(module)
        self._resources.close()

    def _moved_bytes(self) -> int:
        """Since the model was opened: on a CPU from disk, else to the device."""
        totals = self.timeline.totals()
        return totals.disk_bytes + (0 if self.plan.vram is None else totals.ram_bytes)

    def _begin_sweep(self, pack: Pack | StepPack) -> int:
        """From the first layer; bytes that had moved before."""
        if self._is_interrupted:
            self._stream.rewind()
        else:
            self._stream.end_sweep()
        self._is_interrupted = True
        self._layers_run = 0
        before = self._moved_bytes()
        self._stream.expect(pack.num_tokens if isinstance(pack, StepPack) else pack.input_ids.shape[-1])
        return before

    def _end_sweep(self, before: int) -> None:
        self._is_interrupted = False
        self.timeline.add_sweep_bytes(*self._tier_bytes)
        self.swept_bytes = self._moved_bytes() - before

    def _run_row(self, pack: Pack, cache: KVCache) -> torch.Tensor:
        logits = self._forward(pack, cache, **({"logits_to_keep": pack.last_rows} if self._keeps_rows else {}))
        return logits if self._keeps_rows else logits[pack.last_rows]

    def _row_pieces(
        self, pack: Pack, cache: KVCache, counts: Sequence[int], piece_rows: int
    ) -> Generator[torch.Tensor, None, None]:
        return self._row_logits.pieces(lambda: self._forward(pack, cache), rows_of(pack, counts, piece_rows))

    def _forward(self, pack: Pack, cache: KVCache, **options: object) -> torch.Tensor:
        """Logits as the model's own forward gives them, [rows, vocabulary]."""
        with sweep_attention(pack, cache, self._windows, self._slopes):
            output = self._model(input_ids=pack.input_ids, position_ids=pack.position_ids, use_cache=False, **options)
        if self._layers_run != len(self._bindings):
            raise EngineError(f"the model ran {self._layers_run} of its {len(self._bindings)} layers in this sweep")
        logits: torch.Tensor = output.logits[0]
        return logits

    def _steps(self, pack: StepPack, counts: Sequence[int | None] = ()) -> list[Forward]:
        assert self._state_forward is not None, "`pack` made it"
        return [
            (span.state, partial(self._state_forward, span.state, span.token_ids, rows))
            for span, rows in zip(pack.spans, counts or [None] * len(pack.spans), strict=True)
        ]

    def _step_pieces(
        self, pack: StepPack, counts: Sequence[int], piece_rows: int
    ) -> Generator[torch.Tensor, None, None]:
        run = self._side_by_side.run if self.plan.head.num_blocks else self._side_by_side.run_each
        for logits in run(self._steps(pack, counts), self._bring_layer, self._stream.release, counts):
            yield from torch.split(logits, piece_rows)

    def _bring_layer(self, index: int) -> None:
        self._bindings[index].bind(self._stream.acquire(index))

    def _streamed(self, index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        binding = self._bindings[index]

        def run_layer(*args: Any, **kwargs: Any) -> Any:
            slot = self._stream.acquire(index)
            if self._bucket is None or index in self._unrecorded:
                binding.bind(slot)
                result = forward(*args, **kwargs)
            else:
                result = self._replayed(index, slot, forward, args, kwargs)
            self._stream.release(index)
            self._layers_run += 1
            return result

        return run_layer

    def _replayed(
        self,
        index: int,
        slot: BoundSlot,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, object],
    ) -> Any:
        def body(*args: Any, **kwargs: Any) -> Any:
            self._bindings[index].bind(slot)
            return forward(*args, **kwargs)

        assert self._bucket is not None, "only called within a bucket"
        try:
            return self._bucket.run((index, slot.key), body, args, kwargs)
        except RecordError as error:
            self._graphs.disable(error)
            self._bucket = None
            return body(*args, **kwargs)


def _forget_tensors(module: nn.Module) -> None:
    """Let go of memory that belongs to the model's resources."""
    for tensors in (module.__dict__["_parameters"], module.__dict__["_buffers"]):
        for name, tensor in tensors.items():
            if tensor is not None and not tensor.is_meta:
                tensors[name] = torch.empty_like(tensor, device="meta")
