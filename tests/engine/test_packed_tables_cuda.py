"""On a GPU: a packed head and a packed embedding table give the tokens of what they expand to, wherever they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lamella_engine import Engine, EngineOptions, ShardStore, architecture
from lamella_engine.bench import BenchRequest, run_bench
from lamella_engine.calibration import assumed_bandwidths
from lamella_engine.errors import PlanError
from lamella_engine.model_sizes import sizes_of_sharded
from lamella_engine.placement import ModelSizes, Plan, Tier
from lamella_engine.planner import PlanRequest, make_plan
from lamella_engine.shard import ShardedModel
from lamella_engine.stored_form import StoredForm
from tests import tiny_models
from tests.engine.engine_driver import generate
from tests.engine.expanded_models import expected_tokens
from tests.engine.test_packed_models import GREEDY, PROMPTS, answers
from tests.engine.test_packed_tables import logits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

CUDA = torch.device("cuda", 0)
MIB = 2**20
# A head of 68 MB in float32, in nine strips, beside layers of 14 MB.
SHAPE: dict[str, object] = {
    "vocab_size": 33_001, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 3,
    "num_attention_heads": 8,
}  # fmt: skip
FORMS = {
    "ready": (Tier.VRAM, False),
    "packed": (Tier.VRAM, True),
    "ram": (Tier.RAM, True),
    "disk": (Tier.DISK, True),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Checkpoints of `SHAPE`, each made once."""
    root = tmp_path_factory.mktemp("tables")

    def source(is_tied: bool, dtype: torch.dtype = torch.float32) -> Path:
        directory = root / f"{is_tied}-{dtype}"
        if not directory.exists():
            shape = tiny_models.FAMILIES["llama"] | SHAPE | {"tie_word_embeddings": is_tied}
            tiny_models.save_checkpoint(directory, "llama", shape, std=0.05, dtype=dtype)
        return directory

    return source


def options_for(root: Path, form: str, vram: int | str = "auto") -> EngineOptions:
    return EngineOptions(
        store=root, max_sequences=4, sweep_tokens=64, kv_tokens=512, vram=vram, ram=0 if form == "disk" else "512MiB"
    )


def plan_with(sizes: ModelSizes, vram: int, form: str) -> Plan:
    ram = 0 if form == "disk" else 512 * MIB
    return make_plan(
        sizes,
        PlanRequest("cuda:0", vram, ram, assumed_bandwidths(CUDA), max_sequences=4, kv_tokens=512, sweep_tokens=64),
    )


def budget_for(sizes: ModelSizes, form: str) -> int:
    """The smallest device budget, in steps of two MiB, with which the head is planned in that form."""
    try:
        plan_with(sizes, 1, form)
    except PlanError as error:
        least = 1 + error.missing_bytes
    budgets = range(least, least + 200 * MIB, 2 * MIB)
    plans = ((vram, plan_with(sizes, vram, form)) for vram in budgets)
    return next(vram for vram, plan in plans if (plan.head.tier, plan.head.num_blocks > 0) == FORMS[form])


def open_with_head(sharded: ShardedModel, root: Path, form: str, dtype: torch.dtype = torch.float32) -> Engine:
    built = architecture.build(architecture.load_config(sharded.directory), dtype)
    vram = budget_for(sizes_of_sharded(sharded, built), form)
    engine = Engine.open_sharded(sharded, CUDA, options_for(root, form, vram))
    head = engine.plan.head
    assert (head.tier, head.num_blocks > 0) == FORMS[form]
    return engine


@pytest.mark.parametrize("form", list(FORMS))
@pytest.mark.parametrize("quant", ["nf4,lm_head=int8,embed_tokens=nf4", "lm_head=fp4,embed_tokens=int8"])
def test_tokens_are_those_of_the_expanded_tables(
    quant: str, form: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    expected = expected_tokens(checkpoint(False), quant, PROMPTS, GREEDY.max_tokens, CUDA)
    sharded = ShardStore(tmp_path).ensure("tiny", source=checkpoint(False), form=StoredForm(quant=quant))

    with open_with_head(sharded, tmp_path, form) as engine:
        assert [generate(engine, prompt, GREEDY).token_ids for prompt in PROMPTS] == expected
        assert answers(engine) == expected
        assert answers(engine) == expected


@pytest.mark.parametrize("form", list(FORMS))
def test_a_tied_table_serves_both(form: str, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    quant = "nf4,lm_head=int8"
    expected = expected_tokens(checkpoint(True), quant, PROMPTS, GREEDY.max_tokens, CUDA)
    sharded = ShardStore(tmp_path).ensure("tiny", source=checkpoint(True), form=StoredForm(quant=quant))

    with open_with_head(sharded, tmp_path, form) as engine:
        assert engine.plan.embedding is (Tier.VRAM if form in ("ready", "packed") else Tier.DISK)
        assert [generate(engine, prompt, GREEDY).token_ids for prompt in PROMPTS] == expected
        assert answers(engine) == expected


@pytest.mark.parametrize("is_tied", [True, False])
def test_lossless_tables_give_the_logits_of_the_model_bit_for_bit(
    is_tied: bool, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    store = ShardStore(tmp_path)
    whole = store.ensure("tiny", source=checkpoint(is_tied, torch.bfloat16))
    packed = store.ensure("tiny", form=StoredForm(quant="lossless,lm_head=lossless,embeddings=lossless"))

    with Engine.open_sharded(whole, CUDA, options_for(tmp_path, "ready")) as engine:
        expected, tokens = logits(engine), answers(engine)
    with open_with_head(packed, tmp_path, "ready", torch.bfloat16) as engine:
        assert torch.equal(logits(engine), expected)
    for form in ("packed", "ram", "disk"):
        with open_with_head(packed, tmp_path, form, torch.bfloat16) as engine:
            # Blocks of rows may be multiplied by another kernel than all rows at once.
            assert torch.allclose(logits(engine), expected, rtol=2**-7, atol=2**-7)
            assert answers(engine) == tokens


def test_what_expanding_takes_is_told_apart_from_the_rest(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    sharded = ShardStore(tmp_path).ensure(
        "tiny", source=checkpoint(False), form=StoredForm(quant="nf4,lm_head=nf4,embed_tokens=nf4")
    )
    request = BenchRequest((1,), 4, 8, EngineOptions(store=tmp_path, device="cuda:0", vram=1, ram="512MiB"))
    with pytest.raises(PlanError) as caught:
        run_bench(sharded, request, lambda _: None)
    options = EngineOptions(store=tmp_path, device="cuda:0", vram=1 + caught.value.missing_bytes, ram="512MiB")

    report = run_bench(sharded, BenchRequest((1,), 4, 8, options), lambda _: None)

    expansion, (row,) = report.expansion, report.rows
    assert all(seconds > 0 for seconds in expansion.layers_s)
    assert expansion.head_s > 0
    assert expansion.sweep_s == pytest.approx(sum(expansion.layers_s) + expansion.head_s)
    assert expansion.sweep_s < 2 * row.profile.compute_s
    assert row.other_s_per_layer > 0
