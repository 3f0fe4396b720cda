"""Opens a model for sweeping: chooses its compute type, plans it, brings what stays to its home, starts the stream.

The one place where the parts meet. `Machine` is what they meet on: this one, or for tests and benchmarks one whose
disk and bus are slowed down to those of another, computing on the CPU.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from lamella_engine import architecture
from lamella_engine.architecture import Architecture
from lamella_engine.binding import TORCH_DTYPES, LayerBinding
from lamella_engine.budget import parse_budget, parse_share
from lamella_engine.calibration import DiskProfile, assumed_bandwidths, measure_bandwidths, measure_disk
from lamella_engine.compute_dtype import choose_dtype
from lamella_engine.device import available_host_bytes, free_memory_bytes, total_memory_bytes
from lamella_engine.disk_reader import DiskReader
from lamella_engine.errors import DeviceError
from lamella_engine.expert_cache import ExpertCache
from lamella_engine.expert_fetch import ExpertFetch
from lamella_engine.experts import ExpertBytes, find_experts, tell_when_routed
from lamella_engine.file_reads import ALIGNMENT, ReadStyle, ShardFile
from lamella_engine.graph_recorder import CudaRecorder, Recorder
from lamella_engine.host_memory import HostMemory
from lamella_engine.loader import Loader, resident_bytes
from lamella_engine.model_sizes import sizes_of_sharded
from lamella_engine.model_traits import ROUTED_COUNTS, first_whole
from lamella_engine.model_use import using
from lamella_engine.options import EngineOptions
from lamella_engine.pieces import Piece, PlacedPiece, layer_piece, place_pieces
from lamella_engine.placement import Bandwidths, Plan, Tier
from lamella_engine.plan_facts import plan_facts
from lamella_engine.planner import PlanRequest, make_plan
from lamella_engine.ram_tier import RamTier
from lamella_engine.recordable import find_unrecorded
from lamella_engine.resident import find_tables, look_up_rows, materialise_root
from lamella_engine.shard import ShardedModel, TensorSpec
from lamella_engine.streamed_head import StreamedHead, conversion_bytes
from lamella_engine.sweep import StreamedWeights, SweepModel
from lamella_engine.timeline import Timeline
from lamella_engine.transfer import CudaTransfer, DeviceSlot, Transfer
from lamella_engine.weight_stream import BoundSlot, DeviceStream, Homes, HostStream, WeightStream

logger = logging.getLogger(__name__)

SMALL_MODEL_BYTES = 256 * 1024 * 1024  # not worth a second of measuring the disk
PIPELINE = 2  # ring slots per reading thread: one is read, one is copied
DEVICE_ALIGNMENT = 512  # of buffers on a device, as its allocator has it

OpenFile = Callable[[Path], ShardFile]
MakeTransfer = Callable[[Sequence[str]], Transfer]


@dataclass(frozen=True)
class Machine:
    """What a model is opened on.

    Attributes:
        device: where it computes.
        vram, ram: budgets in bytes; `vram` is None on a CPU that computes from the host's memory.
        bandwidths: what its lanes carry, for the plan.
        style: how its disk likes to be read.
        open_file: opens a shard file for reading.
        make_transfer: makes what copies to the device, from the names of the pieces; None where nothing is copied.
        recorder: records what decoding layers launch; None where nothing is recorded.
        is_shared: other models are open on it too, and whoever opens them bounds what all take of the device.
    """

    device: torch.device
    vram: int | None
    ram: int
    bandwidths: Bandwidths
    style: ReadStyle
    open_file: OpenFile
    make_transfer: MakeTransfer | None
    recorder: Recorder | None = None
    is_shared: bool = False

    @property
    def plan_device(self) -> str:
        """The device's name in a plan."""
        if self.device.type == "cpu":
            return "cpu" if self.vram is None else "virtual"
        return str(self.device)

    def request(self, options: EngineOptions) -> PlanRequest:
        """What a plan for this machine has to keep within."""
        return PlanRequest(
            device=self.plan_device,
            vram=self.vram,
            ram=self.ram,
            bandwidths=self.bandwidths,
            max_sequences=options.max_sequences,
            kv_tokens=options.kv_tokens,
            sweep_tokens=options.sweep_tokens,
            expert_share=parse_share(options.expert_cache, "expert_cache"),
        )


