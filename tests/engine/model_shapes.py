"""Sizes of models for tests of the planner: made up, seeded, and a few of well-known shapes."""

from __future__ import annotations

import random
from dataclasses import replace

from lamella_engine.placement import Bandwidths, ExpertSizes, ModelSizes

GIB, MIB = 1024**3, 1024**2
CARD = Bandwidths(disk=2e9, h2d=12e9, device_memory=256e9, flops=6.5e12)
CPU = Bandwidths(disk=2e9, h2d=float("inf"), device_memory=20e9, flops=1e11)


def llama(num_layers: int, hidden: int, inner: int, vocabulary: int, heads: int, kv_heads: int) -> ModelSizes:
    """A Llama in bfloat16 with a head of its own and 4096 tokens of context."""
    width = hidden // heads
    layer = 2 * (2 * hidden * hidden + 2 * hidden * kv_heads * width + 3 * hidden * inner + 2 * hidden)
    return ModelSizes(
        name="llama",
        layers=(layer,) * num_layers,
        embedding=2 * vocabulary * hidden,
        head=2 * vocabulary * hidden,
        is_tied=False,
        other=2 * hidden,
        kv_bytes_per_token=num_layers * 2 * kv_heads * width * 2,
        expansion=1.0,
        active_parameters=num_layers * layer // 2 + vocabulary * hidden,
        hidden_size=hidden,
        intermediate_size=inner,
        attention_width=hidden,
        vocabulary=vocabulary,
        itemsize=2,
        context_length=4096,
    )


LLAMA_7B = llama(16, 4096, 14336, 32000, 32, 8)
LLAMA_70B = llama(80, 8192, 28672, 32000, 64, 8)


_MIXTRAL = llama(32, 4096, 8 * 14336, 32000, 32, 8)
# Eight experts of three matrices in a layer, of which a token visits two.
MIXTRAL = replace(
    _MIXTRAL,
    name="mixtral",
    active_parameters=sum(_MIXTRAL.layers) // 8,
    intermediate_size=2 * 14336,
    experts=ExpertSizes(8, 2, (8 * 2 * 3 * 4096 * 14336,) * 32),
)


def random_sizes(random_numbers: random.Random) -> ModelSizes:
    """Layers of one, two or many sizes, tied or not, stored in the compute type or in another."""
    count = random_numbers.randint(1, 90)
    kinds = [random_numbers.randint(1, 64 * MIB) for _ in range(random_numbers.choice((1, 1, 2, 3, count)))]
    layers = tuple(random_numbers.choice(kinds) for _ in range(count))
    table = random_numbers.randint(1, 256 * MIB)
    is_tied = random_numbers.random() < 0.4
    base = llama(count, 64 * random_numbers.randint(1, 64), 64 * random_numbers.randint(1, 200), 100, 8, 2)
    return replace(
        base,
        layers=layers,
        embedding=table,
        head=0 if is_tied else table,
        is_tied=is_tied,
        other=random_numbers.randint(0, MIB),
        expansion=random_numbers.choice((1.0, 1.0, 2.0, 0.5)),
        active_parameters=max(1, sum(layers) // 2),
        vocabulary=random_numbers.randint(100, 200_000),
        kv_bytes_per_token=count * random_numbers.randint(1, 8192),
        context_length=random_numbers.choice((64, 512, 4096, 131_072)),
        experts=_random_experts(random_numbers, layers) if random_numbers.random() < 0.3 else None,
    )


def _random_experts(random_numbers: random.Random, layers: tuple[int, ...]) -> ExpertSizes:
    """Experts that are most of every layer, or of every other one."""
    count, step = random_numbers.choice((8, 64, 128)), random_numbers.choice((1, 2))
    sizes = (0 if index % step else nbytes * 9 // 10 // count * count for index, nbytes in enumerate(layers))
    return ExpertSizes(count, random_numbers.randint(1, 7), tuple(sizes))
