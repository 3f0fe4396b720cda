"""The thread that opens and sweeps: one thread for both, errors and interrupted callers included."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from lamella_engine import Engine, EngineOptions, Sampling, ShardStore
from lamella_engine import engine as engine_module
from lamella_engine.open_model import open_sweep_model
from lamella_engine.sweep_thread import SweepThread
from tests.engine.engine_driver import generate


def test_what_is_called_runs_in_one_thread_and_its_result_comes_back() -> None:
    thread = SweepThread()

    names = {thread.call(lambda: threading.current_thread().name, print) for _ in range(3)}
    thread.end()

    assert names == {"lamella-sweep"}
    assert thread.join(timeout=40)


def test_an_error_is_raised_where_it_was_called_from_and_ends_nothing() -> None:
    thread = SweepThread()

    def fail() -> int:
        raise ValueError("no such model")

    with pytest.raises(ValueError, match="no such model"):
        thread.call(fail, print)
    assert thread.call(lambda: 7, print) == 7
    thread.end()


def test_an_interrupted_caller_leaves_its_result_to_be_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    thread = SweepThread()
    may_end, undone = threading.Event(), threading.Event()

    def interrupted(self: threading.Event, timeout: float | None = None) -> bool:
        raise KeyboardInterrupt

    def work() -> str:
        assert wait(may_end, 40.0)
        return "a model"

    wait = threading.Event.wait
    with monkeypatch.context() as patch:
        patch.setattr(threading.Event, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            thread.call(work, lambda result: undone.set() if result == "a model" else None)
    may_end.set()

    assert undone.wait(40.0)
    thread.end()


def test_a_model_is_opened_in_the_thread_that_sweeps_it(
    tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened_in: list[int] = []

    def spy(*args: object) -> object:
        opened_in.append(threading.get_ident())
        return open_sweep_model(*args)  # type: ignore[arg-type] # passed on as they came

    monkeypatch.setattr(engine_module, "open_sweep_model", spy)
    sharded = ShardStore(tmp_path).ensure("tiny", source=tiny_llama_dir)
    with Engine.open_sharded(sharded, torch.device("cpu"), EngineOptions(store=tmp_path)) as engine:
        generate(engine, [5, 9, 13], Sampling(max_tokens=2, ignore_eos=True))
        sweeping = [thread.ident for thread in threading.enumerate() if thread.name == "lamella-sweep"]

    assert opened_in[0] in sweeping
    assert opened_in[0] != threading.get_ident()
