"""Codes chosen for a text: better outputs for the same bytes, measured inputs that are the model's own, one build."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from lamella_engine import EngineOptions, ShardStore, architecture, calibration_text, shard_builder
from lamella_engine.calibration_text import CalibrationText
from lamella_engine.cli import app
from lamella_engine.convert import ModelPlan, plan
from lamella_engine.errors import CheckpointError, EngineError, ModelNotFound, OptionError
from lamella_engine.formats import calibrated_rounding, find_format
from lamella_engine.formats.calibrated_rounding import SpanFeedback, encode_calibrated, feedback_of, spans_of
from lamella_engine.formats.four_bit import FourBit
from lamella_engine.layer_inputs import LayerInputs
from lamella_engine.open_source import open_source
from lamella_engine.quality import QualityRequest, run_quality
from lamella_engine.quality_text import read_text
from lamella_engine.quant_spec import parse_quant
from lamella_engine.stored_form import StoredForm
from lamella_engine.texts import CALIBRATION_DIGEST, CALIBRATION_TEXT, DEFAULT_TEXT
from tests import tiny_models

CPU = torch.device("cpu")
FAMILIES = ("llama", "gemma2", "qwen3_moe", "mixtral", "qwen3_next", "falcon_h1", "phi")

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def four_bit(name: str) -> FourBit:
    format = find_format(name)
    assert isinstance(format, FourBit)
    return format


def correlated(columns: int, seed: int, rank: int = 8) -> torch.Tensor:
    """Inputs [512, columns] that mostly lie in few directions, as those of layers do."""
    random = torch.Generator().manual_seed(seed)
    few = torch.randn(512, rank, generator=random) @ torch.randn(rank, columns, generator=random)
    return few + 0.3 * torch.randn(512, columns, generator=random)


def feedback(inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    parts = [inputs[:, span] for span in spans_of(inputs.shape[1])]
    return tuple(feedback_of(part.T @ part / len(part)) for part in parts)


def inverse_of(feedback: SpanFeedback) -> torch.Tensor:
    """The inverse moments in the matrix's own order of columns."""
    back = torch.argsort(feedback.order)
    return (feedback.root.T @ feedback.root)[back][:, back]


