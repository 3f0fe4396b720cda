"""What two models' logits say of each other, against plain transformers in float64 on the same windows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.slow_machine import MACHINES, slow_machine
from lamella_engine import EngineOptions, ShardStore, architecture
from lamella_engine.errors import EngineError, ModelError, OptionError, PlanError
from lamella_engine.model_sizes import sizes_of_sharded
from lamella_engine.open_model import open_sweep_model
from lamella_engine.placement import HeadPlacement, Tier
from lamella_engine.planner import make_plan
from lamella_engine.quality import QualityReport, QualityRequest, run_quality
from lamella_engine.quality_figures import Figures, Scores, score, summarise
from lamella_engine.quality_pair import ModelPair, PairRequest, open_pair
from lamella_engine.quality_text import QualityText, Window, read_text
from lamella_engine.shard import ShardedModel
from lamella_engine.stored_form import StoredForm
from lamella_engine.sweep import SweepModel

CPU = torch.device("cpu")
CLOSE = 1e-4

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@dataclass(frozen=True)
class Checkpoints:
    """The same model twice, the second with weights that are a little off; as directories and as shards."""

    sources: tuple[Path, Path]
    sharded: tuple[ShardedModel, ShardedModel]
    store: Path


def perturbed(source: Path, target: Path, share: float) -> Path:
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    random = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        parameter.data.mul_(1 + share * torch.randn(parameter.shape, generator=random))
    model.save_pretrained(target)
    return target


def twice(source: Path, root: Path, share: float = 0.05) -> Checkpoints:
    other = perturbed(source, root / "other", share)
    store = ShardStore(root / "store")
    sharded = (store.ensure("tiny/full", source=source), store.ensure("tiny/off", source=other))
    return Checkpoints((source, other), sharded, store.root)


def windows_of_ids(count: int, length: int, scored: int) -> list[Window]:
    """Windows of seeded tokens, the last one shorter."""
    random = torch.Generator().manual_seed(3)
    made = []
    for index in range(count):
        ids = torch.randint(3, 127, (length + 1,), generator=random).tolist()
        cut = length + 1 if index < count - 1 else length - scored + 3
        made.append(Window(tuple(ids[: cut - 1]), tuple(ids[length + 1 - scored : cut])))
    return made


def truth(sources: tuple[Path, Path], windows: list[Window]) -> Figures:
    """The figures by transformers' own forward in float64, everything at once."""
    models = [
        AutoModelForCausalLM.from_pretrained(source, dtype=torch.float64, attn_implementation="eager").eval()
        for source in sources
    ]
    for model in models:
        model.set_experts_implementation("eager")  # the others know no float64
    scores = []
    for window in windows:
        count = len(window.targets)
        with torch.inference_mode():
            full, off = (
                torch.log_softmax(model(torch.tensor([window.token_ids])).logits[0, -count:].double(), -1)
                for model in models
            )
        rows = torch.arange(count)
        targets = torch.tensor(window.targets)
        divergence = (full.exp() * (full - off)).sum(-1)
        agreed = (full.argmax(-1) == off.argmax(-1)).double()
        scores.append(Scores(-full[rows, targets], -off[rows, targets], divergence, agreed))
    return summarise(scores, list(range(len(windows))))


def measured(pair: ModelPair, windows: list[Window]) -> Figures:
    scores, numbers = [], []
    for first in range(0, len(windows), pair.windows_per_sweep):
        for number, piece in pair.compare(windows[first : first + pair.windows_per_sweep]):
            scores.append(piece)
            numbers.append(first + number)
    return summarise(scores, numbers)


def check_equal(found: Figures, expected: Figures) -> None:
    assert (found.tokens, found.windows) == (expected.tokens, expected.windows)
    for name in ("reference_perplexity", "candidate_perplexity", "perplexity_ratio", "divergence", "agreement"):
        for part in ("value", "low", "high"):
            value, wanted = getattr(getattr(found, name), part), getattr(getattr(expected, name), part)
            assert value == pytest.approx(wanted, rel=CLOSE, abs=CLOSE), f"{name} {part}"
    assert found.divergence_p99 == pytest.approx(expected.divergence_p99, rel=1e-3)


def request_for(checkpoints: Checkpoints, windows: list[Window], ram: int | str = "auto") -> PairRequest:
    options = EngineOptions(store=checkpoints.store, device="cpu", dtype="float32", ram=ram)
    longest = windows[0]
    return PairRequest(*checkpoints.sharded, options, None, len(longest.token_ids), len(longest.targets), len(windows))


