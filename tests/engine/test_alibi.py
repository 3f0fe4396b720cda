"""Linear position biases: as published, in packed attention of every form, and through the whole engine."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import BloomConfig, LlamaConfig, PretrainedConfig
from transformers.models.bloom.modeling_bloom import build_alibi_tensor

from lamella_engine import Engine, EngineOptions, Sampling, ShardStore, architecture, attention
from lamella_engine.alibi import SLOPES, published_slopes, slopes_of
from lamella_engine.attention import packed_attention, sweep_attention
from lamella_engine.errors import CheckpointError, UnsupportedModel
from lamella_engine.importers.imported import IMPORTED_FROM
from lamella_engine.inspection import inspect
from lamella_engine.kv_cache import KVCache, PageTable
from lamella_engine.layer_graphs import DecodePack
from lamella_engine.model_sizes import sizes_of_source
from lamella_engine.model_source import find_model
from lamella_engine.packing import PackedSweep, Span
from lamella_engine.shard import ShardedModel
from lamella_engine.workspace import workspace_bytes
from tests.engine.engine_driver import gather, generate, submit_ids
from tests.engine.published_models import PUBLISHED, WIDTH
from tests.engine.tape_recorder import TapeRecorder
from tests.engine.test_layer_graphs import join_and_leave, open_recording, plain
from tests.engine.test_samples import content, run_apart, run_samples

CPU = torch.device("cpu")
GREEDY = Sampling(max_tokens=24, ignore_eos=True)
RANDOM = Sampling(max_tokens=24, temperature=1.1, top_p=0.95, seed=5, ignore_eos=True)
PROMPTS = [[5, 9, 13], list(range(20, 60)), [7], list(range(100, 117)), [3] * 50]


@pytest.mark.parametrize("heads", [1, 2, 3, 6, 8, 12, 32, 40, 56, 64])
def test_slopes_are_those_of_families_that_compute_them_natively(heads: int) -> None:
    found = torch.tensor(published_slopes(heads))

    native = build_alibi_tensor(torch.ones(1, 2, dtype=torch.int64), heads, torch.float32)[:, 0, 1]
    torch.testing.assert_close(found, native, rtol=1e-6, atol=0)


def test_forty_heads_take_every_other_slope_of_twice_as_many() -> None:
    slopes = published_slopes(40)

    assert slopes[:32] == [2 ** (-number / 4) for number in range(1, 33)]
    assert slopes[32:] == [2 ** (-number / 8) for number in range(1, 16, 2)]


class _Layer(nn.Module):
    layer_idx = 0


@dataclasses.dataclass
class _Sequence:
    """Random queries, keys and values of one sequence, its pages, and what attention gives for each of its tokens."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    table: PageTable
    results: list[torch.Tensor] = dataclasses.field(default_factory=list)
    done: int = 0


FORMS: dict[str, dict[str, object]] = {
    "plain": {},
    "window": {"sliding_window": 7},
    "soft cap": {"softcap": 2.0},
    "sinks": {"s_aux": torch.linspace(-1, 1, 6)},
    "soft cap, window and sinks": {"softcap": 2.0, "sliding_window": 7, "s_aux": torch.linspace(-1, 1, 6)},
}


@pytest.mark.parametrize("score_bytes", [attention.SCORE_BYTES, 1])
@pytest.mark.parametrize("key_heads", [6, 2, 1])
@pytest.mark.parametrize("form", FORMS)
def test_packed_attention_adds_slope_times_distance(
    form: str, key_heads: int, score_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "SCORE_BYTES", score_bytes)  # one byte: a chunk is taken in pieces of 16
    slopes = torch.tensor(published_slopes(6))
    cache = KVCache(512, CPU)
    sequences = [_sequence(cache, length, key_heads, seed) for seed, length in enumerate((50, 23, 41, 9))]

    for counts in ((40, 1, 17, 5), (1, 20, 1, 1), (7, 1, 22, 1), (1, 1, 1, 1), (1, 0, 0, 1)):
        _sweep(sequences, counts, cache, slopes, FORMS[form])

    for sequence in sequences:
        assert sequence.done == len(sequence.results)
        expected = _dense(sequence, slopes, FORMS[form])
        torch.testing.assert_close(torch.stack(sequence.results), expected, rtol=0, atol=2e-6)


