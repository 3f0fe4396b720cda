"""Mixes of packed formats for a number of bytes: small enough, with little error, measured once."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from lamella_engine import Engine, EngineOptions, Sampling, ShardStore
from lamella_engine.cli import app
from lamella_engine.errors import ModelNotFound, OptionError
from lamella_engine.progress import TRY_PACKING
from lamella_engine.quant_mix import MEASURED_DIRECTORY, Choice, Measured, SizeTarget, pick
from lamella_engine.stored_form import StoredForm
from tests import tiny_models
from tests.engine.engine_driver import generate
from tests.engine.expanded_models import expected_tokens

WIDE = {**tiny_models.FAMILIES["llama"], "hidden_size": 256, "intermediate_size": 512}
GREEDY = Sampling(max_tokens=8, ignore_eos=True)
KIB = 1024
SHARES = (0.18, 0.24, 0.6, 0.95)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose matrices take most of it, in float32."""
    return tiny_models.save_checkpoint(tmp_path_factory.mktemp("wide") / "source", "llama", WIDE, std=0.02)


def mix(store: ShardStore, source: Path, nbytes: int, dtype: str | None = None) -> tuple[str, int]:
    """Build the mix; its specification and its size."""
    built = store.ensure("m", source=source, dtype=dtype, form=StoredForm(quant_target_bytes=nbytes))
    manifest = store.manifest(built.name)
    return manifest.quant, manifest.size_bytes


def random_tensors(rng: random.Random) -> list[Measured]:
    def choices() -> tuple[Choice, ...]:
        sizes = [rng.randint(1, 60) for _ in range(rng.randint(1, 3))]
        return (*(Choice(f"f{size}", size, rng.random()) for size in sizes), Choice("full", 64, 0.0))

    return [Measured(index, "w", choices()) for index in range(rng.randint(1, 5))]


@pytest.mark.parametrize("seed", range(40))
def test_the_pick_fits_and_is_the_best_but_for_the_last_step(seed: int) -> None:
    rng = random.Random(seed)
    tensors = random_tensors(rng)
    room = rng.randint(1, 64 * len(tensors))
    fitting = [
        sum(choice.error for choice in every)
        for every in itertools.product(*(each.choices for each in tensors))
        if sum(choice.nbytes for choice in every) <= room
    ]

    picked = pick(tensors, room)

    assert (picked is None) == (not fitting)
    if picked is not None:
        assert all(choice in each.choices for choice, each in zip(picked, tensors, strict=True))
        assert sum(choice.nbytes for choice in picked) <= room
        one_step = max(choice.error for each in tensors for choice in each.choices)
        assert min(fitting) <= sum(choice.error for choice in picked) + 1e-12
        assert sum(choice.error for choice in picked) <= min(fitting) + one_step


def test_every_target_is_kept_and_used(wide: Path, tmp_path: Path) -> None:
    store = ShardStore(tmp_path)
    store.ensure("m", source=wide)
    full_bytes = store.manifest("m").size_bytes

    built = [mix(store, wide, int(full_bytes * share)) for share in SHARES]

    for share, (_, nbytes) in zip(SHARES, built, strict=True):
        assert 0.85 * share * full_bytes < nbytes <= share * full_bytes
    assert len({spec for spec, _ in built}) == 4
    assert "nf4" in built[0][0]
    assert "nf4" not in built[3][0], "what fits better is not packed worse"


def test_its_tokens_are_those_of_what_it_expands_to(wide: Path, tmp_path: Path) -> None:
    store = ShardStore(tmp_path)
    nbytes = int(store.ensure("m", source=wide).size_bytes * 0.2)
    prompts = [[5, 9, 13], list(range(40, 70))]

    sharded = store.ensure("m", form=StoredForm(quant_target_bytes=nbytes))

    spec = store.manifest(sharded.name).quant
    assert "int8" in spec
    assert "nf4" in spec
    options = EngineOptions(store=tmp_path, device="cpu", kv_tokens=128, ram=0)
    with Engine.open_sharded(sharded, torch.device("cpu"), options) as engine:
        tokens = [generate(engine, prompt, GREEDY).token_ids for prompt in prompts]
    assert tokens == expected_tokens(wide, spec, prompts, GREEDY.max_tokens)


