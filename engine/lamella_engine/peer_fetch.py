"""Brings a model's shards from a peer's store into this one: manifest, room, files, hashes, publication, in this order.

Owns one fetch: what the manifest must be to be what was asked for; files that go on where an earlier fetch was cut;
and that nothing of it is visible before every byte hashes to what the manifest says. The caller holds the model's lock.
A peer's hashes prove that its files came over whole, not that it can be trusted. Neighbours: `peer_client` below,
`shard_store` above, which builds from the hub where no peer helps.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from lamella_engine import names
from lamella_engine.errors import PeerCut, PeerError, PeerLacksModel, ShardError
from lamella_engine.manifest import MANIFEST_FILE, Manifest, parse_manifest, write_manifest
from lamella_engine.peer_address import Patience, PeerAddress, Peers
from lamella_engine.peer_client import PeerClient
from lamella_engine.progress import FETCH, Progress
from lamella_engine.quant_mix import SizeTarget
from lamella_engine.shard_builder import BUILT_FILE, check_free
from lamella_engine.shard_check import STAMPS_FILE, read_shards, stamp_unless_recent, write_stamps
from lamella_engine.shard_writer import (
    HASH_CHUNK_BYTES,
    PART_SUFFIX,
    ShardRecord,
    as_model_error,
    sync_directory,
)

logger = logging.getLogger(__name__)

FETCH_SUFFIX = ".fetch"
_MOST_PAUSE_S = 5.0
_MOST_FILES = 100_000
_OWN_FILES = frozenset({BUILT_FILE, STAMPS_FILE, MANIFEST_FILE})


@dataclass(frozen=True)
class Wish:
    """What is asked of a peer.

    Attributes:
        name: the model's name; it says the revision and the packed form, if any.
        dtype: torch dtype name that it must have, or None for any.
    """

    name: str
    dtype: str | None = None


def fetch_from_any(
    peers: Peers,
    wish: Wish,
    model_directory: Path,
    make_room: Callable[[int], object],
    progress: Progress,
) -> tuple[Manifest | None, str]:
    """Fetch and publish the model from the first of `peers` that gives it, each going on where the last one ended.

    Args:
        peers: whom to ask, in this order.
        wish: what for.
        model_directory: the model's directory in the store.
        make_room: called with the bytes that are still to be written, before the first of them.
        progress: told of every piece.

    Returns:
        The manifest, or None where no peer gave the model; and in words why each that was asked did not.

    Raises:
        DiskFull: there is no room (nothing was written), or it went away (finished files are kept).
        ShardError: the store cannot be written to.
    """
    steady = _Steady(progress)
    refusals: list[str] = []
    for address in peers.addresses:
        with contextlib.closing(PeerClient(address, peers.token, peers.patience)) as client:
            try:
                manifest = _Fetch(client, wish, peers.patience).run(model_directory, make_room, steady)
            except PeerLacksModel as error:
                logger.info("%s", error)
                refusals.append(str(error))
            except PeerError as error:
                logger.warning("%s is not taken from %s: %s", wish.name, address, error)
                refusals.append(str(error))
            else:
                return manifest, ""
    if not refusals:
        return None, ""
    logger.warning("no peer gave %s; it has to come from elsewhere", wish.name)
    return None, f"; of the peers that were asked, {'; '.join(refusals)}"


class _Steady:
    """A progress that never falls, though a file that was wrong is fetched again."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._most = 0

    def __call__(self, phase: str, done_bytes: int, total_bytes: int) -> None:
        self._most = max(self._most, done_bytes)
        self._progress(phase, min(self._most, total_bytes), total_bytes)


