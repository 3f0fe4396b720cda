"""Decoding through recorded layers changes no token, whatever joins, leaves, grows or lies elsewhere; on the CPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.slow_machine import MACHINES, slow_machine
from lamella_engine import Engine, EngineOptions, Sampling, ShardStore, architecture
from lamella_engine.layer_graphs import WARM_SWEEPS, DecodeBucket, DecodePack, LayerGraphs, RecordError, bucket_of
from lamella_engine.model_sizes import sizes_of_sharded
from lamella_engine.open_model import open_sweep_model
from lamella_engine.packing import Span
from lamella_engine.placement import Tier
from lamella_engine.planner import make_plan
from lamella_engine.shard import ShardedModel
from lamella_engine.workspace import MAX_BUCKETS
from tests.engine.engine_driver import gather, generate, submit_ids
from tests.engine.tape_recorder import TapeRecorder

CPU = torch.device("cpu")
FAST = 0.001  # of a machine's slowness: what is metered shall not limit
PROMPTS = [[5, 9, 13], list(range(40, 90)), [7], list(range(100, 117)), [3] * 60]
LENGTHS = [30, 12, 40, 7, 20]
MANY = 1 << 20


def options(store: Path) -> EngineOptions:
    return EngineOptions(store=store, device="cpu", max_sequences=8, sweep_tokens=64, kv_tokens=1024)


@contextmanager
def open_recording(sharded: ShardedModel, tiers: str, recorder: TapeRecorder) -> Iterator[Engine]:
    """An engine on a metered machine that records, its layers in the tiers that `tiers` names, round and round."""
    letters = {"v": Tier.VRAM, "r": Tier.RAM, "d": Tier.DISK}
    chosen = options(sharded.directory)
    built = architecture.build(architecture.load_config(sharded.directory), torch.float32)
    machine = dataclasses.replace(slow_machine(MACHINES[0], FAST, vram=2**30, ram=2**30), recorder=recorder)
    plan = make_plan(sizes_of_sharded(sharded, built), machine.request(chosen))
    layers = tuple(dataclasses.replace(place, tier=letters[tiers[place.layer % len(tiers)]]) for place in plan.layers)
    plan = dataclasses.replace(
        plan,
        layers=layers,
        device_slots=2,
        slot_bytes=max(shard.nbytes for shard in sharded.layers),
        ring_bytes=8 * 2**20 if "d" in tiers else 0,
    )
    with Engine(open_sweep_model(sharded, chosen, CPU, machine, plan), None, chosen) as engine:
        yield engine


def join_and_leave(engine: Engine) -> list[list[int]]:
    """Sequences of different lengths, some of which come while others decode."""
    for number in (0, 1):
        submit_ids(engine, str(number), PROMPTS[number], Sampling(max_tokens=LENGTHS[number], ignore_eos=True))
    early = gather(engine, {"1"})
    for number in (2, 3, 4):
        submit_ids(engine, str(number), PROMPTS[number], Sampling(max_tokens=LENGTHS[number], ignore_eos=True))
    late = gather(engine, {"0", "2", "3", "4"})
    return [
        [token for part in (early, late) if str(number) in part for token in part[str(number)].token_ids]
        for number in range(5)
    ]


def plain(sharded: ShardedModel) -> list[list[int]]:
    with Engine.open_sharded(sharded, CPU, options(sharded.directory)) as engine:
        return [
            generate(engine, prompt, Sampling(max_tokens=length, ignore_eos=True)).token_ids
            for prompt, length in zip(PROMPTS, LENGTHS, strict=True)
        ]


def graphs_of(engine: Engine) -> LayerGraphs:
    return engine.model._graphs


# One rotary set, windows and two rotary sets, learned positions, a window that only the layers know of, latent keys.
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text", "gpt2", "mistral", "deepseek_v3", "phi"])
def test_recorded_layers_give_the_tokens_of_the_plain_path(
    family: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    sharded = ShardStore(tmp_path).ensure("tiny", source=tiny_checkpoint(family))
    expected = plain(sharded)
    recorder = TapeRecorder()

    with open_recording(sharded, "v", recorder) as engine:
        tokens = join_and_leave(engine)
        is_enabled = graphs_of(engine).is_enabled

    assert tokens == expected
    assert is_enabled == (recorder.replays > 0)
    assert is_enabled or family == "deepseek_v3"  # whose experts ask the device who is routed where
    assert recorder.is_closed


@pytest.mark.parametrize("tiers", ["r", "vrr", "vd", "rdr"])
def test_recorded_layers_may_pass_through_any_buffer(tiers: str, tiny_llama_dir: Path, tmp_path: Path) -> None:
    sharded = ShardStore(tmp_path).ensure("tiny", source=tiny_llama_dir)
    expected = plain(sharded)
    recorder = TapeRecorder()

    with open_recording(sharded, tiers, recorder) as engine:
        tokens = join_and_leave(engine)

    assert tokens == expected
    assert recorder.replays > 0


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_experts_that_wait_for_the_device_run_unrecorded(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sharded = ShardStore(tmp_path).ensure("tiny", source=tiny_checkpoint("qwen3_moe"))
    expected = plain(sharded)

    with open_recording(sharded, "vr", TapeRecorder()) as engine:
        tokens = join_and_leave(engine)
        is_enabled = graphs_of(engine).is_enabled

    assert tokens == expected
    assert is_enabled or "cannot be recorded" in caplog.text


class Refusing(TapeRecorder):
    """Records some layers, then no more."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self._left = count

    def record(self, launch: Callable[[], None]) -> Callable[[], None]:
        self._left -= 1
        replay = super().record(launch)
        if self._left < 0:
            raise RuntimeError("no room for another graph")
        return replay


