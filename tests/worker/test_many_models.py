"""A worker of several models, with scripted engines: fair places, models that come and go, totals that never fall."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from lamella.client import Client
from lamella.embedded import EmbeddedServer
from lamella_worker.engine_port import EngineHost, ServedModel
from lamella_worker.local_host import LocalHost
from lamella_worker.serving import Serving
from lamella_worker.worker_error import WorkerError
from tests.waiting import wait_until
from tests.worker.changing_worker import ChangingWorker
from tests.worker.scripted_engine import ScriptedEngine, ScriptedSet, scripted_text

LONG = {"max_tokens": 300, "ignore_eos": True}
MODELS = tuple(ServedModel(name, name) for name in ("a", "b"))


@pytest.fixture(scope="module")
def worker(session_server: EmbeddedServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ChangingWorker]:
    root = tmp_path_factory.mktemp("worker")
    config = root / "worker.toml"
    config.write_text(
        f'[redis]\nurl = "{session_server.url}"\nprefix = "many:"\n'
        '[worker]\nmodels = ["a", "b"]\nname = "w"\nlease_s = 2.0\ndrain_s = 10.0\nmax_restarts = 100\n'
        '[engine]\nmax_sequences = 2\n[security]\nallowed_models = ["a", "b", "c", "*unknown*"]\n'
    )
    command = [sys.executable, "-m", "tests.worker.changing_worker", str(config), "scripted"]
    with (root / "log").open("w") as log:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)
    with Client(session_server.url, prefix="many:") as client:
        worker = ChangingWorker("w", process, client)
        try:
            assert wait_until(lambda: process.poll() is not None or worker.info() is not None, 60)
            assert process.poll() is None, (root / "log").read_text()
            yield worker
        finally:
            process.terminate()
            process.communicate(timeout=40)
    assert process.returncode == 0


def test_models_come_and_go_while_jobs_run(worker: ChangingWorker) -> None:
    job = worker.client.submit("hello", model="a", **LONG)
    later = worker.client.submit("new", model="c", max_tokens=5, require_worker=False)
    wait_until(lambda: job.status().events > 5)

    answer = worker.change("a", "c")

    assert answer == {"models": ["a", "c"], "trouble": None}
    assert job.result(timeout_s=40).text == scripted_text("hello", 300)
    assert job.status().attempts == 1
    assert later.result(timeout_s=40).text == scripted_text("new", 5)
    wait_until(lambda: worker.models() == ["a", "c"])
    left = worker.client.submit("hello", model="b", max_tokens=5, require_worker=False)
    assert worker.change("a", "b") == {"models": ["a", "b"], "trouble": None}
    assert left.result(timeout_s=40).text == scripted_text("hello", 5)


@pytest.mark.parametrize(
    ("models", "why"),
    [
        (("a", "unknown"), "not in the store"),
        (("a", "forbidden"), "security.allowed_models"),
        (("a", "a"), "more than once"),
        (("../a",), "not a model name"),
        ((), "no model is named"),
    ],
)
def test_a_change_that_cannot_be_made_leaves_the_old_models_served(
    worker: ChangingWorker, models: tuple[str, ...], why: str
) -> None:
    worker.change("a", "b")
    job = worker.client.submit("hello", model="a", **LONG)
    wait_until(lambda: job.status().events > 5)

    answer = worker.change(*models)

    assert answer["models"] == ["a", "b"]
    assert why in str(answer["trouble"])
    assert job.result(timeout_s=40).text == scripted_text("hello", 300)
    assert job.status().attempts == 1


def test_a_model_with_more_jobs_than_slots_leaves_the_others_places_free(worker: ChangingWorker) -> None:
    worker.change("a", "b")
    slow = [worker.client.submit("slow one", model="a", max_tokens=5) for _ in range(12)]
    wait_until(lambda: sum(job.status().state.value == "running" for job in slow) == 2)

    found = [worker.client.submit("hello", model="b", max_tokens=20) for _ in range(6)]

    assert [job.result(timeout_s=40).text for job in found] == [scripted_text("hello", 20)] * 6
    assert sum(job.status().state.value == "running" for job in slow) == 2
    for job in slow:
        job.cancel()
    wait_until(lambda: all(job.status().state.value == "cancelled" for job in slow))


def test_jobs_of_all_models_go_on_when_their_common_process_is_killed(worker: ChangingWorker) -> None:
    worker.change("a", "b")
    jobs = [worker.client.submit("hello", model=model, **LONG) for model in ("a", "b")]
    wait_until(lambda: all(job.status().events > 5 for job in jobs))

    os.kill(worker.engines_pid(), signal.SIGKILL)

    assert [job.result(timeout_s=60).text for job in jobs] == [scripted_text("hello", 300)] * 2


def opener(sets: list[ScriptedSet], fails: Callable[[tuple[str, ...]], bool]) -> Callable[..., EngineHost]:
    def open_host(models: tuple[ServedModel, ...], is_called_off: Callable[[], bool]) -> EngineHost:
        names = tuple(model.name for model in models)
        if fails(names):
            raise WorkerError(f"cannot serve {names}")
        sets.append(ScriptedSet({name: ScriptedEngine() for name in names}))
        return LocalHost(sets[-1])

    return open_host


def test_totals_of_models_do_not_fall_when_their_engines_are_opened_anew() -> None:
    sets: list[ScriptedSet] = []
    serving = Serving(MODELS, opener(sets, lambda names: False))
    engine = serving.find("a")
    assert isinstance(engine, ScriptedEngine)
    engine._tokens = engine._sweeps = 7

    trouble = serving.change(MODELS[:1])

    assert trouble is None
    assert (serving.names, serving.find("b")) == (("a",), None)
    assert (serving.counters("a").tokens, serving.all_counters().sweeps) == (7, 7)
    serving.close()
    assert serving.find("a") is None
    assert serving.facts("b").num_layers == 4, "what was told last is still known"


def test_where_neither_new_nor_old_engines_open_nothing_is_served() -> None:
    sets: list[ScriptedSet] = []
    serving = Serving(MODELS, opener(sets, lambda names: bool(sets)))

    with pytest.raises(WorkerError, match="cannot serve"):
        serving.change(MODELS[:1])

    assert serving.find("a") is None
    assert not serving.wait_ready(0.1)
    serving.close()