def _check_wish(peer: PeerAddress, wish: Wish, manifest: Manifest) -> None:
    """Refuse what is not the model that was asked for."""
    base, variant = names.split_variant(wish.name)
    _, revision = names.split_revision(wish.name)
    if manifest.name != wish.name:
        raise PeerError(f"{peer} sends {manifest.name[:200]!r} instead of {wish.name}")
    if revision is not None and not (manifest.revision or "").startswith(revision):
        raise PeerError(f"{peer} has {wish.name} from the commit {manifest.revision}, not {revision}")
    if wish.dtype is not None and wish.dtype not in (manifest.dtype, manifest.requested_dtype):
        raise PeerError(f"{peer} has another format of {wish.name}: {manifest.dtype}, not {wish.dtype}")
    if variant is None:
        fits = not manifest.quant
    elif SizeTarget.parse(variant) is not None:
        fits = bool(manifest.quant)
    else:
        fits = bool(manifest.quant) and names.variant_name(base, manifest.quant) == wish.name
    if not fits:
        raise PeerError(f"{peer} has another format of {wish.name}: {manifest.quant or 'not packed'}")
    files = [record.file for record in manifest.files]
    if len(set(files)) != len(files) or len(files) > _MOST_FILES:
        raise PeerError(f"{peer} lists files of {wish.name} twice, or too many")
    if any(file in _OWN_FILES or file.endswith(PART_SUFFIX) for file in files):
        raise PeerError(f"{peer} lists files of {wish.name} that a store keeps for itself")


def _remove_others(model_directory: Path, keep: Path) -> None:
    """Remove what was fetched of other builds."""
    for other in model_directory.glob(f"*{FETCH_SUFFIX}"):
        if other != keep:
            shutil.rmtree(other)


def _check_room(wish: Wish, manifest: Manifest, directory: Path, make_room: Callable[[int], object]) -> int:
    needed = sum(max(0, record.nbytes - _bytes_here(directory, record)) for record in manifest.files)
    make_room(needed)
    check_free(wish.name, needed, 0, directory.parent.parent)
    return needed


def _bytes_here(directory: Path, record: ShardRecord) -> int:
    return sum(
        path.stat().st_size
        for path in (directory / record.file, directory / (record.file + PART_SUFFIX))
        if path.is_file()
    )


def _publish(manifest: Manifest, directory: Path, model_directory: Path) -> None:
    """Give the files their place, and then the manifest."""
    stamps = {record.file: stamp_unless_recent(directory / record.file) for record in manifest.files}
    write_stamps(directory, {file: stamp for file, stamp in stamps.items() if stamp is not None})
    sync_directory(directory)
    place = model_directory / manifest.build
    if place.exists():
        shutil.rmtree(place)  # what a killed build of the same left
    directory.rename(place)
    write_manifest(model_directory, manifest)


