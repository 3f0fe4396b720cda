"""Several models in one process: each computes what it computes alone, and none waits for longer than its share."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lamella_engine import EngineOptions, Sampling, ShardStore
from lamella_engine.engine_group import EngineGroup
from lamella_engine.errors import EngineClosed, EngineError, PlanError
from lamella_engine.shard import ShardedModel
from tests.engine.engine_driver import Outcome, full_load_tokens, gather, submit_ids
from tests.waiting import wait_until

CPU = torch.device("cpu")
FAMILIES = ("llama", "qwen2")
PROMPTS = [[5, 9, 13], list(range(40, 70)), [7]]
LONG = Sampling(max_tokens=4000, ignore_eos=True)


@pytest.fixture(scope="module")
def store(tiny_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("store")
    for family in FAMILIES:
        ShardStore(root).ensure(family, source=tiny_checkpoint(family))
    return root


@pytest.fixture(scope="module")
def options(store: Path) -> EngineOptions:
    return EngineOptions(store=store, device="cpu", max_sequences=6, sweep_tokens=32, ram=0, offline=True)


@pytest.fixture(scope="module")
def models(store: Path) -> dict[str, ShardedModel]:
    return {family: ShardStore(store).ensure(family, offline=True) for family in FAMILIES}


@pytest.fixture
def group(models: dict[str, ShardedModel], options: EngineOptions) -> Iterator[EngineGroup]:
    group = EngineGroup.open(models, CPU, options)
    yield group
    group.close()


def test_each_models_tokens_equal_a_full_load_while_both_sweep(
    group: EngineGroup, tiny_checkpoint: Callable[[str], Path]
) -> None:
    sampling = Sampling(max_tokens=24, ignore_eos=True)
    expected = {
        family: [
            full_load_tokens(AutoModelForCausalLM.from_pretrained(tiny_checkpoint(family)).eval(), prompt, 24)
            for prompt in PROMPTS
        ]
        for family in FAMILIES
    }

    for family, engine in group.engines.items():
        for index, prompt in enumerate(PROMPTS):
            submit_ids(engine, f"{family}-{index}", prompt, sampling)
    found = {family: gather(engine, {f"{family}-{n}" for n in range(3)}) for family, engine in group.engines.items()}

    assert {f: [found[f][f"{f}-{n}"].token_ids for n in range(3)] for f in FAMILIES} == expected


def test_a_flood_of_one_model_leaves_the_other_half_of_the_time(group: EngineGroup) -> None:
    llama, qwen = group.engines["llama"], group.engines["qwen2"]
    for number in range(50):
        submit_ids(llama, f"flood-{number}", [number + 1] * 20, LONG)
    taker = threading.Thread(target=lambda: _drop(llama.events(0.1)), daemon=True)
    taker.start()
    assert wait_until(lambda: llama.counters().sweeps > 20)
    before = llama.counters().sweep_s

    submit_ids(qwen, "one", [5, 9, 13], Sampling(max_tokens=200, ignore_eos=True))
    outcome = gather(qwen, {"one"})["one"]

    used = llama.counters().sweep_s - before
    assert len(outcome.token_ids) == 200
    assert qwen.counters().sweep_s > 0.3 * (used + qwen.counters().sweep_s), "it had no fair share"
    group.close()
    taker.join(timeout=40)
    assert not taker.is_alive()


def test_an_engine_whose_events_nobody_takes_does_not_hold_the_others_up(group: EngineGroup) -> None:
    llama, qwen = group.engines["llama"], group.engines["qwen2"]
    submit_ids(llama, "stalled", [5], LONG)
    assert wait_until(lambda: llama.counters().sweeps >= 2)

    submit_ids(qwen, "one", [5, 9, 13], Sampling(max_tokens=200, ignore_eos=True))

    assert len(gather(qwen, {"one"})["one"].token_ids) == 200
    assert llama.counters().sweeps <= 3


def test_a_failed_sweep_of_one_leaves_the_other_alone(group: EngineGroup) -> None:
    llama, qwen = group.engines["llama"], group.engines["qwen2"]

    def fail() -> None:
        raise RuntimeError("as told")

    llama.before_sweep = fail
    submit_ids(llama, "bad", [5], LONG)
    submit_ids(qwen, "good", [5], Sampling(max_tokens=20, ignore_eos=True))

    bad: Outcome = gather(llama, {"bad"})["bad"]
    assert bad.finished is not None
    assert "as told" in (bad.finished.error or "")
    assert len(gather(qwen, {"good"})["good"].token_ids) == 20


def test_an_engine_that_failed_for_good_tells_its_own_callers_only(group: EngineGroup) -> None:
    llama, qwen = group.engines["llama"], group.engines["qwen2"]
    submit_ids(llama, "bad", [5], LONG)

    llama.fail(ValueError("a broken invariant"))

    with pytest.raises(EngineError, match="a broken invariant"):
        gather(llama, {"bad"})
    submit_ids(qwen, "good", [5], Sampling(max_tokens=20, ignore_eos=True))
    assert len(gather(qwen, {"good"})["good"].token_ids) == 20


def test_a_closed_group_has_no_thread_left_and_takes_nothing(
    models: dict[str, ShardedModel], options: EngineOptions
) -> None:
    before = set(threading.enumerate())
    group = EngineGroup.open(models, CPU, options)
    started = set(threading.enumerate()) - before
    submit_ids(group.engines["llama"], "live", [5], LONG)

    group.close()
    group.close()

    with pytest.raises(EngineClosed):
        submit_ids(group.engines["llama"], "late", [5], LONG)
    assert group.engines["llama"].counters().sweeps >= 0, "its totals can still be asked for"
    assert not any(thread.name == "lamella-sweep" and thread in started for thread in threading.enumerate())


def test_models_that_do_not_fit_together_are_refused_and_nothing_stays_open(
    models: dict[str, ShardedModel], options: EngineOptions
) -> None:
    with pytest.raises(PlanError, match="2 models do not fit a ram budget"):
        EngineGroup.open(models, CPU, replace(options, ram="60MiB"))

    with closing(EngineGroup.open({"llama": models["llama"]}, CPU, options)) as alone:
        assert alone.engines["llama"].facts.model == "llama"


def _drop(batches: Iterator[object]) -> None:
    for _ in batches:
        pass