def this_machine(
    sharded: ShardedModel, device: torch.device, dtype: torch.dtype, options: EngineOptions, tier: RamTier
) -> Machine:
    """The machine this process runs on, its lanes measured unless the model is too small for that to matter.

    What other workers of the host hold of the model in `tier` already costs no memory, so it counts as free.

    Raises:
        OptionError: a budget that is no amount of memory.
    """
    is_card = device.type == "cuda"
    held = held_bytes(sharded, tier)
    free_host = available_host_bytes() + held
    ram = parse_budget(options.ram, total_memory_bytes(torch.device("cpu")), free_host, "ram")
    vram = None
    if is_card:
        vram = parse_budget(options.vram, total_memory_bytes(device), free_memory_bytes(device), "vram")
    is_small = sharded.size_bytes < SMALL_MODEL_BYTES
    disk = DiskProfile.assumed() if is_small else measure_disk(sharded.layer_files)
    bandwidths = assumed_bandwidths(device) if is_small else measure_bandwidths(device, dtype, disk)
    style = ReadStyle(disk.depth, disk.block_bytes, disk.direct)
    return Machine(
        device=device,
        vram=vram,
        ram=ram,
        bandwidths=bandwidths,
        style=style,
        open_file=lambda path: ShardFile(path, direct=style.direct),
        make_transfer=(lambda names: CudaTransfer(device, names)) if is_card else None,
        recorder=CudaRecorder(device) if is_card else None,
    )


def held_bytes(sharded: ShardedModel, tier: RamTier) -> int:
    """What this host's workers hold of the model's layers in `tier` already."""
    return tier.held_bytes(layer_piece(shard, index).key for index, shard in enumerate(sharded.layers))


def built_for(sharded: ShardedModel, options: EngineOptions, device: torch.device) -> Architecture:
    """The model's tree without weights, in the type that it computes in on `device`."""
    config = architecture.load_config(sharded.directory)
    wanted = None if options.dtype is None else TORCH_DTYPES[options.dtype]
    dtype = choose_dtype(wanted, TORCH_DTYPES[sharded.dtype], device, str(config.model_type))
    return architecture.build(config, dtype)


def open_sweep_model(
    sharded: ShardedModel,
    options: EngineOptions,
    device: torch.device,
    machine: Machine | None = None,
    plan: Plan | None = None,
) -> SweepModel:
    """Open `sharded` on `machine` (None: this one), placed as `plan` says (None: as its budgets allow).

    Raises:
        PlanError: it does not fit the budgets.
        ModelError: it cannot run, or its shards cannot be read.
        DeviceError: the device or the host lacks the memory after all.
    """
    built = built_for(sharded, options, device)
    with ExitStack() as resources, _current(device):
        resources.enter_context(using(sharded.directory.parent.parent, sharded.name))
        tier = resources.enter_context(RamTier(options.shared_memory, pinned=device.type == "cuda"))
        machine = machine or this_machine(sharded, device, built.model.dtype, options, tier)
        sizes = sizes_of_sharded(sharded, built)
        plan = plan or make_plan(sizes, machine.request(options))
        if plan.vram is not None and not machine.is_shared:
            resources.enter_context(capped(device, plan.vram.budget))
        opener = _Opener(sharded, built, plan, machine, Timeline(is_tracing=options.trace), resources)
        try:
            model = opener.open(tier)
        except torch.OutOfMemoryError as error:
            raise DeviceError(
                f"{device} has less memory free than {sharded.name} was planned for: {error}. End what else runs on "
                "it, or give a smaller budget (--vram)."
            ) from error
        model.plan_facts = plan_facts(sizes, plan, machine.bandwidths)
        opener.keep()
    return model


