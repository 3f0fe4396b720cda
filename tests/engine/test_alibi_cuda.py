"""Linear position biases on a GPU: the published tokens, recorded or not, wherever the layers are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lamella_engine import Engine, EngineOptions, Sampling, ShardStore
from tests.engine.engine_driver import gather, open_smallest, submit_ids
from tests.engine.published_models import PUBLISHED

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(300),
]

PROMPTS = [[5, 9, 13], list(range(20, 60)), [7], list(range(100, 117))]
GREEDY = Sampling(max_tokens=24, ignore_eos=True)


@pytest.mark.parametrize("place", ["resident", "streamed"])
@pytest.mark.parametrize("variant", ["Baichuan 13B", "Baichuan2 13B"])
def test_tokens_are_the_published_ones(variant: str, place: str, tmp_path: Path) -> None:
    published = PUBLISHED[variant]
    sharded = ShardStore(tmp_path / "store").ensure("tiny", source=published.save(tmp_path / "source"))
    expected = [published.greedy(prompt, 24)[0] for prompt in PROMPTS]
    options = EngineOptions(store=tmp_path / "store", dtype="float32", sweep_tokens=16)

    is_resident = place == "resident"
    device = torch.device("cuda", 0)
    opened = Engine.open_sharded(sharded, device, options) if is_resident else open_smallest(sharded, options)

    with opened as engine:
        found = [_together(engine), _together(engine)]
        num_graphs = engine.model._graphs.num_graphs

    assert found == [expected, expected]
    assert num_graphs > 0


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_layers_with_biases_are_recorded_in_half_precision(dtype: str, tmp_path: Path) -> None:
    source = PUBLISHED["Baichuan 13B"].save(tmp_path / "source")
    options = EngineOptions(store=tmp_path / "store", device="cuda", dtype=dtype, sweep_tokens=16)

    with Engine.open(source, options) as engine:
        tokens = _together(engine)

        assert [len(each) for each in tokens] == [24] * len(PROMPTS)
        assert engine.model._graphs.is_enabled
        assert engine.model._graphs.num_graphs > 0


def _together(engine: Engine) -> list[list[int]]:
    names = [str(number) for number in range(len(PROMPTS))]
    for name, prompt in zip(names, PROMPTS, strict=True):
        submit_ids(engine, name, prompt, GREEDY)
    outcomes = gather(engine, set(names))
    return [outcomes[name].token_ids for name in names]
