"""Where every byte of a model lives and where it is computed: what the planner decides and the engine follows.

Plain frozen data. `planner` makes a `Plan` from a model's sizes and the budgets; `weight_stream` and `sweep` carry it
out; `estimate` says what it will cost. Nothing here reads files or touches a device.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Tier(StrEnum):
    """Where weights wait between two sweeps."""

    VRAM = "vram"  # on the compute device, never moved again
    RAM = "ram"  # in host memory that the device can copy from (or, on a CPU, compute from)
    DISK = "disk"  # in the shard file, read anew for every sweep


@dataclass(frozen=True)
class ExpertSizes:
    """Routed experts that can be fetched one by one: `count` in a layer, of which a token visits `routed`.

    `layers` has the bytes of all experts of each layer, 0 for a dense one.
    """

    count: int
    routed: int
    layers: tuple[int, ...]


@dataclass(frozen=True)
class PackedTables:
    """What lies outside the layers, where some of it is packed.

    Attributes:
        head: bytes of the head's weight in the compute dtype, its own or the embedding table's.
        other: bytes in the compute dtype of everything that is neither head nor embedding table.
        num_strips: strips that the head is packed in; 0 where it is not packed.
        strip: bytes of the largest strip as it is stored.
        strip_computed: bytes of the largest strip in the compute dtype.
    """

    head: int
    other: int
    num_strips: int = 0
    strip: int = 0
    strip_computed: int = 0


@dataclass(frozen=True)
class ModelSizes:
    """A model in figures, all the planner needs to know of it; bytes as stored in the shards.

    Attributes:
        name: as asked for.
        layers: bytes of each decoder layer, in order.
        embedding: bytes of the embedding table.
        head: bytes of the output head's weight; 0 where it shares the embedding table (`is_tied`).
        is_tied: the head is the embedding table.
        other: bytes of everything else outside the layers (norms, learned positions).
        kv_bytes_per_token: keys and values of one token in all layers, in the compute dtype, or its part of a
            sequence's state.
        expansion: bytes in the compute dtype per stored byte of a layer (1.0 where they are equal).
        active_parameters: weights that one token multiplies with, head included.
        hidden_size, intermediate_size, attention_width, vocabulary: widths that size the activations
            (`attention_width`: query heads times head width).
        bias_heads: query heads whose scores get linear position biases; 0 for a model without.
        itemsize: bytes of a number in the compute dtype.
        context_length: tokens a sequence may have.
        experts: None for a dense model.
        root_expansion: as `expansion`, for what lies outside the layers; None means the same.
        computed: bytes of each layer in the compute dtype, where some are packed; else empty.
        tables: what lies outside the layers, where some of it is packed.
    """

    name: str
    layers: tuple[int, ...]
    embedding: int
    head: int
    is_tied: bool
    other: int
    kv_bytes_per_token: int
    expansion: float
    active_parameters: int
    hidden_size: int
    intermediate_size: int
    attention_width: int
    vocabulary: int
    itemsize: int
    context_length: int
    activation_bytes: int = 0
    pair_bytes: int = 0
    score_heads: int = 0
    bias_heads: int = 0
    reads_whole: bool = False
    experts: ExpertSizes | None = None
    root_expansion: float | None = None
    computed: tuple[int, ...] = ()
    tables: PackedTables | None = None

    @property
    def is_head_packed(self) -> bool:
        """The head is stored in fewer bytes than it computes in."""
        return self.tables is not None and self.tables.num_strips > 0

    @property
    def head_unit(self) -> int:
        """Bytes of the least of the head that can pass the device alone: a row, or a packed strip."""
        return self.tables.strip if self.tables and self.is_head_packed else -(-self.head_bytes // self.vocabulary)

    @property
    def head_units(self) -> int:
        """How many of these the head has."""
        return self.tables.num_strips if self.tables and self.is_head_packed else self.vocabulary

    @property
    def strip_computed(self) -> int:
        """Bytes of the least of a packed head that can be expanded, expanded; 0 where the head is not packed."""
        return 0 if self.tables is None else self.tables.strip_computed

    @property
    def is_packed(self) -> bool:
        """Weights of layers are stored in fewer bytes than they compute in, and expanded on the device."""
        return bool(self.computed)

    @property
    def head_bytes(self) -> int:
        """Bytes the head multiplies with, its own or the embedding table's."""
        return self.embedding if self.is_tied else self.head