class _Opener:
    """The steps of opening one model; what they take is given back if one of them fails."""

    def __init__(
        self,
        sharded: ShardedModel,
        built: Architecture,
        plan: Plan,
        machine: Machine,
        timeline: Timeline,
        resources: ExitStack,
    ) -> None:
        self._sharded = sharded
        self._built = built
        self._plan = plan
        self._machine = machine
        self._timeline = timeline
        self._resources = resources
        self._is_pinned = machine.device.type == "cuda"
        self._kept = ExitStack()
        self._packed_head: torch.Tensor | None = None  # the whole head, where it stays packed on the device

    def open(self, tier: RamTier) -> SweepModel:
        loader = Loader(self._machine.device, tier, self._machine.style)
        tables = find_tables(self._built, self._sharded.root.tensors)
        materialise_root(self._built, self._sharded.root, self._plan, self._machine.device, loader)
        bindings = [
            LayerBinding(layer, shard.tensors)
            for layer, shard in zip(self._built.layers, self._sharded.layers, strict=True)
        ]
        for binding in bindings:
            binding.prepare(self._machine.device)
        experts = self._find_experts(bindings)
        unrecorded = self._find_unrecorded(experts, bindings)
        placed = place_pieces(self._sharded, self._plan, tables.head, experts)
        stream = self._open_stream(placed, bindings, loader, unrecorded)
        self._resources.callback(stream.close)
        for number, (layer, own) in enumerate(zip(self._built.layers, experts, strict=True)):
            if own is not None and stream.fetches(number):
                tell_when_routed(layer, own, partial(_bring, stream, bindings[number], number))
        buffer = self._conversion_buffer(placed, bindings, tables.head)
        look_up_rows(self._built, self._sharded.root, self._plan, loader, self._timeline, self._packed_head)
        streamed: StreamedHead | None = None
        if self._plan.head.num_blocks:
            assert tables.head is not None, "place_pieces has found it"
            head = self._built.model.get_output_embeddings()
            streamed = StreamedHead(head, tables.head, self._plan.head.num_blocks, len(bindings), stream, buffer)
            head.forward = streamed
        asking = {number for number, own in enumerate(experts) if own is not None and stream.fetches(number)}
        recorder = self._machine.recorder
        weights = StreamedWeights(self._plan, bindings, stream, self._timeline, recorder, unrecorded | asking, streamed)
        return SweepModel(self._sharded, self._built, weights, self._machine.device, self._kept)

    def keep(self) -> None:
        """Leave everything open; the model closes it."""
        self._kept.push(self._resources.pop_all())

    def _find_experts(self, bindings: Sequence[LayerBinding]) -> list[ExpertBytes | None]:
        """Each layer's experts, where they can be fetched one by one; its binding is told of them."""
        routed = first_whole(self._built.config, ROUTED_COUNTS)
        found = [
            find_experts(layer, shard.tensors, routed)
            for layer, shard in zip(self._built.layers, self._sharded.layers, strict=True)
        ]
        for binding, own in zip(bindings, found, strict=True):
            if own is not None:
                binding.await_experts(own.tensors)
        return found

    def _find_unrecorded(self, experts: Sequence[ExpertBytes | None], bindings: list[LayerBinding]) -> frozenset[int]:
        """Layers that are launched kernel by kernel because of their experts; all where nothing is recorded."""
        if self._machine.recorder is None:
            return frozenset(range(len(experts)))
        expanded = [binding.expert_bytes if self._plan.keeps_packed else 0 for binding in bindings]
        device, memory = self._machine.device, self._machine.bandwidths.device_memory
        return find_unrecorded(self._built.layers, experts, expanded, device, self._built.model.dtype, memory)

    def _open_stream(
        self, placed: Sequence[PlacedPiece], bindings: list[LayerBinding], loader: Loader, unrecorded: frozenset[int]
    ) -> WeightStream:
        reader = self._open_reader([place.piece for place in placed if place.tier is Tier.DISK])
        by_tier = {tier: [n for n, place in enumerate(placed) if place.tier is tier] for tier in Tier}
        device, make_transfer = self._machine.device, self._machine.make_transfer
        if make_transfer is None:
            resident = {
                number: loader.to_ram_converted(number, placed[number].piece, bindings[number], self._built.model.dtype)
                for number in by_tier[Tier.RAM]
            }
            return HostStream(placed, resident, reader, self._open_experts(placed, None), self._timeline)
        transfer = make_transfer([place.piece.name for place in placed])
        staying = by_tier[Tier.VRAM]
        # What stays packed has nothing to be expanded by when it is brought: all layers do, or none; the head does.
        own = {} if self._plan.keeps_packed else dict(enumerate(bindings))
        sizes = [
            resident_bytes(placed[number].piece, own[number]) if number in own else placed[number].piece.nbytes
            for number in staying
        ]
        homes = _split(sizes, self._empty)
        on_device: dict[int, BoundSlot] = {
            number: loader.to_device(number, placed[number].piece, own.get(number), home)
            for number, home in zip(staying, homes, strict=True)
        }
        self._packed_head = on_device[len(bindings)].tensor if len(bindings) in on_device else None
        in_ram = {number: loader.to_ram(placed[number].piece) for number in by_tier[Tier.RAM]}
        count = min(self._plan.device_slots, len(placed) - len(on_device))
        buffers = _split([self._plan.slot_bytes] * count, transfer.allocate)
        slots = [DeviceSlot(key, buffer) for key, buffer in enumerate(buffers)]
        logger.info("%d of %d pieces stay on %s", len(on_device), len(placed), device)
        experts = self._open_experts(placed, transfer)
        # Where it can be recorded a layer is expanded as a whole: a graph cannot ask which experts are wanted.
        unexpanded = frozenset(staying) & unrecorded if self._plan.keeps_packed else frozenset()
        places = Homes(on_device, in_ram, unexpanded)
        return DeviceStream(placed, places, reader, slots, transfer, experts, self._timeline)

    def _open_experts(self, placed: Sequence[PlacedPiece], transfer: Transfer | None) -> ExpertFetch:
        """The caches of experts that the plan has room for, nearest first."""
        room = self._plan.experts
        counts = [(number, place.piece.experts.count) for number, place in enumerate(placed) if place.piece.experts]
        caches = {}
        if transfer is not None and room.vram_bytes:
            memory, copy = transfer.allocate(room.vram_bytes), transfer.copy_aside
            caches[Tier.VRAM] = ExpertCache(memory, room.entry_bytes, counts, copy, copy)
        if room.ram_bytes:
            host = self._resources.enter_context(HostMemory(room.ram_bytes, pinned=self._is_pinned))
            copy_in, copy_out = (_copy, _copy) if transfer is None else (transfer.copy_aside, transfer.copy_now)
            caches[Tier.RAM] = ExpertCache(host.tensor, room.entry_bytes, counts, copy_in, copy_out)
        return ExpertFetch(placed, self._timeline, caches)

    def _open_reader(self, pieces: Sequence[Piece]) -> DiskReader | None:
        """The reader of what lives on disk: whole pieces for a CPU to compute from, blocks where they are copied on."""
        if not pieces:
            return None
        style = self._machine.style
        memory = self._resources.enter_context(HostMemory(self._plan.ring_bytes, pinned=self._is_pinned))
        chunk_bytes = max(piece.nbytes for piece in pieces)
        passes_on = self._machine.make_transfer is not None
        if passes_on:
            room = self._plan.ring_bytes // (PIPELINE * style.depth) // ALIGNMENT * ALIGNMENT
            chunk_bytes = max(ALIGNMENT, min(style.block_bytes, room - ALIGNMENT))
        reader = DiskReader(
            pieces, memory, chunk_bytes, style, self._timeline, self._machine.open_file, passes_on=passes_on
        )
        self._resources.callback(reader.close)
        return reader

    def _empty(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self._machine.device)

    def _conversion_buffer(
        self, placed: Sequence[PlacedPiece], bindings: list[LayerBinding], head: TensorSpec | None
    ) -> torch.Tensor | None:
        """One buffer for all streamed pieces of another dtype, on the device; the layers' bindings are told of it."""
        home = Tier.RAM if self._machine.make_transfer is None else Tier.VRAM
        streamed = [
            binding
            for binding, place in zip(bindings, placed, strict=False)
            if (place.tier is not home or self._plan.keeps_packed) and binding.needs_conversion
        ]
        dtype = self._built.model.dtype
        sizes = [binding.converted_bytes for binding in streamed]
        if self._plan.head.num_blocks and head is not None:
            sizes.append(conversion_bytes(head, self._plan.head.num_blocks, dtype))
            sizes = [nbytes for nbytes in sizes if nbytes]
        if not sizes:
            return None
        buffer = self._empty(max(sizes))
        for binding in streamed:
            binding.use_buffer(buffer)
        return buffer


