"""What one sequence keeps between two steps where transformers itself keeps it: its cache object, and its tokens.

Owns how a family's own forward is called for some more tokens of one sequence, exactly as its `generate` does, and how
such a state is copied and measured. `stepwise` calls it in a sweep, `state_pool` holds the states, `state_size` tells
their bytes in advance.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from inspect import signature
from typing import Any

import torch
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel

CACHE_NAMES = ("past_key_values", "cache_params", "state")  # what a forward calls the state it takes and gives back
UNCARRIED_NAMES = frozenset({"mems", "past_buckets_states"})  # older forms of it


class SequenceState:
    """One sequence's own state; changed by `StateForward` only.

    Attributes:
        token_ids: its tokens so far.
        cache: transformers' object with what the layers keep of them; None before the first step.
        in_modules: what a layer keeps in its modules instead, by its number and the attribute's dotted path.
    """

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.cache: Any = None
        self.in_modules: dict[tuple[int, str], torch.Tensor | None] = {}

    def copy(self) -> SequenceState:
        """Another sequence that goes on from here."""
        twin = SequenceState()
        twin.token_ids = list(self.token_ids)
        with torch.inference_mode():
            twin.cache = copy.deepcopy(self.cache, {id(part): part for part in _configs(self.cache)})
            twin.in_modules = copy.deepcopy(self.in_modules)
        return twin

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors it keeps."""
        return sum(tensor.untyped_storage().nbytes() for tensor in _tensors([self.cache, self.in_modules], set()))


class StateForward:
    """Calls `model` for more tokens of one sequence at a time, on `device`."""

    def __init__(self, model: PreTrainedModel, device: torch.device) -> None:
        self._model = model
        self._device = device
        parameters = signature(model.forward).parameters
        self._cache_name = next((name for name in CACHE_NAMES if name in parameters), None)
        self._takes_positions = "position_ids" in parameters
        self._keeps_rows = "logits_to_keep" in parameters

    @property
    def keeps_state(self) -> bool:
        """False for a family that computes the whole text again for every token."""
        return self._cache_name is not None

    @property
    def makes_cache(self) -> bool:
        """Whether a state has transformers' usual cache from the start; other families make their own."""
        return self._cache_name not in (None, "state") and bool(self._model._supports_default_dynamic_cache())

    def __call__(self, state: SequenceState, token_ids: Sequence[int], rows: int | None = None) -> torch.Tensor:
        """Add `token_ids` to `state`; logits of the last one, [vocabulary], or of the last `rows`, [rows, vocabulary].

        After a failure the state is of no more use.
        """
        is_first = not state.token_ids
        if is_first:
            state.cache = self._new_cache()
        state.token_ids.extend(token_ids)
        output = self._model(**self._inputs(state, len(token_ids), rows or 1, is_first=is_first), return_dict=True)
        if self._cache_name is not None:
            if self._cache_name in output:  # else the one that was given was changed in place
                state.cache = output[self._cache_name]
            if len(token_ids) > 1:
                _let_go_of_the_unseen(state.cache)
        logits: torch.Tensor = output.logits[0, -1] if rows is None else output.logits[0, -rows:]
        return logits

    def _inputs(self, state: SequenceState, count: int, rows: int, *, is_first: bool) -> dict[str, object]:
        """Arguments for the family's forward, made by its own rules for generating."""
        ids = torch.tensor([state.token_ids], device=self._device)
        known: dict[str, object] = {"use_cache": self._cache_name is not None}
        if self._cache_name is not None and state.cache is not None:
            known[self._cache_name] = state.cache
        if self._takes_positions:
            mask = torch.ones_like(ids)
            known["position_ids"] = self._model._prepare_position_ids_for_generation(ids, {"attention_mask": mask})
        if self._keeps_rows:
            known["logits_to_keep"] = rows
        inputs: dict[str, object] = self._model.prepare_inputs_for_generation(
            ids, next_sequence_length=None if is_first else count, is_first_iteration=is_first, **known
        )
        return inputs

    def _new_cache(self) -> DynamicCache | None:
        if not self.makes_cache:
            return None
        return DynamicCache(config=self._model.config.get_text_config(decoder=True))


def _let_go_of_the_unseen(cache: object) -> None:
    """Copy what is a small part of a larger tensor: windows are cut from all tokens of a step."""
    for layer in getattr(cache, "layers", ()):
        holders = [vars(layer), *(value for value in vars(layer).values() if isinstance(value, dict))]
        for holder in holders:
            for name, value in holder.items():
                if isinstance(value, torch.Tensor) and value.untyped_storage().nbytes() > 2 * value.nbytes:
                    holder[name] = value.clone()


def _tensors(value: object, seen: set[int]) -> Iterator[torch.Tensor]:
    """Tensors with memory of their own inside `value`, each memory once."""
    if isinstance(value, torch.Tensor):
        memory = value.untyped_storage()._cdata
        if memory not in seen:
            seen.add(memory)
            yield value
        return
    for part in _parts(value, seen):
        yield from _tensors(part, seen)


def _configs(value: object) -> list[object]:
    """Configs inside `value`, which states share."""
    found: list[object] = []

    def look(part: object, seen: set[int]) -> None:
        if isinstance(part, PretrainedConfig):
            found.append(part)
            return
        for inner in _parts(part, seen):
            look(inner, seen)

    look(value, set())
    return found


def _parts(value: object, seen: set[int]) -> Iterator[object]:
    if id(value) in seen or isinstance(value, torch.Tensor | PretrainedConfig | type | Callable):
        return
    seen.add(id(value))
    if isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, list | tuple | set):
        yield from value
    elif hasattr(value, "__dict__"):
        yield from vars(value).values()
