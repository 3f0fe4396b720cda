"""Quality on a GPU: the figures of the CPU, whatever the budget leaves on the card, and no more memory than that."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lamella_engine import EngineOptions, ShardStore
from lamella_engine.placement import Tier
from lamella_engine.quality import QualityRequest, run_quality
from lamella_engine.quality_pair import open_pair
from lamella_engine.quality_text import read_text
from lamella_engine.stored_form import StoredForm
from tests.engine.test_quality import measured, request_for, twice, windows_of_ids

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("quant", ["int8", "nf4"])
def test_a_gpu_measures_what_a_cpu_does(quant: str, tiny_llama_dir: Path, tmp_path: Path) -> None:
    store = ShardStore(tmp_path)
    full = store.ensure("tiny/full", source=tiny_llama_dir)
    packed = store.ensure("tiny/full", form=StoredForm(quant=quant, quant_device="cpu"))
    reports = []

    for device in ("cpu", "cuda:0"):
        options = EngineOptions(store=tmp_path, device=device, dtype="float32")
        reports.append(run_quality(full, packed, QualityRequest(read_text(None), options, tokens=600, window=64)))

    cpu, card = (report.figures for report in reports)
    assert card.perplexity_ratio.value == pytest.approx(cpu.perplexity_ratio.value, rel=5e-3)
    assert card.divergence.value == pytest.approx(cpu.divergence.value, rel=0.02)
    assert card.agreement.value == pytest.approx(cpu.agreement.value, abs=0.01)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_both_models_keep_within_one_device_budget(tiny_llama_dir: Path, tmp_path: Path) -> None:
    device = torch.device("cuda", 0)
    checkpoints = twice(tiny_llama_dir, tmp_path)
    windows = windows_of_ids(4, 24, 12)
    wide = request_for(checkpoints, windows)
    share = torch.cuda.memory.get_per_process_memory_fraction(device)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved(device)
    figures = []

    for vram in (1024**3, 512 * 1024**2):
        request = replace(wide, options=replace(wide.options, device="cuda:0", vram=vram))
        torch.cuda.reset_peak_memory_stats(device)
        with open_pair(request, device) as pair:
            figures.append(measured(pair, windows))
            assert pair.reference.model.plan.vram is not None
            assert {place.tier for place in pair.reference.model.plan.layers} <= set(Tier)
        assert torch.cuda.max_memory_reserved(device) - before <= vram
        assert torch.cuda.memory.get_per_process_memory_fraction(device) == pytest.approx(share)

    assert figures[0].divergence.value == pytest.approx(figures[1].divergence.value, rel=1e-3)