@dataclass(frozen=True)
class LayerPlacement:
    """One decoder layer: where its bytes wait and on which device it is computed.

    `nbytes` is what it takes there: in the compute dtype where it is computed in place, else as stored.
    """

    layer: int
    nbytes: int
    tier: Tier
    compute: str


@dataclass(frozen=True)
class HeadPlacement:
    """The output head: where its bytes wait, and in how many row blocks it passes a slot where they are not resident.

    `num_blocks` is 0 where the head is on the compute device for good, ready to compute with. A block that stays there
    is packed, and expanded in every sweep.
    """

    nbytes: int
    tier: Tier
    num_blocks: int


@dataclass(frozen=True)
class Use:
    """What some bytes of a budget are for."""

    what: str
    nbytes: int


@dataclass(frozen=True)
class Spending:
    """One budget and what it is spent on; the uses never add up to more than the budget."""

    budget: int
    uses: tuple[Use, ...]

    @property
    def used(self) -> int:
        """Bytes spent."""
        return sum(use.nbytes for use in self.uses)


@dataclass(frozen=True)
class ExpertRoom:
    """Memory for experts kept between sweeps: bytes of one entry, of all on the device and of all in host memory."""

    entry_bytes: int = 0
    vram_bytes: int = 0
    ram_bytes: int = 0


@dataclass(frozen=True)
class Plan:
    """Where everything is.

    Attributes:
        device: torch device that computes, such as ``cuda:0`` or ``cpu``.
        layers: one placement a layer, in order.
        head, embedding: where the head is, and where embedding rows are gathered from.
        device_slots: layer-sized buffers on the device that streamed pieces pass through; 0 if nothing streams there.
        slot_bytes: size of one such buffer (and of one ring slot on a CPU).
        ring_bytes: host memory that reads from disk go to; 0 if nothing is read.
        kv_tokens, kv_bytes: the key-value cache of all sequences together.
        sweep_tokens: tokens a sweep carries at most.
        workspace_bytes: room for activations, logits and gathered keys and values of a sweep.
        vram: the device budget and its uses; None on a CPU.
        ram: the host budget and its uses.
        experts: what is for experts of layers that stream.
        keeps_packed: layers on the device stay packed, and are expanded when they are computed.
    """

    device: str
    layers: tuple[LayerPlacement, ...]
    head: HeadPlacement
    embedding: Tier
    device_slots: int
    slot_bytes: int
    ring_bytes: int
    kv_tokens: int
    kv_bytes: int
    sweep_tokens: int
    workspace_bytes: int
    vram: Spending | None
    ram: Spending
    experts: ExpertRoom = ExpertRoom()
    keeps_packed: bool = False

    def layer_bytes(self, tier: Tier) -> int:
        """Bytes of the layers, and of a head in blocks, that wait in `tier`."""
        head = self.head.nbytes if self.head.num_blocks and self.head.tier is tier else 0
        return head + sum(place.nbytes for place in self.layers if place.tier is tier)


@dataclass(frozen=True)
class Bandwidths:
    """What the machine can move and compute, bytes or operations a second.

    Attributes:
        disk: reading shards at the best depth found.
        h2d: copying pinned host memory to the device; on a CPU, infinity (nothing is copied).
        device_memory: reading weights where they are computed (VRAM, or RAM on a CPU).
        flops: multiply-adds counted as two, in the compute dtype.
        measured: names of those that were measured here; the others are assumed.
    """

    disk: float
    h2d: float
    device_memory: float
    flops: float
    measured: frozenset[str] = frozenset()