# Packed: rotary, soft caps, learned positions, a nested backbone, scaled logits, experts. Stepwise: attention of its
# own, a recurrent state, a head that is asked for all positions.
@pytest.mark.parametrize(
    "family",
    [
        "llama", "gemma2", "gpt2", "opt", "granite", "qwen3_moe", "cohere2", "gpt_neox",
        "stablelm", "mamba2", "falcon", "openai-gpt",
    ],
)  # fmt: skip
def test_figures_are_those_of_transformers_in_float64(
    family: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    checkpoints = twice(tiny_checkpoint(family), tmp_path)
    windows = windows_of_ids(5, 24, 12)

    with open_pair(request_for(checkpoints, windows), CPU) as pair:
        found = measured(pair, windows)

    check_equal(found, truth(checkpoints.sources, windows))
    assert found.divergence.value > found.divergence.low > 0
    assert found.perplexity_ratio.value != 1


@contextmanager
def streaming(sharded: ShardedModel, store: Path, tier: Tier, num_blocks: int) -> Iterator[SweepModel]:
    """A model on a metered machine, its layers in every tier, its head in so many blocks from `tier`."""
    options = EngineOptions(
        store=store, device="cpu", dtype="float32", max_sequences=64, sweep_tokens=256, kv_tokens=1024
    )
    sizes = sizes_of_sharded(sharded, architecture.build(architecture.load_config(sharded.directory), torch.float32))
    machine = slow_machine(MACHINES[0], 0.001, vram=2**30, ram=2**30)
    plan = make_plan(sizes, machine.request(options))
    tiers = (Tier.VRAM, Tier.RAM, Tier.DISK)
    plan = replace(
        plan,
        layers=tuple(
            replace(place, tier=tiers[place.layer % 3], nbytes=sizes.layers[place.layer]) for place in plan.layers
        ),
        head=HeadPlacement(sizes.head_bytes, tier, num_blocks),
        embedding=tier,  # where the head is the table, both are one
        device_slots=2,
        slot_bytes=max(*sizes.layers, sizes.head_bytes),
        ring_bytes=8 * 2**20,
    )
    model = open_sweep_model(sharded, options, CPU, machine, plan)
    try:
        yield model
    finally:
        model.close()


@pytest.mark.parametrize("family", ["llama", "gemma2", "stablelm"])
@pytest.mark.parametrize("tier", [Tier.RAM, Tier.DISK])
def test_a_head_in_blocks_gives_the_same(
    family: str, tier: Tier, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    checkpoints = twice(tiny_checkpoint(family), tmp_path)
    windows = windows_of_ids(5, 24, 12)
    full, off = checkpoints.sharded

    with streaming(full, tmp_path, tier, 3) as reference, streaming(off, tmp_path, tier, 5) as candidate:
        pair = ModelPair(reference, candidate, 24, 12)
        found = measured(pair, windows)
        again = measured(pair, windows)

    check_equal(found, truth(checkpoints.sources, windows))
    assert again == found


@pytest.mark.parametrize("family", ["llama", "stablelm"])
def test_windows_alone_and_together_from_disk_and_in_ram_give_the_same(
    family: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    checkpoints = twice(tiny_checkpoint(family), tmp_path)
    windows = windows_of_ids(5, 24, 12)
    figures = []

    for ram in ("auto", 0):
        with open_pair(request_for(checkpoints, windows, ram), CPU) as pair:
            assert {place.tier for place in pair.reference.model.plan.layers} == {Tier.DISK if ram == 0 else Tier.RAM}
            assert pair.windows_per_sweep == len(windows)
            figures.append(measured(pair, windows))
            pair.windows_per_sweep = 1
            figures.append(measured(pair, windows))

    for found in figures[1:]:
        check_equal(found, figures[0])


def quality(
    checkpoints: Checkpoints, text: QualityText, dtypes: tuple[str | None, str | None] = (None, None), **changes: int
) -> QualityReport:
    options = EngineOptions(store=checkpoints.store, device="cpu", dtype=dtypes[0])
    request = QualityRequest(text, options, dtypes[1], **({"tokens": 600, "window": 64} | changes))
    return run_quality(*checkpoints.sharded, request)


@pytest.fixture(scope="module")
def llamas(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    """The tiny Llama with its tokenizer, and a copy of it that is a little off."""
    return twice(tiny_llama_dir, tmp_path_factory.mktemp("llamas"))


def test_a_model_is_equal_to_itself(llamas: Checkpoints) -> None:
    same = replace(llamas, sharded=(llamas.sharded[0], llamas.sharded[0]))

    report = quality(same, read_text(None))

    figures = report.figures
    assert figures.perplexity_ratio.value == figures.perplexity_ratio.low == figures.perplexity_ratio.high == 1.0
    assert figures.divergence.value == figures.divergence.high == figures.divergence_p99 == 0.0
    assert figures.agreement.value == figures.agreement.high == 1.0
    assert figures.agreement.low < 1.0
    assert figures.tokens == 600
    assert report.text_sha256 == read_text(None).digest


def test_the_interval_of_a_part_covers_the_whole(llamas: Checkpoints) -> None:
    text = read_text(None)

    whole = quality(llamas, text, tokens=3000).figures
    part = quality(llamas, text, tokens=500).figures

    for name in ("perplexity_ratio", "divergence", "agreement", "reference_perplexity", "candidate_perplexity"):
        figure, true = getattr(part, name), getattr(whole, name).value
        assert figure.low < true < figure.high, name
        assert figure.high - figure.low > getattr(whole, name).high - getattr(whole, name).low, name
    assert whole.divergence.low > 0


def test_half_precision_against_full(llamas: Checkpoints) -> None:
    same = replace(llamas, sharded=(llamas.sharded[0], llamas.sharded[0]))

    report = quality(same, read_text(None), ("bfloat16", "float32"))

    assert (report.reference.dtype, report.candidate.dtype) == ("float32", "bfloat16")
    assert 0 < report.figures.divergence.value < 0.1
    assert 0.5 < report.figures.agreement.value < 1


def test_a_packed_form_against_its_model(llamas: Checkpoints) -> None:
    store = ShardStore(llamas.store)
    packed = [
        replace(llamas, sharded=(llamas.sharded[0], store.ensure("tiny/full", form=StoredForm(quant=quant))))
        for quant in ("int8", "nf4")
    ]

    eight, four = (quality(each, read_text(None)).figures for each in packed)

    assert 0 < eight.divergence.high < four.divergence.low
    assert four.agreement.value < eight.agreement.value < 1


def test_progress_counts_tokens_up_to_all(llamas: Checkpoints) -> None:
    calls: list[tuple[str, int, int]] = []
    request = QualityRequest(read_text(None), EngineOptions(store=llamas.store, device="cpu"), tokens=600, window=64)

    run_quality(*llamas.sharded, request, lambda *call: calls.append(call))

    assert calls[0] == ("measure", 0, 600)
    assert calls[-1] == ("measure", 600, 600)
    assert [call[1] for call in calls] == sorted(call[1] for call in calls)


def test_the_two_models_share_one_budget(llamas: Checkpoints) -> None:
    windows = windows_of_ids(4, 24, 12)
    budget = 400 * 2**20
    with open_pair(request_for(llamas, windows, budget), CPU) as pair:
        used = pair.reference.model.plan.ram.used + pair.candidate.model.plan.ram.used

    assert used <= budget


def test_a_budget_for_neither_is_refused_with_both_in_mind(llamas: Checkpoints) -> None:
    windows = windows_of_ids(4, 24, 12)

    with pytest.raises(PlanError, match="share the budget"), open_pair(request_for(llamas, windows, 2**20), CPU):
        pass


def test_a_run_that_is_broken_off_leaves_the_pair_usable(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    checkpoints = twice(tiny_checkpoint("llama"), tmp_path)
    windows = windows_of_ids(5, 24, 12)

    with open_pair(request_for(checkpoints, windows), CPU) as pair:
        comparing = pair.compare(windows[: pair.windows_per_sweep])
        next(comparing)
        comparing.close()
        found = measured(pair, windows)

    check_equal(found, truth(checkpoints.sources, windows))


def test_what_cannot_be_measured_is_refused(
    llamas: Checkpoints, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    text = read_text(None)
    with pytest.raises(OptionError, match=r"--window is 600.*512"):
        quality(llamas, text, window=600)
    with pytest.raises(OptionError, match="at least 8"):
        quality(llamas, text, window=4)
    with pytest.raises(OptionError, match=r"--tokens is 0"):
        quality(llamas, text, tokens=0)
    with pytest.raises(OptionError, match="two windows, which score"):
        quality(llamas, text, tokens=40)
    with pytest.raises(OptionError, match="longer text"):
        quality(llamas, QualityText("short", "One sentence and no more."))
    nameless = twice(tiny_checkpoint("llama"), tmp_path)
    with pytest.raises(ModelError, match=r"no tokenizer.*tokenizer\.json"):
        quality(nameless, text)


def test_logits_that_are_no_numbers_are_named() -> None:
    good, bad = torch.randn(4, 9), torch.randn(4, 9)
    bad[2, 3] = math.nan
    targets = torch.tensor([0, 1, 2, 3])

    with pytest.raises(EngineError, match="candidate gives 1 of 4"):
        score(good, bad, targets)
    with pytest.raises(EngineError, match="reference gives 1 of 4"):
        score(bad, good, targets)
    with pytest.raises(EngineError, match="not the same model"):
        score(good, good[:, :8], targets)


def test_tokens_that_the_reference_never_expects_add_nothing() -> None:
    logits = torch.tensor([[1.0, 2.0, -math.inf]])
    targets = torch.tensor([1])

    assert score(logits, logits.clone(), targets).divergence.tolist() == [0.0]
    # ln(e^1 + e^2 + e^0.5) less ln(e^1 + e^2): the candidate gives a part to the third token.
    expected = math.log(math.exp(1) + math.exp(2) + math.exp(0.5)) - math.log(math.exp(1) + math.exp(2))
    found = score(logits, torch.tensor([[1.0, 2.0, 0.5]]), targets).divergence.item()
    assert found == pytest.approx(expected)
