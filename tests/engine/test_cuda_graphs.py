"""On a GPU: recording leaves everything usable whether it succeeds or fails, and an engine leaves no memory behind."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lamella_engine import Engine, EngineOptions, Sampling
from lamella_engine.graph_recorder import CudaRecorder
from tests.engine.engine_driver import gather, generate, submit_ids

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(300),
]

LONG = Sampling(max_tokens=40, ignore_eos=True)


def test_what_was_recorded_runs_again_on_what_its_inputs_hold() -> None:
    recorder = CudaRecorder(torch.device("cuda", 0))
    source, target = torch.ones(4, device="cuda"), torch.zeros(4, device="cuda")

    def launch() -> None:
        target.copy_(source * 2)

    replay = recorder.record(launch)
    before = target.sum().item()
    source.fill_(5)
    replay()

    assert before == 0
    assert target.sum().item() == 40
    recorder.close()


@pytest.mark.parametrize("fails", ["waits", "raises"])
def test_a_failed_recording_leaves_stream_and_allocator_usable(fails: str) -> None:
    recorder = CudaRecorder(torch.device("cuda", 0))
    tensor = torch.ones(4, device="cuda")

    def launch() -> None:
        total = (tensor * 2).sum()
        if fails == "waits":
            total.item()
        raise RuntimeError("this layer cannot be recorded")

    with pytest.raises(RuntimeError):
        recorder.record(launch)

    torch.cuda.empty_cache()
    torch.cuda.synchronize()
    assert (tensor + 1).sum().item() == 8

    def add() -> None:
        tensor.add_(1)

    recorder.record(add)()
    assert tensor.sum().item() == 8
    recorder.close()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_windows_are_right_in_recorded_layers(
    family: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    prompts = [[5, 9, 13], list(range(40, 90))]
    with Engine.open(tiny_checkpoint(family), EngineOptions(store=tmp_path, device="cpu")) as engine:
        expected = [generate(engine, prompt, LONG).token_ids for prompt in prompts]

    with Engine.open(tiny_checkpoint(family), EngineOptions(store=tmp_path, device="cuda")) as engine:
        for name, prompt in enumerate(prompts):
            submit_ids(engine, str(name), prompt, LONG)
        outcomes = gather(engine, {"0", "1"})
        num_graphs = engine.model._graphs.num_graphs

    assert [outcomes[name].token_ids for name in ("0", "1")] == expected
    assert num_graphs > 0


def test_engines_one_after_the_other_leave_no_memory_behind(tiny_llama_dir: Path, tmp_path: Path) -> None:
    allocated = []

    for _ in range(4):
        with Engine.open(tiny_llama_dir, EngineOptions(store=tmp_path, device="cuda")) as engine:
            generate(engine, [5, 9, 13], LONG)
            assert engine.model._graphs.num_graphs > 0
        del engine
        gc.collect()
        allocated.append(torch.cuda.memory_allocated())

    assert allocated[-1] <= allocated[0]
    assert torch.cuda.memory.get_per_process_memory_fraction() == 1.0
