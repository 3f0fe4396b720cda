"""A packed head and a packed embedding table: the tokens of what they expand to, wherever they are, tied or not."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from benchmarks.slow_machine import MACHINES, slow_machine
from lamella_engine import Engine, EngineOptions, ShardStore, architecture
from lamella_engine.cli import app
from lamella_engine.embedding_rows import PackedTable, map_piece
from lamella_engine.errors import OptionError, PlanError, ShardError
from lamella_engine.formats import find_format
from lamella_engine.model_sizes import sizes_of_sharded
from lamella_engine.open_model import open_sweep_model
from lamella_engine.packed_shard import read_unpacked
from lamella_engine.packing import Span
from lamella_engine.pieces import tensor_piece
from lamella_engine.placement import Bandwidths, HeadPlacement, ModelSizes, Plan, Tier
from lamella_engine.planner import PlanRequest, make_plan
from lamella_engine.shard import ShardedModel, TensorSpec
from lamella_engine.shard_check import read_shard_layout
from lamella_engine.stored_form import StoredForm
from tests import tiny_models
from tests.engine.engine_driver import generate
from tests.engine.expanded_models import expected_tokens
from tests.engine.test_packed_models import GREEDY, PROMPTS, answers

CPU = torch.device("cpu")
LANES = Bandwidths(disk=1e9, h2d=1e10, device_memory=1e11, flops=1e12)
MIB = 2**20
# Three strips a table, the last of them short and with an odd number of rows.
MANY_ROWS: dict[str, object] = {"vocab_size": 33_001, "hidden_size": 128, "intermediate_size": 128}

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(scope="module")
def many_rows(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool, torch.dtype], Path]:
    """Checkpoints whose tables are packed in three strips, each made once."""
    root = tmp_path_factory.mktemp("many-rows")

    def source(is_tied: bool, dtype: torch.dtype = torch.float32) -> Path:
        directory = root / f"{is_tied}-{dtype}"
        if not directory.exists():
            shape = tiny_models.FAMILIES["llama"] | MANY_ROWS | {"tie_word_embeddings": is_tied, "num_hidden_layers": 2}
            tiny_models.save_checkpoint(directory, "llama", shape, std=0.05, dtype=dtype)
        return directory

    return source


@pytest.fixture(scope="module")
def packed_once(
    many_rows: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[bool, str], tuple[ShardedModel, list[list[int]]]]:
    """Such a model packed, and the tokens of what it expands to; each made once."""
    root = tmp_path_factory.mktemp("packed-once")

    @functools.cache
    def made(is_tied: bool, quant: str) -> tuple[ShardedModel, list[list[int]]]:
        sharded = packed(root / str(is_tied), many_rows(is_tied), quant)
        return sharded, expected_tokens(many_rows(is_tied), quant, PROMPTS, GREEDY.max_tokens)

    return made


def packed(root: Path, source: Path, quant: str) -> ShardedModel:
    return ShardStore(root).ensure("tiny", source=source, form=StoredForm(quant=quant))


def table(sharded: ShardedModel, name: str) -> TensorSpec:
    return next(spec for spec in sharded.root.tensors if spec.name.endswith(name))


def open_placed(sharded: ShardedModel, head: tuple[Tier, int] | None, embedding: Tier) -> Engine:
    """On a metered device with slots no larger than they must be, the head in blocks or ready, the table in a tier."""
    options = EngineOptions(store=sharded.directory, device="cpu", max_sequences=4, sweep_tokens=64, kv_tokens=512)
    built = architecture.build(architecture.load_config(sharded.directory), torch.float32)
    sizes = sizes_of_sharded(sharded, built)
    machine = slow_machine(MACHINES[0], 0.001, vram=2**30, ram=2**30)
    plan = make_plan(sizes, machine.request(options))
    blocks = 0 if head is None else head[1]
    units = -(-sizes.head_units // max(1, blocks)) if blocks else 0
    layers = tuple(
        dataclasses.replace(place, tier=Tier.RAM, nbytes=shard.nbytes)
        for place, shard in zip(plan.layers, sharded.layers, strict=True)
    )
    plan = dataclasses.replace(
        plan,
        layers=layers,
        head=plan.head if head is None else HeadPlacement(sizes.head_bytes, head[0], blocks),
        embedding=embedding,
        device_slots=2,
        slot_bytes=max(*sizes.layers, units * sizes.head_unit),
        ring_bytes=8 * MIB,
    )
    return Engine(open_sweep_model(sharded, options, CPU, machine, plan), None, options)


def check_tokens(engine: Engine, expected: list[list[int]]) -> None:
    assert [generate(engine, prompt, GREEDY).token_ids for prompt in PROMPTS] == expected
    assert answers(engine) == expected


# The head in one block or in three, on the device, in RAM or on disk; rows of the table from wherever they can be.
PLACES = [
    ((Tier.VRAM, 1), Tier.RAM),
    ((Tier.RAM, 3), Tier.RAM),
    ((Tier.RAM, 1), Tier.DISK),
    ((Tier.DISK, 2), Tier.DISK),
    (None, Tier.RAM),
]


@pytest.mark.parametrize(("head", "embedding"), PLACES)
def test_tokens_are_those_of_the_expanded_tables_wherever_they_are(
    head: tuple[Tier, int] | None, embedding: Tier, packed_once: Callable[[bool, str], tuple[ShardedModel, Any]]
) -> None:
    sharded, expected = packed_once(False, "int8,lm_head=nf4,embed_tokens=int8")

    assert len(table(sharded, "lm_head.weight").packed.strips) == 3  # type: ignore[union-attr] # it is packed
    with open_placed(sharded, head, embedding) as engine:
        check_tokens(engine, expected)


@pytest.mark.parametrize(
    ("quant", "head", "embedding"),
    [
        ("fp4,lm_head=int8", (Tier.VRAM, 1), Tier.VRAM),
        ("fp4,lm_head=int8", (Tier.RAM, 2), Tier.DISK),
        ("embeddings=nf4", (Tier.DISK, 3), Tier.DISK),
        ("embeddings=nf4", None, Tier.VRAM),
    ],
)
def test_a_tied_table_is_packed_once_and_serves_both(
    quant: str,
    head: tuple[Tier, int] | None,
    embedding: Tier,
    packed_once: Callable[[bool, str], tuple[ShardedModel, Any]],
) -> None:
    sharded, expected = packed_once(True, quant)

    assert [spec.packed is not None for spec in sharded.root.tensors if spec.shape[0] == 33_001] == [True]
    with open_placed(sharded, head, embedding) as engine:
        check_tokens(engine, expected)


@pytest.mark.parametrize("ram", [0, "auto"])
def test_a_processor_computes_with_packed_tables(
    ram: int | str, packed_once: Callable[[bool, str], tuple[ShardedModel, Any]], tmp_path: Path
) -> None:
    sharded, expected = packed_once(False, "int8,lm_head=nf4,embed_tokens=int8")
    options = EngineOptions(store=tmp_path, device="cpu", ram=ram, max_sequences=4, sweep_tokens=64, kv_tokens=512)

    with Engine.open_sharded(sharded, CPU, options) as engine:
        assert engine.plan.embedding is (Tier.DISK if ram == 0 else Tier.RAM)
        check_tokens(engine, expected)


# Tied under GPT-2's names, beside learned positions; tied, scaled and capped; untied with a bias; experts; states.
@pytest.mark.parametrize(
    ("family", "quant"),
    [
        ("gpt2", "int8,lm_head=int8"),
        ("gpt2", "nf4,wte=nf4,wpe=int8"),
        ("gemma2", "int8,embed_tokens=nf4"),
        ("phi", "nf4,lm_head=int8,embeddings=nf4"),
        ("qwen3_moe", "int8,lm_head=fp4,model.embed_tokens=int8"),
        ("qwen3_next", "nf4,lm_head=int8,embed_tokens=int8"),
    ],
)
def test_tables_of_any_family_are_packed_by_their_names(
    family: str, quant: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    source = tiny_checkpoint(family)
    expected = expected_tokens(source, quant, PROMPTS, GREEDY.max_tokens)

    sharded = packed(tmp_path, source, quant)

    with open_placed(sharded, (Tier.RAM, 1), Tier.DISK) as engine:
        assert answers(engine) == expected


@pytest.mark.parametrize(
    ("is_tied", "head"), [(True, (Tier.VRAM, 1)), (True, None), (False, (Tier.RAM, 3)), (False, (Tier.DISK, 2))]
)
def test_lossless_tables_give_the_very_logits(
    is_tied: bool, head: tuple[Tier, int] | None, many_rows: Callable[..., Path], tmp_path: Path
) -> None:
    source = many_rows(is_tied, torch.bfloat16)
    embedding = (Tier.DISK if head and head[0] is not Tier.VRAM else Tier.VRAM) if is_tied else Tier.RAM
    store = ShardStore(tmp_path)
    whole = store.ensure("tiny", source=source)
    sharded = store.ensure("tiny", form=StoredForm(quant="lossless,lm_head=lossless,embeddings=lossless"))

    with open_placed(whole, head, embedding) as first, open_placed(sharded, head, embedding) as second:
        assert second.plan.head.nbytes < 0.8 * first.plan.head.nbytes or head is None
        assert torch.equal(logits(second), logits(first))
        assert answers(second) == answers(first)


def logits(engine: Engine) -> torch.Tensor:
    """What a sweep of one prompt gives."""
    model = engine.model
    pack = model.pack([Span(tuple(PROMPTS[1]), 0, torch.arange(len(PROMPTS[1])))])
    return model.run(pack, engine._cache).clone()


@pytest.mark.parametrize("quant", ["int8", "nf4", "lossless"])
def test_rows_of_a_packed_table_are_those_of_the_expanded_one(
    quant: str, many_rows: Callable[..., Path], tmp_path: Path
) -> None:
    sharded = packed(tmp_path, many_rows(False, torch.bfloat16), f"embed_tokens={quant}")
    spec = table(sharded, "embed_tokens.weight")
    whole = read_unpacked(sharded.root.path)[spec.name]
    wanted = torch.tensor([0, 1, 77, 16383, 16384, 20000, 32999, 33000])

    stored = PackedTable(spec.moved(-spec.offset), map_piece(tensor_piece(sharded.root, spec)))
    rows, nbytes = stored.rows(wanted, CPU, torch.bfloat16)

    assert torch.equal(rows, whole[wanted])
    assert nbytes < rows.nbytes + 200
    alone = [stored.rows(wanted[index : index + 1], CPU, torch.bfloat16)[0] for index in range(len(wanted))]
    assert torch.equal(torch.cat(alone), whole[wanted])
    original = AutoModelForCausalLM.from_pretrained(many_rows(False, torch.bfloat16), dtype=torch.bfloat16)
    if quant == "lossless":
        assert torch.equal(whole, original.get_input_embeddings().weight)


def test_any_rows_can_be_taken_in_any_order_whatever_escapes() -> None:
    generator = torch.Generator().manual_seed(3)
    spread = torch.randn(50, 300, generator=generator) * 10 ** torch.randint(-9, 9, (50, 1), generator=generator)
    steady = torch.ones(50, 300)
    rows = torch.tensor([49, 0, 7, 7, 48, 49])

    for weight in (spread.bfloat16(), steady.bfloat16()):
        for format in map(find_format, ("nf4", "int8", "lossless")):
            parts = format.encode(weight)
            whole, taken = torch.empty_like(weight), torch.empty(len(rows), 300, dtype=torch.bfloat16)
            format.decode(parts, whole)

            format.decode(format.take_rows(parts, rows), taken)

            assert torch.equal(taken, whole[rows]), format.name


def sizes_with(quant: str, source: Path, root: Path) -> ModelSizes:
    sharded = packed(root, source, quant)
    return sizes_of_sharded(sharded, architecture.build(architecture.load_config(sharded.directory), torch.float32))


def card_plan(sizes: ModelSizes, vram: int) -> Plan:
    return make_plan(sizes, PlanRequest("cuda:0", vram, 2**30, LANES, max_sequences=1, kv_tokens=64, sweep_tokens=8))


def test_a_plan_counts_a_packed_head_in_each_of_its_forms(many_rows: Callable[..., Path], tmp_path: Path) -> None:
    sizes = sizes_with("nf4,lm_head=int8", many_rows(False), tmp_path)
    full = sizes_with("nf4", many_rows(False), tmp_path)
    with pytest.raises(PlanError) as caught:
        card_plan(sizes, 1)
    least = 1 + caught.value.missing_bytes

    plans = [card_plan(sizes, least + step * MIB) for step in range(0, 40, 2)]

    forms = [(plan.head.tier, bool(plan.head.num_blocks)) for plan in plans]
    assert forms == sorted(forms, key=[(Tier.RAM, True), (Tier.VRAM, True), (Tier.VRAM, False)].index)
    assert len(set(forms)) == 3
    for plan in plans:
        assert plan.vram is not None
        assert plan.vram.used <= plan.vram.budget
        assert plan.head.nbytes == (sizes.head_bytes if plan.head.num_blocks else 33_001 * 128 * 4)
        assert plan.head.tier is Tier.VRAM or plan.head.num_blocks * plan.slot_bytes >= sizes.head_bytes
    assert sizes.head_bytes < 0.26 * full.head_bytes
    assert sizes.embedding == full.embedding


def test_the_bytes_of_a_packed_head_and_of_packed_rows_are_counted(
    many_rows: Callable[..., Path], tmp_path: Path
) -> None:
    sharded = packed(tmp_path, many_rows(False), "int8,lm_head=int8,embed_tokens=int8")

    with open_placed(sharded, (Tier.DISK, 3), Tier.RAM) as engine:
        before = engine.counters()
        generate(engine, [5, 9, 5], dataclasses.replace(GREEDY, max_tokens=3))
        after = engine.counters()

    row = 128 + 2 + 1  # codes, scales, exponent
    layers = sum(shard.nbytes for shard in sharded.layers)
    assert after.disk_bytes - before.disk_bytes == 3 * engine.plan.head.nbytes
    assert after.ram_bytes - before.ram_bytes == 3 * layers + (2 + 1 + 1) * row


def test_what_expanding_takes_is_measured_between_two_sweeps(
    packed_once: Callable[[bool, str], tuple[ShardedModel, Any]],
) -> None:
    sharded, expected = packed_once(False, "nf4,layers.1=bf16,lm_head=int8")
    found = []

    with open_placed(sharded, (Tier.DISK, 2), Tier.DISK) as engine:
        before = answers(engine)

        def measure() -> None:
            engine.before_sweep = lambda: None
            found.append(engine.model.expansion_times())

        engine.before_sweep = measure
        measured = [generate(engine, prompt, GREEDY).token_ids for prompt in PROMPTS]

    assert before == measured == expected
    first, second = found[0].layers_s
    assert first > 0
    assert second == 0
    assert found[0].head_s > first
    assert found[0].sweep_s == first + found[0].head_s


def test_what_is_killed_or_damaged_is_packed_again(many_rows: Callable[..., Path], tmp_path: Path) -> None:
    form = StoredForm(quant="int8,lm_head=int8")
    store = ShardStore(tmp_path)
    built = store.ensure("tiny", source=many_rows(False), form=form)
    digests = {shard.path.name: shard.digest for shard in (built.root, *built.layers)}
    times = {path.name: path.stat().st_mtime_ns for path in built.directory.glob("*.safetensors")}

    (tmp_path / built.name / "manifest.json").unlink()
    built.layers[1].path.unlink()
    again = store.ensure("tiny", source=many_rows(False), form=form)

    assert {shard.path.name: shard.digest for shard in (again.root, *again.layers)} == digests
    assert again.root.path.stat().st_mtime_ns == times[again.root.path.name]
    with again.root.path.open("r+b") as file:
        file.seek(again.root.data_start + table(again, "lm_head.weight").offset + 5)
        file.write(b"\xff\xfe\xfd")
    os.utime(again.root.path)
    with pytest.raises(ShardError, match="SHA-256"):
        store.verify(again.name)


@pytest.mark.parametrize("damage", [{"strips": [0, 16384, 33_001]}, {"strips": [0, 33_001]}, {"strips": [0]}])
def test_strips_that_do_not_make_up_the_table_are_refused(
    damage: dict[str, object], many_rows: Callable[..., Path], tmp_path: Path
) -> None:
    sharded = packed(tmp_path, many_rows(False), "lm_head=nf4")
    path, start = sharded.root.path, sharded.root.data_start
    raw = path.read_bytes()
    header = json.loads(raw[8:start])
    described = json.loads(header["__metadata__"]["lamella.packed"])
    described["lm_head.weight"] |= damage
    header["__metadata__"]["lamella.packed"] = json.dumps(described)
    text = json.dumps(header, separators=(",", ":")).encode().ljust(start - 8)

    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[start:])

    with pytest.raises(ShardError, match="packed tensors cannot be understood"):
        read_shard_layout(path, "tiny")


def test_the_commands_build_and_tell_it_and_say_what_contradicts(
    many_rows: Callable[..., Path], tmp_path: Path
) -> None:
    store = ["--store", str(tmp_path)]
    run = CliRunner().invoke

    done = run(app, ["import", "tiny", str(many_rows(True)), "--quant", "int8,lm_head=int8", *store])
    listed = run(app, ["list", *store])
    name = next(word.rstrip(":") for word in done.output.split() if word.startswith("tiny~int8-"))
    told = run(app, ["inspect", name, *store])
    wrong = run(app, ["import", "tiny", str(many_rows(True)), "--quant", "lm_head=int8,embed_tokens=nf4", *store])

    assert done.exit_code == 0, done.output
    assert name in listed.output
    assert "stored as int8,lm_head=int8" in told.output
    assert wrong.exit_code == 2
    assert "are for one weight" in " ".join(wrong.output.split())


def test_the_default_format_leaves_the_tables_as_they_are(many_rows: Callable[..., Path], tmp_path: Path) -> None:
    sharded = packed(tmp_path, many_rows(False), "int8")

    assert [spec.packed for spec in sharded.root.tensors] == [None, None, None]


def test_calibrating_what_lies_outside_the_layers_alone_is_refused(
    many_rows: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(OptionError, match=r"calibrated for matrices inside the layers.*leave 'calibrated' out"):
        packed(tmp_path, many_rows(False), "int8,lm_head=nf4,calibrated")