def _sequence(cache: KVCache, length: int, key_heads: int, seed: int) -> _Sequence:
    numbers = torch.Generator().manual_seed(seed)
    table = cache.open_table(length)
    assert table is not None
    heads = (6, key_heads, key_heads)
    return _Sequence(*(torch.randn(count, length, 8, generator=numbers) for count in heads), table)


def _sweep(
    sequences: list[_Sequence], counts: tuple[int, ...], cache: KVCache, slopes: torch.Tensor, form: dict[str, object]
) -> None:
    riding = [(sequence, count) for sequence, count in zip(sequences, counts, strict=True) if count]
    pack = PackedSweep([sequence.table.span((0,) * count, sequence.done) for sequence, count in riding], CPU)
    ordered = [riding[index] for index in pack.order]
    rows = [
        torch.cat([getattr(sequence, name)[:, sequence.done : sequence.done + count] for sequence, count in ordered], 1)
        for name in ("query", "key", "value")
    ]
    with torch.inference_mode(), sweep_attention(pack, cache, (None,), slopes):
        out, _ = packed_attention(_Layer(), *(row[None] for row in rows), None, **form)  # type: ignore[arg-type] # a table of keywords
    for (sequence, count), part in zip(ordered, torch.split(out[0], [count for _, count in ordered]), strict=True):
        sequence.results.extend(part)
        sequence.done += count