def expanded(format: FourBit, parts: dict[str, torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(like)
    format.decode(parts, out)
    return out


@pytest.mark.parametrize("name", ["nf4", "fp4"])
@pytest.mark.parametrize("columns", [64, 200, 328])
def test_outputs_change_less_than_by_the_nearest_codes(name: str, columns: int) -> None:
    format = four_bit(name)
    weight = torch.randn(96, columns, generator=torch.Generator().manual_seed(1))
    inputs = correlated(columns, seed=2)

    chosen = expanded(format, encode_calibrated(format, weight, feedback(inputs)), weight)
    nearest = expanded(format, format.encode(weight), weight)

    def loss(packed: torch.Tensor) -> float:
        return float((inputs @ (packed - weight).T).square().sum())

    assert loss(chosen) < 0.5 * loss(nearest)


def test_inputs_that_say_nothing_give_the_nearest_codes() -> None:
    format = four_bit("nf4")
    weight = torch.randn(32, 192, generator=torch.Generator().manual_seed(3))

    chosen = encode_calibrated(format, weight, (feedback_of(torch.eye(192)),))

    nearest = format.encode(weight)
    assert chosen.keys() == nearest.keys()
    assert all(torch.equal(chosen[suffix], nearest[suffix]) for suffix in nearest)


def test_columns_with_the_largest_inputs_are_rounded_first_and_the_best() -> None:
    format = four_bit("nf4")
    weight = torch.randn(64, 192, generator=torch.Generator().manual_seed(9))
    inputs = correlated(192, seed=10)
    inputs[:, 150:] *= 8

    (given,) = feedback(inputs)
    parts = encode_calibrated(format, weight, (given,))

    assert set(given.order[:42].tolist()) == set(range(150, 192))
    lost = (expanded(format, parts, weight) - weight).square().mean(dim=0)
    assert lost[150:].mean() < lost[:150].mean()
    plain = feedback_of(inputs.T @ inputs / len(inputs))
    in_order = SpanFeedback(torch.arange(192), _root_in_order(inputs), plain.moments)
    other = encode_calibrated(format, weight, (in_order,))
    changed = [(inputs @ (expanded(format, each, weight) - weight).T).square().sum() for each in (parts, other)]
    assert changed[0] < changed[1]


def _root_in_order(inputs: torch.Tensor) -> torch.Tensor:
    moments = inputs.T @ inputs / len(inputs)
    moments += 0.01 * moments.diagonal().mean() * torch.eye(len(moments))
    return torch.linalg.cholesky(torch.linalg.inv(moments), upper=True)


def test_a_wide_matrix_is_rounded_in_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrated_rounding, "SPAN", 128)
    format = four_bit("nf4")
    weight = torch.randn(16, 300, generator=torch.Generator().manual_seed(4))
    inputs = correlated(300, seed=5)

    parts = encode_calibrated(format, weight, feedback(inputs))

    assert [span.stop - span.start for span in spans_of(300)] == [128, 128, 44]
    for span in spans_of(300):
        alone = encode_calibrated(format, weight[:, span], feedback(inputs[:, span]))
        first, last = span.start // 2, -(-span.stop // 2)
        # A row's exponent is common to its spans, so only what does not depend on it is compared.
        assert parts["codes"][:, first:last].shape == alone["codes"].shape
    nearest = format.encode(weight)
    lost = [(inputs @ (expanded(format, each, weight) - weight).T).square().sum() for each in (parts, nearest)]
    assert lost[0] < lost[1]


def test_inputs_that_are_always_zero_do_no_harm() -> None:
    format = four_bit("nf4")
    weight = torch.randn(16, 128, generator=torch.Generator().manual_seed(6))
    inputs = correlated(128, seed=7)
    inputs[:, 40:90] = 0

    packed = expanded(format, encode_calibrated(format, weight, feedback(inputs)), weight)

    assert float((packed - weight).norm() / weight.norm()) < 0.2


def test_damaged_weights_and_moments_are_refused() -> None:
    weight = torch.full((4, 64), float("inf"))

    with pytest.raises(CheckpointError, match="damaged"):
        encode_calibrated(four_bit("nf4"), weight, (feedback_of(torch.eye(64)),))
    with pytest.raises(CheckpointError, match="no usable numbers"):
        feedback_of(torch.full((64, 64), float("nan")))


def planned(source: Path) -> tuple[architecture.Architecture, ModelPlan]:
    checkpoint = open_source(source)
    built = architecture.build(checkpoint.load_config(), torch.float32)
    return built, plan(built, checkpoint.conversions(built), "float32")


def layer_weights(model_plan: ModelPlan, index: int) -> dict[str, torch.Tensor]:
    layer = model_plan.layers[index]
    made: dict[str, torch.Tensor] = {}
    for conversion in layer.conversions:
        made |= {name.removeprefix(layer.prefix): value for name, value in conversion.run().items()}
    return made


@pytest.mark.parametrize("family", FAMILIES)
def test_inputs_are_those_of_the_whole_model(family: str, tiny_checkpoint: Callable[[str], Path]) -> None:
    source = tiny_checkpoint(family)
    ids = torch.randint(3, 127, (3, 24), generator=torch.Generator().manual_seed(8))
    built, model_plan = planned(source)
    layers_path = built.layers_path

    stream = LayerInputs(built, model_plan, ids, CPU)
    found: dict[str, torch.Tensor] = {}
    for index in range(len(model_plan.layers)):
        weights = layer_weights(model_plan, index)
        given = stream.measure(index, weights, [name for name in weights if weights[name].dim() == 2])
        found |= {f"{layers_path}.{index}.{name}": inverse_of(spans[0]) for name, spans in given.items()}
        stream.go_on(index, weights)

    expected = moments_of(source, ids, found)
    assert {name.rsplit(".", 2)[-2] for name in found} & {"o_proj", "down_proj", "out_proj", "fc2", "dense"}
    for name, moment in expected.items():
        inverse = inverse_of(feedback_of(moment))
        torch.testing.assert_close(found[name], inverse, rtol=2e-3, atol=2e-3, msg=lambda m, n=name: n + m)


def moments_of(source: Path, ids: torch.Tensor, names: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same by a whole model of transformers, all windows in a batch."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    found: dict[str, torch.Tensor] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def add(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            rows = args[0].reshape(-1, args[0].shape[-1])
            found[name] = rows.T @ rows / len(rows)

        return add

    for name in names:
        model.get_submodule(name.rpartition(".")[0]).register_forward_pre_hook(hook(name))
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    return found


def test_layers_are_asked_for_in_order(tiny_checkpoint: Callable[[str], Path]) -> None:
    built, model_plan = planned(tiny_checkpoint("llama"))
    stream = LayerInputs(built, model_plan, torch.ones(1, 8, dtype=torch.int64), CPU)

    with pytest.raises(EngineError, match="layer 0 comes next"):
        stream.measure(1, layer_weights(model_plan, 1), [])


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a tokenizer and matrices wide enough to pack."""
    directory = tiny_models.save_tiny_llama(tmp_path_factory.mktemp("wide") / "source")
    return directory


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "own.txt"
    path.write_text(DEFAULT_TEXT.read_text()[:16_000])
    return path


def test_a_calibrated_model_lies_beside_the_plain_one_and_loses_less(wide: Path, text: Path, tmp_path: Path) -> None:
    store = ShardStore(tmp_path / "store")

    full = store.ensure("tiny", source=wide)
    plain = store.ensure("tiny", form=StoredForm(quant="nf4"))
    calibrated = store.ensure("tiny", form=StoredForm(quant=f"nf4,calibrated={text}"))

    assert plain.size_bytes == calibrated.size_bytes
    assert store.manifest(calibrated.name).quant.startswith("nf4,calibrated=")
    options = EngineOptions(store=store.root, device="cpu")
    request = QualityRequest(read_text(text), options, tokens=512, window=128)
    lost = [run_quality(full, each, request).figures.divergence.value for each in (plain, calibrated)]
    assert 0 < lost[1] < 0.9 * lost[0]


def test_a_killed_build_goes_on_to_the_same_shards(
    wide: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    form = StoredForm(quant=f"nf4,calibrated={text}")
    whole = ShardStore(tmp_path / "whole").ensure("tiny", source=wide, form=form)
    write_one, written = shard_builder._write_one, 0

    def killed(*args: object) -> object:
        nonlocal written
        if written == 3:
            raise KeyboardInterrupt
        written += 1
        return write_one(*args)  # type: ignore[arg-type] # passed on as they came

    broken = ShardStore(tmp_path / "broken")
    monkeypatch.setattr(shard_builder, "_write_one", killed)
    with pytest.raises(KeyboardInterrupt):
        broken.ensure("tiny", source=wide, form=form)
    monkeypatch.setattr(shard_builder, "_write_one", write_one)

    again = broken.ensure("tiny", source=wide, form=form)

    assert [shard.path.read_bytes() for shard in again.layers] == [shard.path.read_bytes() for shard in whole.layers]


def test_the_text_passes_the_embedding_as_it_is_packed(wide: Path, text: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(wide, dtype=torch.float32)
    table = model.get_input_embeddings().weight.data
    find_format("nf4").decode(find_format("nf4").encode(table), table)
    before = tmp_path / "before"
    shutil.copytree(wide, before)
    model.save_pretrained(before)

    store = ShardStore(tmp_path / "store")
    packed = store.ensure("packed", source=wide, form=StoredForm(quant=f"nf4,calibrated={text},embed_tokens=nf4"))
    whole = store.ensure("whole", source=before, form=StoredForm(quant=f"nf4,calibrated={text}"))

    assert [layer.digest for layer in packed.layers] == [layer.digest for layer in whole.layers]
    assert packed.root.nbytes < whole.root.nbytes


def test_what_cannot_be_calibrated_is_refused_with_the_alternative(
    wide: Path, text: Path, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    store = ShardStore(tmp_path / "store")
    short = tmp_path / "short.txt"
    short.write_text("Too short.")

    with pytest.raises(OptionError, match=r"nothing is packed as nf4 or fp4"):
        parse_quant("int8,calibrated")
    with pytest.raises(OptionError, match="given twice"):
        parse_quant("nf4,calibrated,calibrated")
    with pytest.raises(OptionError, match="cannot be read"):
        parse_quant(f"nf4,calibrated={tmp_path}/absent.txt")
    with pytest.raises(OptionError, match="a file is missing"):
        parse_quant("nf4,calibrated=")
    with pytest.raises(OptionError, match="longer text"):
        store.ensure("tiny", source=wide, form=StoredForm(quant=f"nf4,calibrated={short}"))
    with pytest.raises(CheckpointError, match="no tokenizer"):
        store.ensure("bare", source=tiny_checkpoint("llama"), form=StoredForm(quant=f"nf4,calibrated={text}"))
    with pytest.raises(ModelNotFound, match="not known here"):
        store.ensure("tiny~int8-calibrated")
    assert list(store.list()) == []


def test_the_text_that_ships_is_named_without_a_digest(tmp_path: Path) -> None:
    copy = tmp_path / "copy.txt"
    copy.write_bytes(CALIBRATION_TEXT.read_bytes())

    shipped, own = parse_quant("nf4,calibrated"), parse_quant(f"nf4,calibrated={copy}")

    assert str(shipped) == "nf4,calibrated"
    assert str(own) == f"nf4,calibrated={CALIBRATION_DIGEST[:12]}"
    assert CalibrationText.read(str(copy)).digest == CALIBRATION_DIGEST
    assert hashlib.sha256(CALIBRATION_TEXT.read_bytes()).hexdigest() == CALIBRATION_DIGEST


def test_the_command_line_builds_it_under_a_name_that_says_so(
    wide: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration_text, "MAX_TOKENS", 4608)  # of the text that ships, for time's sake
    arguments = ["import", "tiny", str(wide), "--quant", "nf4,calibrated", "--store", str(tmp_path / "store")]

    result = CliRunner().invoke(app, arguments)

    assert result.exit_code == 0, result.output
    assert ShardStore(tmp_path / "store").manifest("tiny~nf4-calibrated").quant == "nf4,calibrated"
    assert len(ShardStore(tmp_path / "store").ensure("tiny~nf4-calibrated").layers) == 4
