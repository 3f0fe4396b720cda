"""What packing makes of a model, by transformers alone: every packed weight replaced by what it expands to."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from lamella_engine import architecture
from lamella_engine.formats import find_format
from lamella_engine.quant_spec import FULL, QuantSpec, TensorName, parse_quant
from tests.engine.engine_driver import full_load_tokens

CPU = torch.device("cpu")


def expand_packed(model: torch.nn.Module, layers_path: str, spec: QuantSpec) -> None:
    """Pack and expand every weight of `model` that `spec` packs, in place."""
    prefix = f"{layers_path}."
    tied: dict[str, str] = {source: target for target, source in model.all_tied_weights_keys.items()}  # type: ignore[operator,union-attr] # transformers' own
    for name, weight in model.named_parameters():
        index, _, rest = name.removeprefix(prefix).partition(".")
        own = TensorName(rest, tuple(weight.shape), int(index)) if name.startswith(prefix) else None
        chosen = spec.format_for(own or TensorName(name, tuple(weight.shape), None, tied.get(name)))
        if chosen != FULL:
            format = find_format(chosen)
            format.decode(format.encode(weight.data), weight.data)


def expected_tokens(
    source: Path, quant: str, prompts: list[list[int]], count: int, device: torch.device = CPU
) -> list[list[int]]:
    """Greedy tokens on `device` of the model that `quant` makes of `source`."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, attn_implementation="eager").eval()
    expand_packed(model, architecture.build(model.config, torch.float32).layers_path, parse_quant(quant))
    return [full_load_tokens(model.to(device), prompt, count) for prompt in prompts]