def _dense(sequence: _Sequence, slopes: torch.Tensor, form: dict[str, object]) -> torch.Tensor:
    """The same for a whole sequence at once, in float64: [tokens, heads, width]."""
    count = sequence.done
    query, key, value = (t[:, :count].double() for t in (sequence.query, sequence.key, sequence.value))
    key, value = (t.repeat_interleave(6 // t.shape[0], 0) for t in (key, value))
    scores = query @ key.transpose(1, 2) / math.sqrt(8)
    if isinstance(cap := form.get("softcap"), float):
        scores = cap * torch.tanh(scores / cap)
    distance = torch.arange(count)[:, None] - torch.arange(count)
    scores = scores - slopes.double()[:, None, None] * distance
    window = form.get("sliding_window")
    hidden = (distance < 0) | (distance >= (window if isinstance(window, int) else count))
    scores = scores.masked_fill(hidden, -math.inf)
    if isinstance(sinks := form.get("s_aux"), torch.Tensor):
        scores = torch.cat([scores, sinks.double()[:, None, None].expand(-1, count, 1)], -1)
    return (scores.softmax(-1)[..., :count] @ value).transpose(0, 1).float()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_tells_neighbours_far_into_a_text_apart(dtype: torch.dtype) -> None:
    """Slope times position is the same number for both in half precision; slope times distance is not."""
    length, cache = 3002, KVCache(4096, CPU)
    table = cache.open_table(length)
    assert table is not None
    key, value = torch.zeros(2, length, 1, 8, dtype=dtype)
    value[-1] = 1.0
    cache.store(0, table.slots[:length], key, value)
    pack = PackedSweep([table.span((0,), length - 1)], CPU)
    last = [t[-1:].transpose(0, 1)[None] for t in (key, key, value)]

    with torch.inference_mode(), sweep_attention(pack, cache, (None,), torch.tensor([0.5])):
        out, _ = packed_attention(_Layer(), *last, None)

    torch.testing.assert_close(out.float(), torch.full((1, 1, 1, 8), 1 - math.exp(-0.5)), rtol=0, atol=0.005)


def test_a_pack_of_fixed_shape_fills_its_offsets_in_place() -> None:
    pack = DecodePack(2, 64, CPU)
    offsets = pack.groups[0].offsets()

    pack.fill([Span((7,), 9, torch.arange(64)), Span((7,), 2, torch.arange(64))])

    assert offsets[:, 0, 0, 0].tolist() == [-9.0, -2.0]
    assert offsets[1, 0, 0, 2] == 0
    assert pack.groups[0].offsets().data_ptr() == offsets.data_ptr()


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> EngineOptions:
    root = tmp_path_factory.mktemp("alibi")
    source = PUBLISHED["Baichuan 13B"].save(root / "source", model_max_length=512)
    ShardStore(root / "store").ensure("tiny", source=source)
    return EngineOptions(
        store=root / "store", device="cpu", max_sequences=6, sweep_tokens=16, kv_tokens=4096, offline=True
    )


@pytest.fixture(scope="module")
def engine(options: EngineOptions) -> Iterator[Engine]:
    with Engine.open("tiny", options) as engine:
        yield engine


@pytest.fixture(scope="module")
def short(options: EngineOptions) -> Iterator[Engine]:
    """Keys and values of little more than one sequence."""
    with Engine.open("tiny", dataclasses.replace(options, kv_tokens=112)) as engine:
        yield engine


def test_sequences_that_made_room_for_others_give_the_published_tokens(short: Engine) -> None:
    expected = [PUBLISHED["Baichuan 13B"].greedy(prompt, 24)[0] for prompt in PROMPTS]
    before = short.counters().preemptions

    for name, prompt in enumerate(PROMPTS):
        submit_ids(short, str(name), prompt, GREEDY)
    outcomes = gather(short, {str(name) for name in range(len(PROMPTS))})

    assert short.counters().preemptions > before
    assert [outcomes[str(name)].token_ids for name in range(len(PROMPTS))] == expected


def test_samples_share_a_prompt_with_biases(engine: Engine) -> None:
    expected = run_apart(engine, PROMPTS[1], RANDOM, 3)

    outcomes = run_samples(engine, PROMPTS[1], RANDOM, 3)

    assert content(outcomes) == content(expected)


@pytest.fixture
def sharded(options: EngineOptions) -> ShardedModel:
    return ShardStore(options.store).ensure("tiny")


@pytest.mark.parametrize("tiers", ["v", "vrd"])
def test_recorded_layers_give_the_tokens_of_the_plain_path(sharded: ShardedModel, tiers: str) -> None:
    expected = plain(sharded)
    recorder = TapeRecorder()

    with open_recording(sharded, tiers, recorder) as engine:
        tokens = join_and_leave(engine)

    assert tokens == expected
    assert recorder.replays > 0


def test_far_positions_count_in_a_long_text(engine: Engine) -> None:
    prompt = [(7 * number) % 500 for number in range(300)]
    expected = PUBLISHED["Baichuan 13B"].greedy(prompt, 4)[0]

    assert generate(engine, prompt, dataclasses.replace(GREEDY, max_tokens=4)).token_ids == expected


def test_the_config_of_the_shards_holds_the_slopes(sharded: ShardedModel) -> None:
    config = json.loads((sharded.directory / "config.json").read_text())

    assert config[SLOPES] == published_slopes(6)
    assert slopes_of(architecture.load_config(sharded.directory)) == tuple(published_slopes(6))


@pytest.mark.parametrize("slopes", [[0.5], [0.5] * 3 + [math.nan], ["a"] * 4, 0.5, [True] * 4, [None] * 4, "abcd"])
def test_slopes_that_are_not_one_number_a_head_are_refused(slopes: object) -> None:
    config = _llama(**{IMPORTED_FROM: "Some family", SLOPES: slopes})

    with pytest.raises(CheckpointError, match=r"Some family.*4 numbers"):
        architecture.build(config, torch.float32)


def test_slopes_of_a_model_that_was_not_imported_mean_nothing() -> None:
    """Transformers would run it without."""
    assert slopes_of(_llama(**{SLOPES: [0.5] * 4})) is None


def test_a_class_that_keeps_its_attention_to_itself_cannot_have_biases_of_ours() -> None:
    config = BloomConfig(hidden_size=64, n_layer=2, n_head=4, vocab_size=64)
    setattr(config, IMPORTED_FROM, "Some family")
    setattr(config, SLOPES, [0.5] * 4)

    with pytest.raises(UnsupportedModel, match="linear position biases"):
        architecture.build(config, torch.float32)


def test_biases_have_room_in_the_plan(sharded: ShardedModel, options: EngineOptions) -> None:
    sizes = sizes_of_source(find_model("tiny", ShardStore(options.store)))
    without = dataclasses.replace(sizes, bias_heads=0)

    more = workspace_bytes(sizes, 64, 8, 1024) - workspace_bytes(without, 64, 8, 1024)

    assert sizes.bias_heads == 6
    assert sizes.attention_width == 6 * WIDTH
    assert more >= 2 * 4 * 6 * 1024, "float32 biases of all keys of a group, twice"


def test_inspection_tells_linear_biases_and_no_rotation(tmp_path: Path) -> None:
    source = PUBLISHED["Baichuan2 13B"].save(tmp_path / "source")

    facts = inspect(source, ShardStore(tmp_path / "store"))

    assert facts.has_linear_biases
    assert facts.rotary == ()
    assert facts.context_length == 96


def _llama(**more: object) -> PretrainedConfig:
    return LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=64, **more
    )
