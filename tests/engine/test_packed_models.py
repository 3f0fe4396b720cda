"""Models whose layers are packed: the tokens of what they expand to, wherever they are, beside the full model."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from benchmarks.slow_machine import MACHINES, slow_machine
from lamella_engine import Engine, EngineOptions, Sampling, ShardStore, architecture
from lamella_engine.cli import app
from lamella_engine.errors import ModelError, ModelNotFound, OptionError, ShardError
from lamella_engine.model_sizes import sizes_of_sharded
from lamella_engine.open_model import open_sweep_model
from lamella_engine.placement import Tier
from lamella_engine.planner import make_plan
from lamella_engine.shard import ShardedModel
from lamella_engine.stored_form import StoredForm
from tests import tiny_models
from tests.engine.engine_driver import gather, generate, submit_ids
from tests.engine.expanded_models import expected_tokens

CPU = torch.device("cpu")
PROMPTS = [[5, 9, 13], list(range(40, 70)), [7]]
GREEDY = Sampling(max_tokens=8, ignore_eos=True)
FAMILIES = ["llama", "gpt2", "qwen3_moe", "gpt_oss", "qwen3_next"]

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def open_on(sharded: ShardedModel, place: str) -> Engine:
    """On a CPU from disk or RAM, or on a device with its layers there packed, in RAM or on disk."""
    options = EngineOptions(
        store=sharded.directory, device="cpu", max_sequences=4, sweep_tokens=64, kv_tokens=512,
        ram=0 if place == "cpu-disk" else "auto",
    )  # fmt: skip
    if place.startswith("cpu"):
        return Engine.open_sharded(sharded, CPU, options)
    machine = slow_machine(MACHINES[0], 0.001, vram=2**30, ram=2**30)
    built = architecture.build(architecture.load_config(sharded.directory), torch.float32)
    plan = make_plan(sizes_of_sharded(sharded, built), machine.request(options))
    layers = tuple(
        dataclasses.replace(layer, tier=Tier(place), nbytes=shard.nbytes)
        for layer, shard in zip(plan.layers, sharded.layers, strict=True)
    )
    nbytes = max(shard.nbytes for shard in sharded.layers)
    plan = dataclasses.replace(
        plan, layers=layers, device_slots=2, slot_bytes=nbytes, ring_bytes=8 * 2**20, keeps_packed=True
    )
    return Engine(open_sweep_model(sharded, options, CPU, machine, plan), None, options)


def answers(engine: Engine) -> list[list[int]]:
    names = [str(index) for index in range(len(PROMPTS))]
    for name, prompt in zip(names, PROMPTS, strict=True):
        submit_ids(engine, name, prompt, GREEDY)
    outcomes = gather(engine, set(names))
    return [outcomes[name].token_ids for name in names]


@pytest.mark.parametrize("place", ["cpu-disk", "cpu-ram", "vram", "ram", "disk"])
@pytest.mark.parametrize("quant", ["nf4", "int8", "fp4,layers.0=bf16,layers.1=int8"])
def test_tokens_are_those_of_the_expanded_model_wherever_its_layers_are(
    quant: str, place: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    source = tiny_checkpoint("llama")
    expected = expected_tokens(source, quant, PROMPTS, GREEDY.max_tokens)

    sharded = ShardStore(tmp_path).ensure("tiny", source=source, form=StoredForm(quant=quant))

    with open_on(sharded, place) as engine:
        assert [generate(engine, prompt, GREEDY).token_ids for prompt in PROMPTS] == expected
        assert answers(engine) == expected


@pytest.mark.parametrize("quant", ["nf4", "int8"])
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "llama"])
def test_families_of_every_kind_can_be_packed(
    family: str, quant: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    source = tiny_checkpoint(family)
    expected = expected_tokens(source, quant, PROMPTS, GREEDY.max_tokens)
    store = ShardStore(tmp_path)
    whole = store.ensure("tiny", source=source)

    sharded = store.ensure("tiny", form=StoredForm(quant=quant))

    assert sum(layer.nbytes for layer in sharded.layers) < 0.8 * sum(layer.nbytes for layer in whole.layers)
    with open_on(sharded, "disk") as engine:
        assert answers(engine) == expected


def test_lossless_gives_the_very_weights(tmp_path: Path) -> None:
    config = {**tiny_models.FAMILIES["llama"], "hidden_size": 128, "intermediate_size": 256}
    source = tiny_models.save_checkpoint(tmp_path / "source", "llama", config, std=0.02)
    store = ShardStore(tmp_path / "store")
    whole = store.ensure("tiny", source=source, dtype="bfloat16")

    packed = store.ensure("tiny", form=StoredForm(quant="lossless"))

    ratio = sum(layer.nbytes for layer in packed.layers) / sum(layer.nbytes for layer in whole.layers)
    assert ratio < 0.8
    with open_on(whole, "cpu-disk") as first, open_on(packed, "cpu-disk") as second:
        assert answers(first) == answers(second)
        slots = zip(first.model._bindings, second.model._bindings, strict=True)
        for own, other in slots:
            assert own._places[0].spec.name in {place.spec.name for place in other._places}


def test_a_packed_form_lives_beside_the_model_and_is_opened_by_its_name(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    store = ShardStore(tmp_path)
    store.ensure("owner/tiny", source=tiny_checkpoint("llama"))

    built = store.ensure("owner/tiny", form=StoredForm(quant="int8,layers.0=bf16"))
    named = store.ensure("owner/tiny~nf4")

    assert named.name == "owner/tiny~nf4"
    assert built.name.startswith("owner/tiny~int8-")
    assert [manifest.name for manifest in store.list()] == sorted(["owner/tiny", built.name, "owner/tiny~nf4"])
    assert store.ensure(built.name) == built
    assert store.ensure("owner/tiny", form=StoredForm(quant="nf4")) == named
    assert store.verify(built.name).quant == "int8,layers.0=full"
    store.remove("owner/tiny~nf4")
    assert store.has("owner/tiny")


@pytest.mark.parametrize(
    ("quant", "words"),
    [
        ("int4", "'int4' is no format"),
        ("nf4,layers.9=int8", "names layer 9, and the model's layers are 0 to 3"),
        ("full", "packs nothing"),
        ("nf4,head=int8", "names no tensor of the model"),
        ("lossless", "lossless packs bfloat16.*choose int8"),
    ],
)
def test_what_cannot_be_packed_is_refused_before_anything_is_written(
    quant: str, words: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(OptionError, match=words):
        ShardStore(tmp_path).ensure("tiny", source=tiny_checkpoint("llama"), form=StoredForm(quant=quant))

    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".lock"]


def test_a_form_that_only_its_name_tells_cannot_be_guessed(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    store = ShardStore(tmp_path)
    store.ensure("tiny", source=tiny_checkpoint("llama"))

    with pytest.raises(ModelNotFound, match=r"'int8-12345678' stands for is not known.*pull tiny --quant"):
        store.ensure("tiny~int8-12345678")
    with pytest.raises(OptionError, match="is packed already; give quant with tiny"):
        store.ensure("tiny~nf4", form=StoredForm(quant="int8"))


def test_a_killed_build_goes_on_with_what_is_packed(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    store = ShardStore(tmp_path)
    whole = store.ensure("tiny", source=tiny_checkpoint("llama"), form=StoredForm(quant="nf4"))
    times = {path.name: path.stat().st_mtime_ns for path in whole.directory.glob("layer-*")}
    (tmp_path / "tiny~nf4" / "manifest.json").unlink()
    (whole.directory / "layer-00002.safetensors").unlink()

    store.ensure("tiny", source=tiny_checkpoint("llama"), form=StoredForm(quant="nf4"))

    after = {path.name: path.stat().st_mtime_ns for path in whole.directory.glob("layer-*")}
    assert {name for name in times if times[name] != after[name]} == {"layer-00002.safetensors"}


def damage(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize("place", ["the full model", "the checkpoint"])
@pytest.mark.parametrize("quant", ["nf4", "int8,layers.0=bf16"])
def test_a_damaged_packed_file_is_set_aside_and_packed_again(
    place: str, quant: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    store, source = ShardStore(tmp_path / "store"), tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint("llama"), source)
    if place == "the full model":
        store.ensure("tiny", source=source)
    packed = store.ensure("tiny", source=source, form=StoredForm(quant=quant, quant_device="cpu"))
    before = {path.name: path.read_bytes() for path in packed.directory.glob("*.safetensors")}
    times = {path.name: path.stat().st_mtime_ns for path in packed.directory.glob("layer-*")}
    damage(packed.directory / "layer-00001.safetensors")
    (packed.directory / "root.safetensors").unlink()
    if place == "the full model":
        shutil.rmtree(source)

    store.ensure(packed.name)

    store.verify(packed.name)
    assert {path.name: path.read_bytes() for path in packed.directory.glob("*.safetensors")} == before
    after = {path.name: path.stat().st_mtime_ns for path in packed.directory.glob("layer-*")}
    assert {name for name in times if times[name] != after[name]} == {"layer-00001.safetensors"}
    assert [found.name for found in store.root.glob(".damaged/tiny*/*")] == ["layer-00001.safetensors"]


def test_a_damaged_packed_file_without_a_source_is_told_of(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    store, source = ShardStore(tmp_path / "store"), tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint("llama"), source)
    packed = store.ensure("tiny", source=source, form=StoredForm(quant="nf4", quant_device="cpu"))
    damage(packed.directory / "layer-00001.safetensors")
    shutil.rmtree(source)

    with pytest.raises(ShardError, match=r"layer-00001\.safetensors.*lamella models remove tiny~nf4"):
        store.ensure("tiny~nf4")


def test_a_packed_form_is_not_mended_from_a_full_model_of_another_source(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    store, source = ShardStore(tmp_path / "store"), tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint("llama"), source)
    packed = store.ensure("tiny", source=source, form=StoredForm(quant="nf4", quant_device="cpu"))
    os.utime(source / "model.safetensors", (1, 1))
    store.ensure("tiny", source=source)
    damage(packed.directory / "layer-00001.safetensors")

    with pytest.raises(ShardError, match=r"layer-00001\.safetensors"):
        store.ensure("tiny~nf4")


def test_the_original_of_packed_weights_stays(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    store = ShardStore(tmp_path)
    store.ensure("tiny", source=tiny_checkpoint("llama"), form=StoredForm(quant="nf4"))

    with pytest.raises(ModelError, match="does not hold all that its original does"):
        store.delete_original("tiny~nf4", tiny_checkpoint("llama"))


@pytest.mark.parametrize("damage", [{"format": "nf5"}, {"shape": [3, 3]}, {"parts": ["codes"]}, {"dtype": "int8"}])
def test_a_shard_that_says_nonsense_of_its_packed_tensors_is_refused(
    damage: dict[str, object], tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    store = ShardStore(tmp_path)
    model = store.ensure("tiny", source=tiny_checkpoint("llama"), form=StoredForm(quant="nf4"))
    path = model.layers[1].path
    raw = path.read_bytes()
    header = json.loads(raw[8 : model.layers[1].data_start])
    described = json.loads(header["__metadata__"]["lamella.packed"])
    first = next(iter(described))
    described[first] |= damage
    header["__metadata__"]["lamella.packed"] = json.dumps(described)
    text = json.dumps(header, separators=(",", ":")).encode().ljust(model.layers[1].data_start - 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[model.layers[1].data_start :])
    manifest = tmp_path / "tiny~nf4" / "manifest.json"
    values = json.loads(manifest.read_text())
    values["layers"][1] |= {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "nbytes": os.path.getsize(path)}
    manifest.write_text(json.dumps(values))

    with pytest.raises(ShardError, match=r"layer-00001.*packed tensors cannot be understood"):
        store.open("tiny~nf4")


def test_the_commands_build_show_and_name_it(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    store = ["--store", str(tmp_path)]
    run = CliRunner().invoke
    assert run(app, ["import", "tiny", str(tiny_checkpoint("llama")), *store]).exit_code == 0

    done = run(app, ["pull", "tiny", "--quant", "int8", *store])
    again = run(app, ["pull", "tiny", "--quant", "int8", *store])
    listed = run(app, ["list", *store])
    told = run(app, ["inspect", "tiny~int8", *store])
    wrong = run(app, ["pull", "tiny", "--quant", "q4", *store])
    both = run(app, ["pull", "tiny", "--quant", "int8", "--in-place", *store])

    assert done.exit_code == 0, done.output
    assert "tiny~int8 is ready" in done.output
    assert "tiny~int8 is in the store already" in again.output
    assert "tiny~int8" in listed.output
    assert "float32, stored as int8" in told.output
    assert wrong.exit_code == 2
    assert "nf4, fp4, int8, lossless" in wrong.output
    assert both.exit_code == 2
