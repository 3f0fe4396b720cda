"""Which mixtures are recorded as graphs is known before it is tried, and from what each way costs."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig

from lamella_engine import architecture
from lamella_engine.experts import ExpertBytes
from lamella_engine.recordable import expands_visited, find_unrecorded, waits_when_routed
from tests import tiny_models

CPU = torch.device("cpu")
MIXTRAL = tiny_models.FAMILIES["mixtral"]


@pytest.mark.parametrize(
    ("way", "dtype", "capability", "waits"),
    [
        ("grouped_mm", torch.bfloat16, (9, 0), False),
        ("grouped_mm", torch.bfloat16, (10, 0), False),
        ("grouped_mm", torch.float32, (9, 0), True),
        ("grouped_mm", torch.float16, (9, 0), True),
        ("grouped_mm", torch.bfloat16, (8, 6), True),
        ("batched_mm", torch.float32, (6, 1), False),
        ("eager", torch.bfloat16, (9, 0), True),
        ("grouped_mm", torch.float32, None, False),
    ],
)
def test_layers_whose_experts_wait_for_their_routing_are_known_before_they_are_recorded(
    way: str, dtype: torch.dtype, capability: tuple[int, int] | None, waits: bool
) -> None:
    config = AutoConfig.for_model("mixtral", **MIXTRAL)
    built = architecture.build(config, dtype)
    built.model.set_experts_implementation(way)
    dense = architecture.build(AutoConfig.for_model("llama", **tiny_models.FAMILIES["llama"]), dtype)

    assert waits_when_routed(built.layers[0], dtype, capability) == waits
    assert not waits_when_routed(dense.layers[0], dtype, capability)


@pytest.mark.parametrize(
    ("count", "routed", "numbers", "device_memory", "expands"),
    [
        (8, 2, 3 * 4096 * 14336, 256e9, True),  # Mixtral on an old card
        (8, 2, 3 * 4096 * 14336, 3e12, False),  # and on a new one
        (256, 8, 3 * 7168 * 2048, 3e12, True),
        (128, 8, 3 * 2048 * 768, 3e12, False),
    ],
)
def test_a_layer_that_stays_packed_asks_where_expanding_all_of_it_takes_longer_than_recording_saves(
    count: int, routed: int, numbers: int, device_memory: float, expands: bool
) -> None:
    own = ExpertBytes("mlp.experts", count, routed, ((0, numbers // 2),))

    assert expands_visited(own, count * numbers * 2, device_memory) == expands


def test_transformers_multiplies_experts_by_the_grouped_product_unless_told_otherwise() -> None:
    config = AutoConfig.for_model("mixtral", **MIXTRAL)

    built = architecture.build(config, torch.float32)

    assert built.model.config._experts_implementation == "grouped_mm"


def test_a_mixture_is_recorded_unless_its_experts_are_worth_asking_for() -> None:
    layers = architecture.build(AutoConfig.for_model("mixtral", **MIXTRAL), torch.float32).layers
    own = ExpertBytes("mlp.experts", 64, 2, ((0, 10**6),))

    found = find_unrecorded(layers, [None, own, own, own], [0, 0, 10**9, 10**6], CPU, torch.float32, 1e11)

    assert found == {2}