@pytest.mark.parametrize("count", [0, 1, 6])
def test_a_layer_that_cannot_be_recorded_ends_recording_in_the_middle_of_a_sweep(
    count: int, tiny_llama_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sharded = ShardStore(tmp_path).ensure("tiny", source=tiny_llama_dir)
    expected = plain(sharded)

    with open_recording(sharded, "vrr", Refusing(count)) as engine:
        tokens = join_and_leave(engine)
        graphs = graphs_of(engine)

        assert tokens == expected
        assert not graphs.is_enabled
        assert graphs.num_buckets == 0
    assert caplog.text.count("cannot be recorded") == 1


def span(start: int, first_slot: int = 0) -> Span:
    return Span((7,), start, torch.arange(first_slot, first_slot + start + 1))


def test_only_decoding_in_one_batch_has_a_bucket() -> None:
    assert bucket_of([span(9)], MANY) == (1, 64)
    assert bucket_of([span(9)] * 5, MANY) == (8, 64)
    assert bucket_of([span(9)] * 9, MANY) == (10, 64)
    assert bucket_of([span(64)], MANY) == (1, 128)
    assert bucket_of([], MANY) is None
    assert bucket_of([span(9), Span((7, 8), 3, torch.arange(5))], MANY) is None
    assert bucket_of([span(9), span(700)], MANY) is None
    assert bucket_of([span(9)] * 8, 8 * 64 - 1) is None


def test_every_bucket_holds_its_spans_and_is_little_larger() -> None:
    for count in (1, 3, 8, 9, 33, 64, 100):
        for start in (0, 63, 64, 300, 1000, 5000):
            bucket = bucket_of([span(start)] * count, MANY)

            assert bucket is not None
            assert count <= bucket[0] <= max(2 * count - 1, 1)
            assert start + 1 <= bucket[1] <= max(64, 2 * (start + 64))


def test_a_bucket_is_made_for_shapes_that_repeat() -> None:
    graphs = LayerGraphs(CPU, TapeRecorder(), MANY)

    with torch.inference_mode():
        alternating = [graphs.bucket([span(9)] * count) for count in (1, 2, 1, 2, 1)]
        repeated = [graphs.bucket([span(9)] * 4) for _ in range(WARM_SWEEPS)]

    assert alternating == [None] * 5
    assert [bucket is not None for bucket in repeated] == [False, True, True]
    assert graphs.num_buckets == 1


def test_buckets_are_bounded_and_the_one_used_last_stays() -> None:
    recorder = TapeRecorder()
    graphs = LayerGraphs(CPU, recorder, MANY)
    hidden = torch.ones(1, 1, 2)

    with torch.inference_mode():
        for longest in range(2 * MAX_BUCKETS):
            for _ in range(WARM_SWEEPS):
                bucket = graphs.bucket([span(80 * longest + 300)])
                if bucket is not None:
                    bucket.run((0, ("slot", 0)), lambda x: x * 2, (hidden,), {})
        again = graphs.bucket([span(80 * (2 * MAX_BUCKETS - 1) + 300)])

    assert again is not None
    assert graphs.num_buckets <= MAX_BUCKETS
    assert 0 < graphs.num_graphs <= MAX_BUCKETS


def warm_bucket(recorder: TapeRecorder) -> DecodeBucket:
    bucket = DecodeBucket(DecodePack(2, 64, CPU), CPU, recorder)
    bucket.begin_sweep([span(9)])
    bucket.begin_sweep([span(9)])
    return bucket


KEY = (0, ("slot", 0))


def test_arguments_are_taken_from_each_call_and_not_from_the_recorded_one() -> None:
    recorder = TapeRecorder()
    seen = []

    def body(hidden: torch.Tensor, scale: torch.Tensor, *, rotary: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return hidden * scale + rotary[0] - rotary[1]

    with torch.inference_mode():
        bucket = warm_bucket(recorder)
        for value in (1.0, 2.0, 3.0):
            shared = torch.full((1, 2, 4), value)
            hidden = torch.full((1, 2, 4), 10.0)
            # First one object twice, later two: each place keeps its own.
            rotary = (shared, shared if value == 1.0 else torch.zeros(1, 2, 4))
            for layer in range(3):
                hidden = bucket.run((layer, ("slot", 0)), body, (hidden, shared), {"rotary": rotary})
            seen.append(float(hidden[0, 0, 0]))
            bucket.begin_sweep([span(9)])

    assert seen == [10.0, ((20.0 + 2) * 2 + 2) * 2 + 2, ((30.0 + 3) * 3 + 3) * 3 + 3]
    assert recorder.replays == 9


def test_a_tensor_that_takes_the_place_of_one_gone_is_not_taken_for_it() -> None:
    def body(hidden: torch.Tensor, extra: torch.Tensor) -> torch.Tensor:
        return hidden + extra

    with torch.inference_mode():
        bucket = warm_bucket(TapeRecorder())
        totals = []
        for _ in range(3):
            hidden = torch.zeros(1, 2, 4)
            for layer in range(4):
                # Made for this call alone: the next one may well get its address and its id, in another shape.
                extra = torch.full((1, 2, 4) if layer % 2 else (1, 2, 1), float(layer + 1))
                hidden = bucket.run((layer, ("slot", 0)), body, (hidden, extra), {})
                del extra
            totals.append(hidden.flatten().tolist())
            bucket.begin_sweep([span(9)])

    assert totals == [[10.0] * 8] * 3


@pytest.mark.parametrize("changed", ["constant", "shape", "form"])
def test_a_call_unlike_the_recorded_one_runs_as_it_is(changed: str) -> None:
    def body(hidden: torch.Tensor, *others: Any, factor: float = 2.0) -> torch.Tensor:
        return hidden * factor + sum(others)

    one, ones = torch.ones(1), torch.ones(4)
    calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
        "constant": ((one,), {"factor": 3.0}),
        "shape": ((ones,), {"factor": 2.0}),
        "form": ((one, one), {"factor": 2.0}),
    }
    args, kwargs = calls[changed]

    with torch.inference_mode():
        bucket = warm_bucket(TapeRecorder())
        hidden = torch.ones(1, 2, 4)
        bucket.run(KEY, body, (hidden, one), {"factor": 2.0})
        bucket.begin_sweep([span(9)])
        result = bucket.run(KEY, body, (hidden, *args), kwargs).clone()

    assert torch.equal(result, body(hidden, *args, **kwargs))


@pytest.mark.parametrize(
    "body",
    [
        lambda hidden: hidden * hidden.sum().item(),
        lambda hidden: hidden[hidden > 0],
        lambda hidden: hidden[..., :1],
        lambda hidden: (hidden, hidden),
        lambda hidden: {"hidden": hidden},
    ],
)
def test_what_cannot_be_recorded_is_said_and_has_not_run(body: Callable[[torch.Tensor], Any]) -> None:
    with torch.inference_mode():
        bucket = warm_bucket(TapeRecorder())
        hidden = torch.ones(1, 2, 4)

        with pytest.raises(RecordError):
            bucket.run(KEY, body, (hidden,), {})

    assert bucket.num_graphs == 0
    assert torch.equal(hidden, torch.ones(1, 2, 4))


def test_the_first_sweep_of_a_bucket_sets_up_what_must_not_be_recorded() -> None:
    recorder = TapeRecorder()
    calls = []

    def body(hidden: torch.Tensor) -> torch.Tensor:
        calls.append(len(calls))
        return hidden + 1

    with torch.inference_mode():
        bucket = DecodeBucket(DecodePack(2, 64, CPU), CPU, recorder)
        results = []
        for _ in range(4):
            bucket.begin_sweep([span(9)])
            results.append(bucket.run(KEY, body, (torch.zeros(1, 2, 4),), {}).clone())

    assert len(calls) == 2  # as it is, and recorded
    assert recorder.prepared == 1
    assert recorder.replays == 3
    assert all(torch.equal(result, torch.ones(1, 2, 4)) for result in results)


def test_a_pack_is_filled_within_the_tensors_it_has() -> None:
    pack = DecodePack(4, 64, CPU)
    mask = pack.groups[0].mask(4)
    addresses = [tensor.data_ptr() for tensor in (pack.input_ids, pack.write_slots, pack.groups[0].slots, mask)]

    pack.fill([span(9, 100), span(2, 300)])

    assert pack.input_ids.tolist() == [[7] * 4]
    assert pack.position_ids.tolist() == [[9, 2, 9, 9]]
    assert pack.write_slots.tolist() == [109, 302, 109, 109]
    assert pack.last_rows.tolist() == [0, 1]
    assert pack.groups[0].slots[1].tolist() == [300, 301, 302, *[300] * 61]
    assert mask[1, 0, 0].nonzero().flatten().tolist() == [0, 1, 2]
    assert mask[0, 0, 0].nonzero().flatten().tolist() == [6, 7, 8, 9]
    assert addresses == [
        tensor.data_ptr() for tensor in (pack.input_ids, pack.write_slots, pack.groups[0].slots, pack.groups[0].mask(4))
    ]
