"""What `lamella models inspect` says of a model, in words; `inspection` has the facts."""

from __future__ import annotations

from collections.abc import Iterable

from lamella_engine.byte_size import byte_size
from lamella_engine.inspection import CardFit, ModelFacts
from lamella_engine.model_traits import Experts, Rotary


def _dtype(facts: ModelFacts) -> str:
    if not facts.packing:
        return facts.dtype
    return f"{facts.dtype}, {'stored as' if facts.found_in == 'store' else 'expanded from'} {facts.packing}"


def described_facts(facts: ModelFacts) -> list[tuple[str, str]]:
    """Rows of a name and what there is to say."""
    rows = [
        ("model", f"{facts.name} ({facts.found_in})"),
        ("revision", facts.revision or "-"),
        ("family", f"{facts.imported_from}, runs as {facts.family}" if facts.imported_from else facts.family),
        ("runs here", "yes" if facts.obstacle is None else f"no: {facts.obstacle}"),
        ("dtype", _dtype(facts)),
        ("layers", _kinds(facts)),
    ]
    if facts.size_bytes:
        rows += [
            ("parameters", f"{facts.parameters:,}"),
            ("size", byte_size(facts.size_bytes)),
            ("layer size", _span(facts.layer_bytes_min, facts.layer_bytes_max)),
            ("outside layers", f"{byte_size(facts.root_bytes)}, always resident"),
        ]
    if facts.experts is not None:
        rows += [("experts", _experts(facts.experts, facts.num_layers))]
        rows += [("a token meets", f"{facts.active_parameters:,} parameters")]
    rows += [
        ("hidden size", str(facts.hidden_size)),
        ("attention heads", f"{facts.attention_heads or '-'}, key-value heads {_several(facts.kv_heads)}"),
        ("head width", f"keys {_several(facts.key_widths)}, values {_several(facts.value_widths)}"),
        *(("rotary", _rotary(rotary)) for rotary in facts.rotary),
        *([("positions", "linear biases (ALiBi), a slope for each head")] if facts.has_linear_biases else []),
        ("context", f"{facts.context_length} tokens" if facts.context_length else "no limit named"),
        ("sliding window", f"{facts.sliding_window} tokens" if facts.sliding_window else "none"),
        ("vocabulary", f"{facts.vocabulary}, embeddings {'tied' if facts.tied_embeddings else 'not tied'}"),
        ("keys and values", f"at most {byte_size(facts.kv_bytes_per_token)} a token"),
        ("state", f"at most {byte_size(facts.state_bytes)} a sequence" if facts.state_bytes else "none"),
    ]
    return rows + [(f"on {byte_size(card.card_bytes)}", _fit(card, facts)) for card in facts.cards]


def _kinds(facts: ModelFacts) -> str:
    kinds = (f"{count} of {kind.replace('_', ' ')}" for kind, count in facts.layer_kinds.items())
    return f"{facts.num_layers}: {', '.join(kinds)}"


def _experts(experts: Experts, num_layers: int) -> str:
    shared = f", {byte_size(experts.shared_bytes)} in shared ones" if experts.shared_bytes else ""
    return (
        f"{experts.count} of {byte_size(experts.expert_bytes)} in {experts.layers} of {num_layers} layers, a token "
        f"visits {experts.routed}; {byte_size(experts.nbytes)} in all{shared}"
    )


def _rotary(rotary: Rotary) -> str:
    parts = [rotary.kind] + ([] if rotary.base is None else [f"base {rotary.base:g}"])
    parts += [] if rotary.share == 1.0 else [f"{rotary.share:.0%} of a head"]
    parts += [] if rotary.factor is None else [f"context stretched {rotary.factor:g} times"]
    return ", ".join(parts) + (f" ({rotary.layers.replace('_', ' ')})" if rotary.layers else "")


def _fit(card: CardFit, facts: ModelFacts) -> str:
    if not card.runs:
        return "does not run: too small for what lies outside the layers, one layer and 2048 tokens of keys and values"
    if card.resident_layers == facts.num_layers:
        return "runs; there is room for the whole model"
    return f"runs; beside the layers on their way there is room for {card.resident_layers} of {facts.num_layers}"


def _span(low: int, high: int) -> str:
    return byte_size(low) if low == high else f"{byte_size(low)} to {byte_size(high)}"


def _several(values: Iterable[int]) -> str:
    return " or ".join(str(value) for value in values) or "-"
