"""A sweep for which memory is short: the youngest waits, the others go on, and every text stays what it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lamella_engine import Engine, EngineOptions, Sampling, ShardStore
from lamella_engine import engine as engine_module
from lamella_engine.batch_limit import GOOD_SWEEPS, BatchLimit
from lamella_engine.device import resolve_device
from lamella_engine.out_of_memory import is_out_of_memory
from tests.engine.engine_driver import Outcome, gather, generate, submit_ids

PROMPTS = [[5, 9, 13], list(range(40, 70)), [7, 8], list(range(100, 109))]
SAMPLING = Sampling(max_tokens=24, ignore_eos=True, temperature=0.9, seed=3)


class ShortMemory:
    """Stands before, behind or in place of a step of the sweep, and lets it fail in the sweeps that it is told."""

    def __init__(self, step: Callable[..., Any], sweeps: set[int], error: Exception, *, is_late: bool = False) -> None:
        self.calls = 0
        self._step, self._sweeps, self._error, self._is_late = step, sweeps, error, is_late

    def __call__(self, *args: Any) -> Any:
        self.calls += 1
        if self.calls in self._sweeps and not self._is_late:
            raise self._error
        result = self._step(*args)
        if self.calls in self._sweeps:
            raise self._error
        return result


@pytest.fixture(scope="module", params=["llama", "mamba"])
def options(
    request: pytest.FixtureRequest,
    tiny_checkpoint: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[str, EngineOptions]:
    """A family with a key-value cache, and one whose sequences keep a state that a failed sweep leaves half-way."""
    root = tmp_path_factory.mktemp("store")
    ShardStore(root).ensure(request.param, source=tiny_checkpoint(request.param))
    return request.param, EngineOptions(
        store=root, device="cpu", max_sequences=4, sweep_tokens=64, kv_tokens=1024, offline=True
    )


@pytest.fixture
def engine(options: tuple[str, EngineOptions]) -> Iterator[Engine]:
    with Engine.open_sharded(
        ShardStore(options[1].store).ensure(options[0], offline=True), resolve_device("cpu"), options[1]
    ) as engine:
        yield engine


def run_together(engine: Engine) -> list[Outcome]:
    for index, prompt in enumerate(PROMPTS):
        submit_ids(engine, str(index), prompt, SAMPLING)
    outcomes = gather(engine, {str(index) for index in range(len(PROMPTS))})
    return [outcomes[str(index)] for index in range(len(PROMPTS))]


@pytest.mark.parametrize("error", [MemoryError("short"), torch.OutOfMemoryError("CUDA out of memory.")], ids=type)
@pytest.mark.parametrize("where", ["before the layers", "behind the layers", "in the sampler"])
def test_a_sweep_that_runs_out_of_memory_costs_no_sequence_its_text(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, where: str, error: Exception
) -> None:
    alone = [generate(engine, prompt, SAMPLING) for prompt in PROMPTS]
    sweeps = {3, 4, 9}
    if where == "in the sampler":
        monkeypatch.setattr(engine_module, "sample", ShortMemory(engine_module.sample, sweeps, error))
    else:
        engine.model.run = ShortMemory(  # type: ignore[method-assign]  # a fault is put where a sweep has it
            engine.model.run, sweeps, error, is_late=where == "behind the layers"
        )

    together = run_together(engine)

    assert [outcome.token_ids for outcome in together] == [outcome.token_ids for outcome in alone]
    assert [outcome.finished and outcome.finished.error for outcome in together] == [None] * 4
    counters = engine.counters()
    assert counters.out_of_memory == 3
    assert counters.preemptions >= 1
    assert counters.batch_limit < 4
    assert counters.running == counters.waiting == 0


def test_one_alone_that_does_not_fit_fails_and_the_next_one_runs(engine: Engine) -> None:
    expected = generate(engine, PROMPTS[0], SAMPLING)
    short = ShortMemory(lambda: None, {1, 2}, MemoryError("short"))
    engine.before_sweep = short

    failed = generate(engine, PROMPTS[0], SAMPLING)
    after = generate(engine, PROMPTS[0], SAMPLING)

    assert failed.finished is not None
    assert failed.finished.error_code == "engine"
    assert "MemoryError" in (failed.finished.error or "")
    assert after.token_ids == expected.token_ids


def test_another_error_still_ends_all_that_ride(engine: Engine) -> None:
    engine.before_sweep = ShortMemory(lambda: None, {4}, ValueError("no shard"))

    outcomes = run_together(engine)

    codes = [outcome.finished.error_code for outcome in outcomes if outcome.finished]
    assert codes.count("engine") >= 1
    assert engine.counters().out_of_memory == 0


def test_the_limit_halves_down_to_one_and_comes_back_after_good_sweeps() -> None:
    limit = BatchLimit(8)

    assert [limit.shrink(num_running) for num_running in (8, 7, 6, 2)] == [True] * 4
    shrunk = limit.limit
    rises = [limit.good_sweep() for _ in range(3 * GOOD_SWEEPS)]

    assert shrunk == 1
    assert sum(rises) == 3
    assert limit.limit == 8
    assert limit.failures == 4


@pytest.mark.parametrize(
    ("error", "is_short"),
    [
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 8 bytes."),
            True,
        ),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_errors_that_say_that_memory_was_short_are_known(error: Exception, is_short: bool) -> None:
    assert is_out_of_memory(error) is is_short
