"""On a GPU: every way a family is run, its layers on the card, in host memory or on disk, as a full load there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from lamella_engine import Engine, EngineOptions, Sampling, ShardStore
from lamella_engine.placement import Tier
from lamella_engine.shard import ShardedModel
from lamella_engine.stored_form import StoredForm
from tests import tiny_models
from tests.engine.engine_driver import full_load_tokens, gather, generate, open_smallest, submit_ids
from tests.engine.test_experts import FAMILIES as WITH_EXPERTS
from tests.engine.test_experts import MANY, check_bytes_of_one_token
from tests.engine.test_families import PACKED, STEPWISE
from tests.engine.test_vision_models import MODELS as VISION
from tests.engine.test_vision_models import save_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

CUDA = torch.device("cuda", 0)
PROMPTS = [list(range(5, 10)), list(range(10, 50)), [9, 8, 7]]
GREEDY = Sampling(max_tokens=10, ignore_eos=True)


@pytest.fixture(scope="module")
def tokens(tiny_checkpoint: Callable[[str], Path]) -> Callable[[str], list[list[int]]]:
    """Greedy tokens of a family's full load on the GPU, made once."""
    made: dict[str, list[list[int]]] = {}

    def of(family: str) -> list[list[int]]:
        if family not in made:
            made[family] = full_load(AutoModelForCausalLM, tiny_checkpoint(family))
        return made[family]

    return of


@pytest.fixture(scope="module")
def many_experts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], tuple[Path, list[list[int]]]]]:
    """A family with sixteen experts of which a token visits two, and the tokens of its full load."""
    made: dict[str, tuple[Path, list[list[int]]]] = {}

    def of(family: str) -> tuple[Path, list[list[int]]]:
        if family not in made:
            directory = tmp_path_factory.mktemp("experts") / family
            source = tiny_models.save_checkpoint(directory, family, {**tiny_models.FAMILIES[family], **MANY})
            made[family] = source, full_load(AutoModelForCausalLM, source)
        return made[family]

    yield of
    made.clear()


def full_load(kind: type[AutoModelForCausalLM] | type[AutoModelForImageTextToText], source: Path) -> list[list[int]]:
    model = kind.from_pretrained(source, dtype=torch.float32, attn_implementation="eager").eval().to(CUDA)
    return [full_load_tokens(model, prompt, GREEDY.max_tokens) for prompt in PROMPTS]


def open_at(place: str, source: Path, root: Path, sweep_tokens: int = 64) -> Engine:
    """An engine whose layers are all at `place`: "vram", "ram" or "disk"."""
    sharded: ShardedModel = ShardStore(root).ensure("tiny", source=source)
    options = EngineOptions(
        store=root, max_sequences=4, sweep_tokens=sweep_tokens, ram=0 if place == "disk" else "auto"
    )
    engine = Engine.open_sharded(sharded, CUDA, options) if place == "vram" else open_smallest(sharded, options)
    assert {layer.tier for layer in engine.plan.layers} == {Tier(place)}
    return engine


def together(engine: Engine) -> list[list[int]]:
    names = [str(index) for index in range(len(PROMPTS))]
    for name, prompt in zip(names, PROMPTS, strict=True):
        submit_ids(engine, name, prompt, GREEDY)
    outcomes = gather(engine, set(names))
    return [outcomes[name].token_ids for name in names]


@pytest.mark.parametrize("place", ["vram", "ram", "disk"])
@pytest.mark.parametrize("family", STEPWISE)
def test_stepwise_families_equal_a_full_load(
    family: str, place: str, tokens: Callable[[str], list[list[int]]], tiny_checkpoint: Callable[[str], Path],
    tmp_path: Path,
) -> None:  # fmt: skip
    expected = tokens(family)

    with open_at(place, tiny_checkpoint(family), tmp_path) as engine:
        assert engine.model.path == "stepwise"
        assert [generate(engine, prompt, GREEDY).token_ids for prompt in PROMPTS] == expected
        assert together(engine) == expected


@pytest.mark.parametrize("place", ["vram", "disk"])
@pytest.mark.parametrize("family", PACKED)
def test_packed_families_equal_a_full_load(
    family: str, place: str, tokens: Callable[[str], list[list[int]]], tiny_checkpoint: Callable[[str], Path],
    tmp_path: Path,
) -> None:  # fmt: skip
    expected = tokens(family)

    with open_at(place, tiny_checkpoint(family), tmp_path, sweep_tokens=16) as engine:
        assert engine.model.path == "packed"
        assert [generate(engine, prompt, GREEDY).token_ids for prompt in PROMPTS] == expected
        assert together(engine) == expected


@pytest.mark.parametrize("place", ["vram", "ram", "disk"])
@pytest.mark.parametrize("family", WITH_EXPERTS)
def test_experts_fetched_when_routed_give_the_tokens_of_a_full_load(
    family: str, place: str, many_experts: Callable[[str], tuple[Path, list[list[int]]]], tmp_path: Path
) -> None:
    source, expected = many_experts(family)

    with open_at(place, source, tmp_path) as engine:
        assert [generate(engine, prompt, GREEDY).token_ids for prompt in PROMPTS] == expected
        assert together(engine) == expected


@pytest.mark.parametrize("place", ["ram", "disk"])
@pytest.mark.parametrize("family", WITH_EXPERTS)
def test_one_token_moves_its_own_experts_and_what_is_dense(
    family: str, place: str, many_experts: Callable[[str], tuple[Path, list[list[int]]]], tmp_path: Path
) -> None:
    source, _ = many_experts(family)

    with open_at(place, source, tmp_path) as engine:
        check_bytes_of_one_token(engine, place)


@pytest.mark.parametrize("place", ["vram", "disk"])
@pytest.mark.parametrize("family", list(VISION))
def test_text_of_models_that_see_equals_a_full_load(family: str, place: str, tmp_path: Path) -> None:
    save_model(family, tmp_path / "source")
    expected = full_load(AutoModelForImageTextToText, tmp_path / "source")

    with open_at(place, tmp_path / "source", tmp_path / "store") as engine:
        assert together(engine) == expected


@pytest.mark.parametrize("place", ["vram", "ram", "disk"])
def test_layers_in_the_originals_files_equal_a_full_load(
    place: str, tokens: Callable[[str], list[list[int]]], tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    source = tiny_checkpoint("llama")
    model = ShardStore(tmp_path).ensure("tiny", source=source, form=StoredForm(in_place=True))
    assert all(shard.path.name.startswith("original-") for shard in model.layers)
    expected = tokens("llama")  # before an engine that limits what this process may take of the card

    with open_at(place, source, tmp_path) as engine:
        assert [generate(engine, prompt, GREEDY).token_ids for prompt in PROMPTS] == expected
        assert together(engine) == expected
