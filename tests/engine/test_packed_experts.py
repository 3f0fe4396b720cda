"""Packed experts: those that are visited are moved, packed, and expanded; tokens are those of the expanded weights."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from benchmarks.slow_machine import MACHINES, slow_machine
from lamella_engine import Engine, EngineOptions, Sampling, ShardStore, architecture
from lamella_engine.binding import LayerBinding
from lamella_engine.estimate import predict
from lamella_engine.experts import ExpertBytes, find_experts
from lamella_engine.file_reads import ALIGNMENT, ShardFile
from lamella_engine.formats import FORMATS, find_format
from lamella_engine.model_sizes import sizes_of_sharded
from lamella_engine.open_model import built_for, open_sweep_model
from lamella_engine.placement import ExpertRoom, ModelSizes, Tier
from lamella_engine.planner import PlanRequest, make_plan
from lamella_engine.shard import TENSOR_ALIGNMENT, PackedParts, ShardedModel, TensorSpec
from lamella_engine.stored_form import StoredForm
from lamella_engine.weight_stream import BoundSlot
from tests import tiny_models
from tests.engine.engine_driver import full_load_tokens, gather, generate, submit_ids
from tests.engine.expanded_models import expected_tokens
from tests.engine.model_shapes import CARD, GIB, MIXTRAL
from tests.engine.model_shapes import CPU as CPU_LANES
from tests.engine.test_experts import FAST, PROMPTS

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

CPU = torch.device("cpu")
GREEDY, TEN = (Sampling(max_tokens=count, ignore_eos=True) for count in (8, 10))
UNTOUCHED = 12345.0
EMBEDDING_ROWS = 10 * 128 * 4  # bytes of those that ten tokens take from a table on disk
# Sixteen experts of which a token visits two; rows that end within a block.
SHAPE = {"num_experts": 16, "num_local_experts": 16, "n_routed_experts": 16, "num_experts_per_tok": 2,
         "hidden_size": 128, "moe_intermediate_size": 136, "intermediate_size": 136}  # fmt: skip
HOMES = {"cpu": "d", "disk": "d", "ram": "r", "vram": "v", "mixed": "vrd"}
MIXTRALS = [("mixtral", "nf4"), ("mixtral", "lossless")]
OTHERS = [
    ("mixtral", "full,experts=int8"),
    ("mixtral", "plain"),
    ("qwen3_moe", "int8,layers.1.mlp.experts.down_proj=full,layers.2=fp4"),
    ("olmoe", "fp4"),
    ("gpt_oss", "nf4,gate_up_proj_bias=int8"),
    ("deepseek_v3", "nf4,layers.2=full"),
    ("qwen3_next", "nf4"),
]

Model = tuple[ShardedModel, list[list[int]]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Model]:
    """Shards of a family, packed, and the tokens of a full load of the expanded weights."""
    return functools.cache(lambda family, quant: build(tmp_path_factory.mktemp(family), family, quant))


def build(root: Path, family: str, quant: str) -> Model:
    """`lossless` packs bfloat16, computed in float32 as all the others are; "plain" bfloat16 is not packed at all."""
    is_exact = quant in ("lossless", "plain")
    shape, dtype = {**tiny_models.FAMILIES[family], **SHAPE}, torch.bfloat16 if is_exact else torch.float32
    shape["num_hidden_layers"] = 4 if family == "qwen3_next" else 3  # of which the fourth is one with attention
    source = tiny_models.save_checkpoint(root / "source", family, shape, dtype=dtype)
    if is_exact:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, attn_implementation="eager").eval()
        expected = [full_load_tokens(model, prompt, GREEDY.max_tokens) for prompt in PROMPTS]
    else:
        expected = expected_tokens(source, quant, PROMPTS, GREEDY.max_tokens)
    form = StoredForm() if quant == "plain" else StoredForm(quant=quant)
    return ShardStore(root / "store").ensure("tiny", source=source, form=form), expected


class CountedFile(ShardFile):
    """A shard file that notes how much is read of it."""

    def __init__(self, path: Path, reads: list[int]) -> None:
        super().__init__(path, direct=True)
        self._reads = reads

    def read(self, view: memoryview, start: int, needed: int) -> None:
        super().read(view, start, needed)
        self._reads.append(len(view))


def options_for(sharded: ShardedModel) -> EngineOptions:
    return EngineOptions(
        store=sharded.directory, device="cpu", max_sequences=4, sweep_tokens=32, kv_tokens=512, ram=0, dtype="float32"
    )


def open_at(sharded: ShardedModel, home: str, kept: tuple[int, int] = (0, 0), reads: list[int] | None = None) -> Engine:
    """All layers at `home`, with room for so many experts on the device and in RAM; a CPU's disk is told in `reads`."""
    options = options_for(sharded)
    machine = slow_machine(MACHINES[0], FAST, vram=2**30, ram=2**30)
    noted: list[int] = [] if reads is None else reads
    if home == "cpu":
        machine = dataclasses.replace(
            machine, vram=None, ram=0, make_transfer=None, open_file=lambda path: CountedFile(path, noted)
        )
    sizes = sizes_of_sharded(sharded, built_for(sharded, options, CPU))
    assert sizes.experts is not None
    entry = max(sizes.experts.layers) // sizes.experts.count
    plan = make_plan(sizes, machine.request(options))
    plan = dataclasses.replace(plan, experts=ExpertRoom(entry, kept[0] * entry, kept[1] * entry))
    letters, tiers = {"v": Tier.VRAM, "r": Tier.RAM, "d": Tier.DISK}, HOMES[home]
    layers = tuple(
        dataclasses.replace(place, tier=letters[tiers[place.layer % len(tiers)]], nbytes=shard.nbytes)
        for place, shard in zip(plan.layers, sharded.layers, strict=True)
    )
    nbytes = -(-max(shard.nbytes for shard in sharded.layers) // ALIGNMENT) * ALIGNMENT
    plan = dataclasses.replace(plan, layers=layers, slot_bytes=nbytes, ring_bytes=3 * nbytes)
    if home != "cpu":
        plan = dataclasses.replace(plan, device_slots=2, ring_bytes=8 * 2**20, keeps_packed=True)
    return Engine(open_sweep_model(sharded, options, CPU, machine, plan), None, options)


def alone(engine: Engine) -> list[list[int]]:
    return [generate(engine, prompt, GREEDY).token_ids for prompt in PROMPTS]


def together(engine: Engine) -> list[list[int]]:
    names = [str(index) for index in range(len(PROMPTS))]
    for name, prompt in zip(names, PROMPTS, strict=True):
        submit_ids(engine, name, prompt, GREEDY)
    outcomes = gather(engine, set(names))
    return [outcomes[name].token_ids for name in names]


def experts_of(sharded: ShardedModel) -> list[ExpertBytes]:
    """Of the layers that have some."""
    built = architecture.build(architecture.load_config(sharded.directory), torch.float32)
    found = [find_experts(layer, shard.tensors, 2) for layer, shard in zip(built.layers, sharded.layers, strict=True)]
    return [own for own in found if own is not None]


@pytest.mark.parametrize(
    ("family", "quant", "home"),
    [(*case, home) for case in MIXTRALS for home in HOMES]
    + [(*case, home) for case in OTHERS for home in ("cpu", "mixed")],
)
def test_tokens_are_those_of_a_full_load_of_the_expanded_weights(
    family: str, quant: str, home: str, models: Callable[[str, str], Model]
) -> None:
    sharded, expected = models(family, quant)

    with open_at(sharded, home) as engine:
        assert alone(engine) == expected
        assert together(engine) == expected
        assert (engine.counters().experts_visited > 0) == (home != "vram")


@pytest.mark.parametrize(
    ("family", "quant", "home"),
    [(*case, home) for case in MIXTRALS for home in ("disk", "ram")] + [(*case, "cpu") for case in MIXTRALS + OTHERS],
)
def test_a_token_alone_moves_the_packed_bytes_of_its_own_experts(
    family: str, quant: str, home: str, models: Callable[[str, str], Model]
) -> None:
    sharded, _ = models(family, quant)
    own, total = experts_of(sharded), sum(shard.nbytes for shard in sharded.layers)
    visited = total - sum((each.count - 2) * each.expert_bytes for each in own)
    num_ranges = sum(len(each.others(total)) + 2 * len(each.parts) for each in own)
    reads: list[int] = []

    with open_at(sharded, home, reads=reads) as engine:
        generate(engine, [5], TEN)
        before, read = engine.counters(), sum(reads)
        generate(engine, [5], TEN)
        after, read = engine.counters(), sum(reads) - read
        sizes = sizes_of_sharded(sharded, built_for(sharded, options_for(sharded), CPU))
        planned = predict(sizes, engine.plan, CPU_LANES, 1)

    assert sizes.experts is not None
    assert sum(sizes.experts.layers) >= sum(each.nbytes for each in own)
    if home != "ram":
        assert planned.lanes.disk * CPU_LANES.disk == pytest.approx(visited)
    assert len(own) >= 2
    assert visited < 0.5 * total
    moved = after.ram_bytes - before.ram_bytes if home == "ram" else after.disk_bytes - before.disk_bytes
    assert after.experts_visited - before.experts_visited == 10 * 2 * len(own)
    assert 10 * visited <= moved <= 10 * visited + EMBEDDING_ROWS
    if home == "cpu":  # whole pages, and what is read ahead of the next sweep
        assert 9 * visited <= read <= 11 * (visited + 2 * ALIGNMENT * num_ranges)


@pytest.mark.parametrize("home", ["cpu", "disk", "ram", "vram"])
def test_only_visited_experts_are_expanded(home: str, models: Callable[[str, str], Model]) -> None:
    sharded, _ = models("mixtral", "nf4")

    with open_at(sharded, home) as engine:
        generate(engine, [5], TEN)  # what is read ahead of a first sweep comes whole
        binding = engine.model._bindings[0]
        room = dict(zip([place.spec.name for place in binding._places], binding._expanded or [], strict=True))
        experts = [tensor for name, tensor in room.items() if ".experts." in name]
        with torch.inference_mode():
            for tensor in experts:
                tensor.fill_(UNTOUCHED)
        generate(engine, [7], Sampling(max_tokens=1, ignore_eos=True))
        written = [(tensor != UNTOUCHED).flatten(1).any(dim=1).sum().item() for tensor in experts]

    assert len(experts) == 2
    assert all(2 <= count <= 2 * len(sharded.layers) for count in written)


@pytest.mark.parametrize(
    ("home", "kept", "quant"),
    [
        ("cpu", (0, 9), "nf4"), ("disk", (0, 9), "nf4"), ("disk", (5, 9), "lossless"), ("ram", (9, 0), "nf4"),
        ("mixed", (64, 64), "nf4"),
    ],
)  # fmt: skip
def test_packed_experts_are_kept_between_sweeps(
    home: str, kept: tuple[int, int], quant: str, models: Callable[[str, str], Model]
) -> None:
    sharded, expected = models("mixtral", quant)
    moved = []

    for entries in (kept, (0, 0)):
        with open_at(sharded, home, entries) as engine:
            generate(engine, [5], TEN)  # what is read ahead of a first sweep comes whole
            if entries == kept:
                alone(engine)
            before = engine.counters()
            assert alone(engine) == expected
            after = engine.counters()
        near = after.experts_in_vram - before.experts_in_vram + after.experts_in_ram - before.experts_in_ram
        assert (near > 0) == (entries == kept)
        far = "ram_bytes" if home == "ram" else "disk_bytes"
        moved.append(getattr(after, far) - getattr(before, far))

    assert moved[0] < 0.95 * moved[1]


@pytest.mark.parametrize("shape", [(6, 40, 100), (6, 16, 256), (6, 70)], ids=str)
@pytest.mark.parametrize("name", [*FORMATS, "float32", "bfloat16"])
def test_an_expert_alone_expands_to_what_it_is_in_the_whole_and_touches_no_other(
    name: str, shape: tuple[int, ...]
) -> None:
    module = nn.Module()
    module.weight = nn.Parameter(torch.empty(shape))
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    if name in FORMATS:
        numbers = numbers.bfloat16()
        spec, data = packed_tensor(name, numbers)
    else:
        numbers = numbers.to(getattr(torch, name))
        spec, data = TensorSpec("weight", name, shape, 0, numbers.nbytes), numbers.view(torch.uint8).flatten()
    binding = LayerBinding(module, (spec,))
    buffer = torch.zeros(binding.converted_bytes, dtype=torch.uint8)
    binding.use_buffer(buffer)
    binding.await_experts(["weight"])
    binding.bind(BoundSlot(("slot", 0), data))
    whole = module._parameters["weight"].clone()
    buffer.zero_()

    binding.bind(BoundSlot(("slot", 0), data, is_sparse=True))
    binding.expand_experts([1, 2, 5])

    found = module._parameters["weight"]
    assert torch.equal(found[[1, 2, 5]], whole[[1, 2, 5]])
    if name != "float32":  # that computes where it lies
        assert not found[[0, 3, 4]].any()


def packed_tensor(name: str, numbers: torch.Tensor) -> tuple[TensorSpec, torch.Tensor]:
    """How a shard describes and holds a packed tensor."""
    offset, parts, data = 0, [], []
    for suffix, part in find_format(name).encode(numbers).items():
        kind = str(part.dtype).removeprefix("torch.")
        parts.append(TensorSpec(suffix, kind, tuple(part.shape), offset, part.nbytes))
        padded = -(-part.nbytes // TENSOR_ALIGNMENT) * TENSOR_ALIGNMENT
        data.append(torch.zeros(padded, dtype=torch.uint8))
        data[-1][: part.nbytes] = part.contiguous().view(-1).view(torch.uint8)
        offset += padded
    packed = PackedParts(name, tuple(parts))
    return TensorSpec("weight", "bfloat16", tuple(numbers.shape), 0, offset, packed), torch.cat(data)


def test_what_the_rows_of_a_packed_matrix_share_comes_with_the_layer() -> None:
    spec, data = packed_tensor("lossless", torch.randn(8, 64).bfloat16())
    layer = nn.Module()
    layer.experts = experts = nn.Module()
    experts.num_experts, experts._is_expert_parallel = 8, False
    experts.bias = nn.Parameter(torch.empty(8, 64))

    own = find_experts(layer, [dataclasses.replace(spec, name="experts.bias")], 2)

    assert own is not None
    assert spec.packed is not None
    shared = [part for part in spec.packed.parts if part.name in ("escapes", "book")]
    assert own.nbytes == sum(part.nbytes for part in spec.packed.parts) - sum(part.nbytes for part in shared)
    others = own.others(len(data))
    assert all(any(low <= part.offset < low + nbytes for low, nbytes in others) for part in shared)


def packed_mixtral() -> ModelSizes:
    """The planner's Mixtral in a quarter of its bytes."""
    experts = MIXTRAL.experts
    assert experts is not None
    quarter = dataclasses.replace(experts, layers=tuple(nbytes // 4 for nbytes in experts.layers))
    return dataclasses.replace(
        MIXTRAL, layers=tuple(nbytes // 4 for nbytes in MIXTRAL.layers), computed=MIXTRAL.layers, expansion=4.0,
        root_expansion=1.0, experts=quarter,
    )  # fmt: skip


@pytest.mark.parametrize(("vram", "ram"), [(12 * GIB, 0), (12 * GIB, 8 * GIB), (None, 14 * GIB)])
def test_the_same_room_keeps_more_experts_packed(vram: int | None, ram: int) -> None:
    lanes = CPU_LANES if vram is None else CARD
    request = PlanRequest("cpu" if vram is None else "cuda:0", vram, ram, lanes, expert_share=1.0)

    plain, packed = make_plan(MIXTRAL, request), make_plan(packed_mixtral(), request)

    plain_room, room = plain.experts, packed.experts
    assert room.entry_bytes == plain_room.entry_bytes // 4
    assert room.vram_bytes + room.ram_bytes > 0
    assert (room.vram_bytes + room.ram_bytes) // room.entry_bytes > 2 * (
        (plain_room.vram_bytes + plain_room.ram_bytes) // max(1, plain_room.entry_bytes)
    )
    for spending in (packed.vram, packed.ram):
        assert spending is None or spending.used <= spending.budget


@pytest.mark.parametrize("vram", [12 * GIB, None])
def test_a_prediction_counts_only_visited_experts_as_moved_and_expanded(vram: int | None) -> None:
    lanes, sizes = CPU_LANES if vram is None else CARD, packed_mixtral()
    ram = 0 if vram is not None else 12 * GIB
    plan = make_plan(sizes, PlanRequest("cpu" if vram is None else "cuda:0", vram, ram, lanes))
    plan = dataclasses.replace(plan, experts=ExpertRoom())
    on_disk = [place.layer for place in plan.layers if place.tier is Tier.DISK]
    assert on_disk
    assert sizes.experts is not None

    few, many = predict(sizes, plan, lanes, 1), predict(sizes, plan, lanes, 64)

    saved = sum(sizes.experts.layers[layer] * 3 // 4 for layer in on_disk)
    head = plan.head.nbytes if plan.head.num_blocks else 0
    assert few.lanes.disk * lanes.disk == pytest.approx(sum(sizes.layers[layer] for layer in on_disk) + head - saved)
    assert many.lanes.disk * lanes.disk == pytest.approx(few.lanes.disk * lanes.disk + saved)
    read_less = (many.lanes.memory - few.lanes.memory) * lanes.device_memory
    assert read_less > 0.99 * saved * (1 + 2 * sizes.expansion)
