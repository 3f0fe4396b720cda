"""Several models on one worker: each tells what it tells alone, none starves the other, and all outlive a crash."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lamella.client import Client
from lamella.embedded import EmbeddedServer
from lamella_engine import ShardStore
from tests import tiny_models
from tests.engine.engine_driver import full_load_tokens
from tests.waiting import wait_until
from tests.worker.changing_worker import ChangingWorker

A, B, C = "many-a", "many-b", "many-c"
SEEDS = {A: 1, B: 2, C: 3}
LONG = {"max_tokens": 150, "ignore_eos": True}
SHORTER = {"max_tokens": 120, "ignore_eos": True}
START_S = 90.0


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("many")
    return {name: tiny_models.save_tiny_llama(root / name, seed=seed) for name, seed in SEEDS.items()}


@pytest.fixture(scope="module")
def store(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("store")
    for name, source in checkpoints.items():
        ShardStore(root).ensure(name, source=source)
    return root


Starter = Callable[..., ChangingWorker]


@pytest.fixture(scope="module")
def start(session_server: EmbeddedServer, store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Starter]:
    root = tmp_path_factory.mktemp("workers")
    started: list[ChangingWorker] = []

    def run(name: str, *models: str, isolation: str = "child", prefix: str = "lamella:") -> ChangingWorker:
        config = root / f"{name}.toml"
        config.write_text(
            f'[redis]\nurl = "{session_server.url}"\nprefix = "{prefix}"\n'
            f'[worker]\nmodels = {json.dumps(models)}\nname = "{name}"\nlease_s = 2.0\ndrain_s = 10.0\n'
            f'isolation = "{isolation}"\nmax_restarts = 100\n'
            f'[engine]\nstore = "{store}"\nram = 0\nmax_sequences = 4\noffline = true\n'
            f'[security]\nallowed_models = ["many-*"]\n'
        )
        with (root / f"{name}.log").open("w") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.worker.changing_worker", str(config), "real"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
        worker = ChangingWorker(name, process, Client(session_server.url, prefix=prefix))
        started.append(worker)
        assert wait_until(lambda: process.poll() is not None or worker.info() is not None, START_S)
        assert process.poll() is None, (root / f"{name}.log").read_text()
        return worker

    yield run
    for worker in started:
        worker.process.terminate()
    for worker in started:
        worker.process.communicate(timeout=40)
        worker.client.close()
        assert worker.process.returncode == 0


@pytest.fixture(scope="module")
def pair(start: Starter) -> ChangingWorker:
    return start("many-pair", A, B)


def undisturbed(checkpoint: Path, prompt: str, count: int) -> list[int]:
    """What transformers' full load says."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    return full_load_tokens(model, AutoTokenizer.from_pretrained(checkpoint)(prompt)["input_ids"], count)


def test_each_model_tells_what_a_full_load_of_it_tells_while_both_are_served(
    pair: ChangingWorker, checkpoints: dict[str, Path]
) -> None:
    jobs = {
        (model, prompt): pair.client.submit(prompt, model=model, max_tokens=40, ignore_eos=True)
        for prompt in ("The river runs", "Two of them")
        for model in (A, B)
    }

    found = {key: list(job.result(timeout_s=60).token_ids) for key, job in jobs.items()}

    assert found == {(model, prompt): undisturbed(checkpoints[model], prompt, 40) for model, prompt in jobs}
    assert found[A, "Two of them"] != found[B, "Two of them"]


def test_both_models_are_told_with_their_own_slots(pair: ChangingWorker) -> None:
    info = pair.info()

    assert info is not None
    slots = {model.name: model.slots for model in info.served}
    assert list(slots) == [A, B]
    assert slots[A] == slots[B] in (4, 2)  # half of them for a while after the engines' process has been killed
    assert (info.model.name, info.slots) == (A, slots[A] + slots[B])
    listed = {model.name: model.slots for model in pair.client.models()}
    assert (listed[A], listed[B]) == (slots[A], slots[B])


def test_a_job_is_not_starved_by_fifty_of_the_other_model(pair: ChangingWorker) -> None:
    alone = pair.client.generate("Alone", model=B, timeout_s=60, **LONG)
    flood = [pair.client.submit(f"Flood {number}", model=A, **LONG) for number in range(50)]
    wait_until(lambda: sum(job.status().state.value == "running" for job in flood) >= 4)

    late = pair.client.submit("Alone", model=B, **LONG)
    found = late.result(timeout_s=60)
    waiting = sum(job.status().state.value == "queued" for job in flood)
    for job in flood:
        job.cancel()

    assert found.token_ids == alone.token_ids
    assert waiting >= 20, "it went by turns, not after the flood"


def test_jobs_of_both_models_outlive_the_engine_process(pair: ChangingWorker) -> None:
    prompts = [("The river", A), ("runs on", B), ("to the sea", B)]
    first = [pair.client.submit(prompt, model=model, **SHORTER) for prompt, model in prompts]
    calm = [job.result(timeout_s=60) for job in first]
    jobs = [pair.client.submit(prompt, model=model, **SHORTER) for prompt, model in prompts]
    wait_until(lambda: all(job.status().events > 2 for job in jobs))

    os.kill(pair.engines_pid(), signal.SIGKILL)

    found = [job.result(timeout_s=90) for job in jobs]
    assert [each.text for each in found] == [each.text for each in calm]
    assert [each.token_ids for each in found] == [each.token_ids for each in calm]
    assert {job.status().attempts for job in jobs} == {2}


def test_models_change_while_jobs_run_and_these_go_on_with_their_attempts_unchanged(
    start: Starter, checkpoints: dict[str, Path]
) -> None:
    worker = start("many-changing", A, prefix="changing:")
    calm = worker.client.generate("The river", model=A, timeout_s=60, **SHORTER)
    job = worker.client.submit("The river", model=A, **SHORTER)
    waiting = worker.client.submit("Two", model=C, max_tokens=20, ignore_eos=True, require_worker=False)
    wait_until(lambda: job.status().events > 5)

    answer = worker.change(A, C)

    assert answer == {"models": [A, C], "trouble": None}
    assert job.result(timeout_s=60).token_ids == calm.token_ids
    assert job.status().attempts == 1
    assert list(waiting.result(timeout_s=60).token_ids) == undisturbed(checkpoints[C], "Two", 20)
    wait_until(lambda: worker.models() == [A, C])


def test_both_models_are_served_without_a_process_of_their_own(start: Starter, checkpoints: dict[str, Path]) -> None:
    worker = start("many-local", A, B, isolation="none", prefix="local:")
    jobs = {model: worker.client.submit("The river", model=model, max_tokens=20, ignore_eos=True) for model in (A, B)}

    found = {model: list(job.result(timeout_s=60).token_ids) for model, job in jobs.items()}

    assert found == {model: undisturbed(checkpoints[model], "The river", 20) for model in (A, B)}