def test_of_bfloat16_nothing_is_lost_where_that_fits(wide: Path, tmp_path: Path) -> None:
    store = ShardStore(tmp_path)
    full = store.ensure("whole", source=wide, dtype="bfloat16")

    spec, nbytes = mix(store, wide, int(full.size_bytes * 0.9), dtype="bfloat16")

    assert spec == "lossless"
    assert nbytes < 0.9 * full.size_bytes


def test_what_was_measured_is_not_measured_again(wide: Path, tmp_path: Path) -> None:
    store = ShardStore(tmp_path)
    first, _ = mix(store, wide, 1700 * KIB)
    [records] = (tmp_path / MEASURED_DIRECTORY).iterdir()
    written = records.stat().st_mtime_ns
    lines = records.read_text()

    mix(store, wide, 3000 * KIB)

    assert records.stat().st_mtime_ns == written

    records.write_text(lines[: len(lines) // 2])  # a build was killed while it measured
    store.remove(f"m~{SizeTarget(1700 * KIB)}")
    again, _ = mix(store, wide, 1700 * KIB)

    assert again == first
    assert {line for line in lines.splitlines() if line} <= set(records.read_text().splitlines())


def test_measuring_is_told_to_its_end(wide: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []

    ShardStore(tmp_path).ensure(
        "m",
        source=wide,
        form=StoredForm(quant_target_bytes=1700 * KIB),
        progress=lambda phase, done, total: told.append((done, total)) if phase == TRY_PACKING else None,
    )

    assert told == sorted(told)
    assert told[-1][0] == told[-1][1] > 0


def test_the_least_that_is_named_is_enough(wide: Path, tmp_path: Path) -> None:
    store = ShardStore(tmp_path)

    with pytest.raises(OptionError, match=r"too few.*give at least that") as refusal:
        mix(store, wide, 100 * KIB)
    least = int(str(refusal.value).split("the model takes ")[1].split(" ")[0].replace(",", ""))
    with pytest.raises(OptionError, match="too few"):
        mix(store, wide, least - 1)

    assert mix(store, wide, least)[1] <= least
    assert [manifest.name for manifest in store.list()] == [f"m~{SizeTarget(least)}"]


def test_a_target_that_needs_no_packing_is_refused(wide: Path, tmp_path: Path) -> None:
    store = ShardStore(tmp_path)
    store.ensure("m", source=wide)

    with pytest.raises(OptionError, match=r"enough for the model as it is.*leave the target out"):
        mix(store, wide, store.manifest("m").size_bytes)


def test_experts_get_a_format_as_well(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    store = ShardStore(tmp_path)
    full = store.ensure("m", source=tiny_checkpoint("qwen3_moe"))

    spec, nbytes = mix(store, tiny_checkpoint("qwen3_moe"), int(full.size_bytes * 0.6))

    assert "experts" in spec or "," not in spec
    assert nbytes <= 0.6 * full.size_bytes


def test_the_name_says_the_target(wide: Path, tmp_path: Path) -> None:
    store = ShardStore(tmp_path)
    store.ensure("m", source=wide)

    by_name = store.ensure("m~mix-1700kib")

    assert store.ensure("m", form=StoredForm(quant_target_bytes=1700 * KIB)) == by_name
    assert str(SizeTarget(4 * 2**30)) == "mix-4gib"
    assert str(SizeTarget(1001)) == "mix-1001b"
    for written in ("mix-1024kib", "mix-", "mix-1tib", "mix-01kib"):
        assert SizeTarget.parse(written) is None
    with pytest.raises(ModelNotFound, match="stands for is not known"):
        store.ensure("m~mix-1024kib")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--quant-target-bytes", "4G"], "'G' alone may mean 10^n or 2^n"),
        (["--quant-target-bytes", "50%"], "it is not an amount of bytes"),
        (["--quant-target-bytes", "0"], "nothing fits that"),
        (["--quant-target-bytes", "1MiB", "--quant", "int8"], "give one of them"),
        (["--quant-target-bytes", "1MiB", "--in-place"], "cannot be read in place"),
        (["--quant-target-bytes", "1KiB"], "too few"),
    ],
)
def test_wrong_calls_say_what_is_wrong(options: list[str], words: str, wide: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["import", "m", str(wide), "--store", str(tmp_path), *options])

    assert result.exit_code == 2
    assert words in " ".join(result.output.split())
    assert ShardStore(tmp_path).list() == ()
