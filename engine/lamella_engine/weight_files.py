"""Which files of a checkpoint directory hold its weights, and which tensor is where.

Owns finding them: through the index wherever there is one, never by parsing their names; and saying why a directory
has none that can be read. `weight_choice` decides where names are unusual, `safetensors_header` checks each file,
`checkpoint` reads, `pickled_checkpoint` converts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from lamella_engine.errors import CheckpointError
from lamella_engine.safetensors_header import SafetensorsHeader, TensorEntry, read_header
from lamella_engine.weight_choice import ADAPTER, CONSOLIDATED, SUFFIX, choose_weights
from lamella_engine.weight_choice import INDEX_FILE as INDEX_FILE

CONFIG_FILE = "config.json"
SINGLE_FILE = "model.safetensors"
PICKLED_FILE = "pytorch_model.bin"
PICKLED_INDEX = "pytorch_model.bin.index.json"
_PICKLED = (PICKLED_FILE, PICKLED_INDEX, "consolidated.00.pth")

Placed = Mapping[str, tuple[Path, TensorEntry]]


def find_weights(path: Path) -> tuple[tuple[SafetensorsHeader, ...], Placed]:
    """Find and check the weight files of the directory `path`: one file, those that an index names, or several parts.

    Returns:
        The checked headers, and each tensor's file and place.

    Raises:
        CheckpointError: there are none, it cannot be told which, or one is missing or corrupt.
    """
    if (path / SINGLE_FILE).is_file():
        return _together([path / SINGLE_FILE])
    if (path / INDEX_FILE).is_file():
        return _indexed(path / INDEX_FILE)
    names = [file.name for file in path.iterdir() if file.is_file()]
    choice = choose_weights(names, lambda name: read_header(path / name).tensors, str(path))
    if choice is None:
        raise CheckpointError(_why_no_weights(path))
    return _together([path / name for name in choice.files]) if choice.index is None else _indexed(path / choice.index)


def has_weights(path: Path) -> bool:
    """True if any file in the directory `path` looks like weights, of whatever kind."""
    suffixes = {".safetensors", ".bin", ".pt", ".pth", ".gguf"}
    return any(file.suffix.lower() in suffixes for file in path.iterdir())


def why_no_config(path: Path) -> str:
    """What to tell who gave a directory without config.json."""
    if (path / "params.json").is_file():
        return (
            f"{path} has no {CONFIG_FILE} but params.json: it is Mistral's own format, which is not read. Fetch the "
            "repository's config.json and model*.safetensors, which most of them have as well, or a converted copy"
        )
    if (path / "adapter_config.json").is_file():
        return (
            f"{path} has no {CONFIG_FILE} but adapter_config.json: it is an adapter, not a model. Merge it into its "
            "base model (peft: merge_and_unload, then save_pretrained) and give that directory"
        )
    return f"{path} has no {CONFIG_FILE}; give the directory of a transformers checkpoint"


def read_weight_map(index: Path) -> dict[str, str]:
    """From tensor names to file names, both checked to be no more than that.

    Raises:
        CheckpointError: the index is broken, or names files elsewhere or that are not there.
    """
    try:
        parsed = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{index} cannot be read as JSON: {error}") from error
    weight_map = parsed.get("weight_map") if isinstance(parsed, dict) else None
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{index} has no 'weight_map' from tensor names to file names; fetch it again")
    for file_name in sorted(set(weight_map.values())):
        if Path(file_name).name != file_name or file_name in (".", ".."):
            raise CheckpointError(f"{index} names the file {file_name!r}, which is not a plain file name")
        if not (index.parent / file_name).is_file():
            raise CheckpointError(
                f"{index.parent / file_name} is missing, though {index.name} names it; fetch it again"
            )
    return weight_map


def _together(files: list[Path]) -> tuple[tuple[SafetensorsHeader, ...], Placed]:
    """One file, or several of which no two hold the same tensor."""
    headers = tuple(read_header(file) for file in files)
    return headers, {name: (header.path, entry) for header in headers for name, entry in header.tensors.items()}


def _indexed(index: Path) -> tuple[tuple[SafetensorsHeader, ...], Placed]:
    weight_map = read_weight_map(index)
    headers = {name: read_header(index.parent / name) for name in sorted(set(weight_map.values()))}
    absent = [name for name, file_name in weight_map.items() if name not in headers[file_name].tensors]
    if absent:
        raise CheckpointError(
            f"{index} names {len(absent)} tensors that their files do not hold, such as {absent[0]!r} in "
            f"{weight_map[absent[0]]}; the files do not belong together, fetch them again"
        )
    placed: dict[str, tuple[Path, TensorEntry]] = {}
    for file_name, header in headers.items():
        for name, entry in header.tensors.items():
            if weight_map.get(name, file_name) != file_name:
                continue  # the index says that the other copy counts
            if name in placed:
                raise CheckpointError(
                    f"{name!r} is both in {placed[name][0].name} and in {file_name}, and {index.name} does not say "
                    "which counts; fetch the files again"
                )
            placed[name] = (header.path, entry)
    return tuple(headers.values()), placed


def _why_no_weights(path: Path) -> str:
    pickled = [name for name in _PICKLED if (path / name).exists()]
    if pickled:
        way_out = "" if pickled[0].startswith(CONSOLIDATED) else (
            f" If you trust where it comes from: `lamella models import NAME {path} --allow-pickle`, which converts it "
            "in a process of its own."
        )  # fmt: skip
        return (
            f"{path} has its weights in {pickled[0]}, a pickle, which could run code and is not read.{way_out} Else "
            "use a checkpoint with safetensors, or make one with transformers' save_pretrained(...)"
        )
    if list(path.glob(f"{CONSOLIDATED}*{SUFFIX}")):
        return (
            f"{path} has its weights in Mistral's own consolidated format, whose names and layout differ. Fetch the "
            "repository's model*.safetensors and their index, which most of them have as well, or a converted copy"
        )
    if list(path.glob(f"{ADAPTER}*{SUFFIX}")):
        return f"{path} holds an adapter only; merge it into its base model and give that directory"
    ggufs = sorted(file.name for file in path.glob("*.gguf"))
    if ggufs:
        return f"{path} holds GGUF files; name the file itself, such as {path / ggufs[0]}"
    return f"{path} has neither {SINGLE_FILE} nor {INDEX_FILE}; a checkpoint in safetensors or GGUF form is needed"
