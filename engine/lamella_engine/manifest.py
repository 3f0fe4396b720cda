"""The manifest: the one small file that makes a directory of shards a model.

Owns its form and strict reading; `shard_builder` writes it last, `shard_store` opens models through it. Layout of a
store::

    <store>/<model>/manifest.json         what is published; replaced atomically
    <store>/<model>/<build>/              its files: config, tokenizer, root.safetensors, layer-00000.safetensors ...
    <store>/<model>/<build>/layer-00000.json ...  instead of a shard: where the layer lies in a file of the original
    <store>/<model>/<build>/original-00000.safetensors ...  those files, by another name
    <store>/<model>/<build>/built.jsonl   shards finished so far, for resuming
    <store>/<model>/<build>/checked.json  which files were hashed when, so that they are not hashed again
    <store>/.locks/<model>.lock           held by the process that builds
    <store>/.locks/<model>.use            held by the processes that have it open
    <store>/.quota, <store>/.measured/    see `store_room` and `quant_mix`
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

from lamella_engine.errors import ShardError
from lamella_engine.names import model_name
from lamella_engine.shard_writer import ShardRecord, sync_directory

MANIFEST_FILE = "manifest.json"
FORMAT_VERSION = 1
ROOT_SHARD = "root.safetensors"
ORIGINAL = "original-"
_BUILD_NAME = re.compile(r"[0-9a-f]{16}")
_FILE_NAME = re.compile(r"[A-Za-z0-9_][\w.-]*", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Manifest:
    """A published model.

    Attributes:
        name: the model's name.
        family: its config's model type.
        source_kind, source: what it was built from, and where that was.
        revision: commit on the hub, or None for a local source.
        fingerprint: of the source's headers, sizes, change times and small files.
        dtype: torch dtype name of most stored bytes.
        requested_dtype: dtype the caller asked for, or None for the source's own.
        build: directory of the files, inside the model's directory.
        root, layers: the shards.
        companions: config and tokenizer files.
        built_at: Unix seconds.
        originals: files of the source that layers are read from in place, under the names that the build gives them.
        is_in_place: layers were to be read in place where they can be.
        quant: which tensors are packed and how, as `quant_spec` writes it; empty if none is.
    """

    name: str
    family: str
    source_kind: str
    source: str
    revision: str | None
    fingerprint: str
    dtype: str
    requested_dtype: str | None
    build: str
    root: ShardRecord
    layers: tuple[ShardRecord, ...]
    companions: tuple[ShardRecord, ...]
    built_at: float
    originals: tuple[ShardRecord, ...] = ()
    is_in_place: bool = False
    quant: str = ""
    format_version: int = FORMAT_VERSION

    @property
    def files(self) -> tuple[ShardRecord, ...]:
        """Every file of the model: companions, root, layers, and what they are read from in place."""
        return (*self.companions, *self.shards, *self.originals)

    @property
    def shards(self) -> tuple[ShardRecord, ...]:
        """The root and the layers."""
        return (self.root, *self.layers)

    @property
    def size_bytes(self) -> int:
        """Bytes of the shards, and of the originals that stand in for some."""
        return sum(record.nbytes for record in (*self.shards, *self.originals))


def layer_file(index: int, suffix: str = ".safetensors") -> str:
    """File name of the layer `index`."""
    return f"layer-{index:05d}{suffix}"


def original_file(index: int) -> str:
    """Name that a build gives to the source's file number `index`."""
    return f"{ORIGINAL}{index:05d}.safetensors"


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Publish `manifest` in the model's `directory`: whole or not at all, and only once it is on the disk."""
    write_json(directory / MANIFEST_FILE, dataclasses.asdict(manifest))
    sync_directory(directory)


def write_json(path: Path, value: object) -> None:
    """Replace `path` by the JSON of `value`, atomically."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with part.open("w", encoding="utf-8") as file:
            json.dump(value, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def read_manifest(directory: Path) -> Manifest | None:
    """The manifest in the model's `directory`, or None if no model is published there.

    Raises:
        ShardError: the manifest is damaged, or of another format version.
    """
    path = directory / MANIFEST_FILE
    name = model_name(directory)
    try:
        return parse_manifest(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise damaged(path, f"it cannot be read ({error})", name) from error
    except ValueError as error:
        raise damaged(path, str(error), name) from error


def as_json(manifest: Manifest) -> bytes:
    """The manifest as `parse_manifest` reads it."""
    return json.dumps(dataclasses.asdict(manifest)).encode()


def parse_manifest(raw: bytes) -> Manifest:
    """Read a manifest, wherever it comes from.

    Raises:
        ValueError: it is damaged, or of another format version.
    """
    try:
        parsed = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it cannot be read ({error})") from error
    if not isinstance(parsed, dict):
        raise ValueError("it is not a JSON object")
    if parsed.get("format_version") != FORMAT_VERSION:
        raise ValueError(f"it has format {parsed.get('format_version')!r}, this is {FORMAT_VERSION}")
    try:
        return _checked(parsed)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"an entry is missing or wrong ({error})") from error


def damaged(path: Path, reason: str, name: str) -> ShardError:
    """The error for a file of the model `name` that cannot be trusted: what, why, and what to do."""
    return ShardError(f"{path}: {reason}. Remove the model with `lamella models remove {name}` and build it again.")


def _checked(parsed: dict[str, object]) -> Manifest:
    parsed = {"originals": [], "is_in_place": False, "quant": "", **parsed}  # older manifests have none
    values = {field.name: parsed[field.name] for field in dataclasses.fields(Manifest)}
    for field in ("name", "family", "source_kind", "source", "fingerprint", "dtype", "build"):
        _text(values[field], field)
    for field in ("revision", "requested_dtype"):
        if values[field] is not None:
            _text(values[field], field)
    if not _BUILD_NAME.fullmatch(str(values["build"])):
        raise ValueError("build is not a directory name")
    values["root"] = _record(values["root"])
    for field in ("layers", "companions"):
        values[field] = tuple(_record(item) for item in _list(values[field], field))
    if not isinstance(values["originals"], list) or not isinstance(values["is_in_place"], bool):
        raise ValueError("what is read in place is not a list")
    if not isinstance(values["quant"], str):
        raise ValueError("quant is not text")
    values["originals"] = tuple(map(_record, values["originals"]))
    if not isinstance(values["built_at"], int | float):
        raise ValueError("built_at is not a time")
    return Manifest(**values)  # type: ignore[arg-type] # every value was checked above


def _text(value: object, field: str) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{field} is not text")
    return value


def _list(value: object, field: str) -> list[object]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{field} is not a list with entries")
    return value


def _record(value: object) -> ShardRecord:
    if not isinstance(value, dict):
        raise ValueError("a file's entry is not an object")
    file, nbytes, sha256 = value["file"], value["nbytes"], value["sha256"]
    if not _FILE_NAME.fullmatch(_text(file, "file")) or not _SHA256.fullmatch(_text(sha256, "sha256")):
        raise ValueError(f"{file!r} is not a file of the model")
    if type(nbytes) is not int or nbytes < 0:
        raise ValueError(f"the size of {file} is not a number of bytes")
    return ShardRecord(file, nbytes, sha256)