def _current(device: torch.device) -> AbstractContextManager[object]:
    """Make `device` the one that memory is pinned for."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _bring(stream: WeightStream, binding: LayerBinding, number: int, experts: Sequence[int]) -> None:
    """Fetch what `experts` of the acquired piece `number` need, and expand what has come."""
    binding.expand_experts(stream.fetch(number, experts))


def _copy(target: torch.Tensor, source: torch.Tensor) -> None:
    target.copy_(source)


def _split(sizes: Sequence[int], allocate: Callable[[int], torch.Tensor]) -> list[torch.Tensor]:
    """Buffers of `sizes` bytes that are parts of one: many of some MiB each leave an allocator with gaps."""
    starts = [0]
    for nbytes in sizes:
        starts.append(starts[-1] + -(-nbytes // DEVICE_ALIGNMENT) * DEVICE_ALIGNMENT)
    if not sizes:
        return []
    whole = allocate(starts[-1])
    return [whole[start : start + nbytes] for start, nbytes in zip(starts, sizes, strict=False)]


@contextmanager
def capped(device: torch.device, budget: int) -> Iterator[None]:
    """Let this process take no more of a GPU than `budget` bytes beside what it has; a CPU has no such bound."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.empty_cache()
    before = torch.cuda.memory.get_per_process_memory_fraction(device)
    total = torch.cuda.mem_get_info(device)[1]
    share = (torch.cuda.memory_reserved(device) + budget) / total
    torch.cuda.set_per_process_memory_fraction(min(before, share), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(before, device)
