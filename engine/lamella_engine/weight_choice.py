"""Which of several safetensors files hold a model's weights, once, where none of them has the usual name.

Names tell what is another format or an adapter; what belongs together the tensors tell: files that share none are parts
of one model, files that share one are copies, of which nobody says which counts. Neighbours: `weight_files` chooses in
a directory with it, `hub` in a repository's listing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from lamella_engine.errors import CheckpointError

INDEX_FILE = "model.safetensors.index.json"
SUFFIX, INDEX_SUFFIX = ".safetensors", ".safetensors.index.json"
CONSOLIDATED, ADAPTER = "consolidated", "adapter_model"
# Tensors of Mistral's own layout, which consolidated files mostly have.
_OWN_NAMES = re.compile(r"(tok_embeddings|layers\.\d+\.(attention|feed_forward|attention_norm|ffn_norm))\.")

TensorNames = Callable[[str], Iterable[str]]


@dataclass(frozen=True)
class WeightChoice:
    """The files that hold the weights: those that `index` names, or else all of `files`."""

    index: str | None
    files: tuple[str, ...]


def choose_weights(names: Iterable[str], tensors_of: TensorNames, where: str) -> WeightChoice | None:
    """Choose among the files `names`; None if none of them holds a model's weights as transformers names them.

    Args:
        names: names of files; those in folders count for nothing.
        tensors_of: names of the tensors in a file; asked only where they decide.
        where: place of the files, for errors.

    Raises:
        CheckpointError: it cannot be told which files belong to the model.
    """
    beside = sorted(name for name in names if "/" not in name and name.endswith((SUFFIX, INDEX_SUFFIX)))
    usual = [name for name in beside if not name.startswith((CONSOLIDATED, ADAPTER))]
    if usual:
        return _sole(usual, tensors_of, where)
    consolidated = [name for name in beside if name.startswith(CONSOLIDATED)]
    files = [name for name in consolidated if name.endswith(SUFFIX)]
    if any(_OWN_NAMES.match(tensor) for name in files for tensor in tensors_of(name)):
        return None
    return _sole(consolidated, tensors_of, where) if files else None


def _sole(names: list[str], tensors_of: TensorNames, where: str) -> WeightChoice:
    """The one index among `names`, or files of which no two hold the same tensor."""
    indexes = [name for name in names if name.endswith(INDEX_SUFFIX)]
    files = [name for name in names if name.endswith(SUFFIX)]
    if len(indexes) == 1:
        return WeightChoice(indexes[0], ())
    if indexes:
        raise _ambiguous(where, f"{len(files)} safetensors files and {len(indexes)} indexes, {' and '.join(indexes)}")
    if len(files) > 1:
        found_in: dict[str, str] = {}
        for name in files:
            for tensor in tensors_of(name):
                other = found_in.setdefault(tensor, name)
                if other != name:
                    raise _ambiguous(
                        where,
                        f"{len(files)} safetensors files and no {INDEX_FILE}, and both {other} and {name} hold "
                        f"{tensor!r}",
                    )
    return WeightChoice(None, tuple(files))


def _ambiguous(where: str, what: str) -> CheckpointError:
    return CheckpointError(
        f"{where} holds {what}, so it cannot be told which belong to the model; put one checkpoint, with its index if "
        "it has one, and its config and tokenizer files into a directory of their own and give that"
    )