class _Fetch:
    """One model from one peer."""

    def __init__(self, client: PeerClient, wish: Wish, patience: Patience) -> None:
        self._client = client
        self._name = wish.name
        self._wish = wish
        self._patience = patience
        self._retried = 0
        self._fetched = 0

    def run(self, model_directory: Path, make_room: Callable[[int], object], progress: Progress) -> Manifest:
        """Bring the model, and publish it.

        Raises:
            PeerError: a file does not come, or is not what the manifest says.
            DiskFull, ShardError: it cannot be written.
        """
        manifest = self._manifest()
        directory = model_directory / f"{manifest.build}{FETCH_SUFFIX}"
        started = time.monotonic()
        try:
            _remove_others(model_directory, directory)
            _check_room(self._wish, manifest, directory, make_room)
            directory.mkdir(parents=True, exist_ok=True)
            self._bring_all(manifest, directory, progress)
            try:
                read_shards(manifest, directory)
            except ShardError as error:
                shutil.rmtree(directory, ignore_errors=True)
                raise PeerError(f"{self._client.peer} has shards that cannot be read: {error}") from error
            _publish(manifest, directory, model_directory)
        except OSError as error:
            raise as_model_error(error, model_directory, manifest.size_bytes) from error
        finally:
            for emptied in (directory, model_directory):
                with contextlib.suppress(OSError):
                    emptied.rmdir()  # refused where a file is left to go on with
        took_s = max(time.monotonic() - started, 1e-6)
        logger.info(
            "fetched %s from %s: %d files, %d bytes now, in %.1f s (%.0f MB/s)",
            self._name, self._client.peer, len(manifest.files), self._fetched, took_s, self._fetched / took_s / 1e6,
        )  # fmt: skip
        return manifest

    def _manifest(self) -> Manifest:
        try:
            raw = self._client.manifest(self._name)
        except PeerCut:  # once more only: a peer that is not there shall not keep the others waiting
            time.sleep(self._patience.pause_s)
            raw = self._client.manifest(self._name)
        try:
            manifest = parse_manifest(raw)
        except ValueError as error:
            raise PeerError(
                f"{self._client.peer} has another format of {self._name} than this version reads: {error}"
            ) from error
        _check_wish(self._client.peer, self._wish, manifest)
        return manifest

    def _bring_all(self, manifest: Manifest, directory: Path, progress: Progress) -> None:
        total, done = sum(record.nbytes for record in manifest.files), 0
        progress(FETCH, 0, total)
        for record in manifest.files:
            if not _is_here(directory, record):
                self._bring(manifest.build, record, directory, partial(_advance, progress, done, total))
            done += record.nbytes
            progress(FETCH, done, total)

    def _bring(self, build: str, record: ShardRecord, directory: Path, advance: Callable[[int], None]) -> None:
        part = directory / (record.file + PART_SUFFIX)
        if part.is_file() and part.stat().st_size > record.nbytes:
            part.unlink()
        while True:
            is_resumed = part.is_file() and part.stat().st_size > 0
            try:
                digest = self._append(build, record, part, advance)
            except PeerCut as error:
                self._pause(error)
                continue
            if digest == record.sha256:
                break
            part.unlink()
            if not is_resumed:  # else its beginning may have been at fault, which may be another peer's
                raise PeerError(
                    f"{self._client.peer} sent {record.file} of {self._name} with other contents than its manifest "
                    "promises (SHA-256 differs); nothing of that file was kept"
                )
        part.replace(directory / record.file)

    def _append(self, build: str, record: ShardRecord, part: Path, advance: Callable[[int], None]) -> str:
        """Bring the rest of a file into `part`; returns the SHA-256 of all of it."""
        with part.open("ab", buffering=0) as file:
            offset = os.fstat(file.fileno()).st_size
            digest = _hash(part)
            if offset < record.nbytes:
                with self._client.file(self._name, build, record.file, offset, record.nbytes) as (begin, pieces):
                    if begin != offset:
                        file.truncate(begin)
                        digest, offset = hashlib.sha256(), begin
                    for piece in pieces:
                        _write(file.fileno(), piece)
                        digest.update(piece)
                        offset += len(piece)
                        self._fetched += len(piece)
                        advance(offset)
            os.fsync(file.fileno())
        return digest.hexdigest()

    def _pause(self, error: PeerCut) -> None:
        """Wait a little before another try, or raise `error` if there were enough."""
        if self._retried >= self._patience.retries:
            raise error
        logger.info("%s; trying again", error)
        time.sleep(min(self._patience.pause_s * 2**self._retried, _MOST_PAUSE_S))
        self._retried += 1


def _advance(progress: Progress, before: int, total: int, nbytes: int) -> None:
    progress(FETCH, before + nbytes, total)


def _is_here(directory: Path, record: ShardRecord) -> bool:
    """Whether an earlier fetch brought the file; whatever it left is hashed again."""
    path = directory / record.file
    if not path.is_file():
        return False
    if path.stat().st_size == record.nbytes and _hash(path).hexdigest() == record.sha256:
        return True
    path.unlink()
    return False


def _hash(path: Path) -> hashlib._Hash:
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(HASH_CHUNK_BYTES):
            digest.update(chunk)
    return digest


def _write(descriptor: int, piece: bytes) -> None:
    view = memoryview(piece)
    while view:
        view = view[os.write(descriptor, view) :]
