"""Models on the hub: which files a model needs, and fetching just those.

Owns the choice of files and the deadline of every request. The hub library keeps what it fetched in its own cache,
resumes partial downloads and finds the saved token. Only configs, tokenizers and safetensors are ever fetched: no
pickled weights, no code. `weight_choice` and `hub_headers` tell which safetensors where their names do not,
`hub_errors` words the failures; `shard_store` calls this and builds from the snapshot.
"""

from __future__ import annotations

import errno
import json
import os
import posixpath
import shutil
import threading
from collections.abc import Iterable
from concurrent.futures import ALL_COMPLETED, FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePath
from types import TracebackType

from huggingface_hub import HfApi, constants, get_token, hf_hub_download, hf_hub_url, try_to_load_from_cache

from lamella_engine.checkpoint import INDEX_FILE, SINGLE_FILE
from lamella_engine.errors import CheckpointError, DiskFull, ModelNotFound
from lamella_engine.hub_errors import HUB_ERRORS, HubRequest, explain
from lamella_engine.hub_headers import fetch_tensor_names
from lamella_engine.progress import Progress
from lamella_engine.weight_choice import CONSOLIDATED, SUFFIX, choose_weights

REQUEST_TIMEOUT_S = 15.0  # without a byte; a body may take as long as it likes while bytes arrive
PARALLEL_FILES = 4
_REPORT_EVERY_S = 0.25
_CONFIG_FILE = "config.json"
_COMPANIONS = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "chat_template.json", "chat_template.jinja", "vocab.json", "vocab.txt", "merges.txt",
    "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "tekken.json", "qwen.tiktoken",
    "quantize_config.json", "quant_config.json",
)  # fmt: skip


@dataclass(frozen=True)
class HubSnapshot:
    """Files of one model at one commit, on disk.

    Attributes:
        directory: where they are, in the hub library's cache; to be read, not changed.
        revision: the full commit they belong to.
    """

    directory: Path
    revision: str


def fetch_config(name: str, token: str | None = None) -> HubSnapshot:
    """Fetch ``config.json`` alone, so that a model that cannot run is refused before its weights are fetched.

    Pin the commit for a later `download` with ``f"{repository}@{snapshot.revision}"``.

    Args:
        name: ``owner/name`` or ``owner/name@revision``.
        token: access token; None means the usual places.

    Raises:
        ModelNotFound: there is no such repository, revision or file.
        ModelError: access is refused, or the hub cannot be reached.
    """
    listing = _list(name, token)
    return HubSnapshot(_fetch(listing, [_CONFIG_FILE], None).parent, listing.commit)


def download(name: str, *, token: str | None = None, progress: Progress | None = None) -> HubSnapshot:
    """Fetch config, tokenizer and safetensors of a model; what is in the cache already is not fetched again.

    Args:
        name: ``owner/name`` or ``owner/name@revision``.
        token: access token; None means the usual places.
        progress: told of phase ``download`` a few times a second, from the calling thread.

    Raises:
        ModelNotFound: there is no such repository, revision or file.
        CheckpointError: the repository holds no safetensors, or its index is broken.
        DiskFull: the cache's disk lacks room; said before any weight is fetched.
        ModelError: access is refused, or the hub cannot be reached.
    """
    listing = _list(name, token)
    config = _fetch(listing, [_CONFIG_FILE], None)
    weights = _weight_files(listing, config.parent)
    companions = [file for file in _COMPANIONS if file in listing.sizes]
    wanted = [_CONFIG_FILE, *companions, *weights]
    _check_room(listing, wanted)
    _fetch(listing, wanted, progress)
    return HubSnapshot(config.parent, listing.commit)


def cached_snapshot(repository: str, commit: str) -> Path | None:
    """Where the download cache holds that commit of `repository`; None if it does not. The hub is not asked."""
    found = try_to_load_from_cache(repository, _CONFIG_FILE, cache_dir=_cache_directory(), revision=commit)
    return Path(found).parent if isinstance(found, str) else None


def _cache_directory() -> Path:
    return Path(os.environ.get("HF_HUB_CACHE") or constants.HF_HUB_CACHE).expanduser()


@dataclass(frozen=True)
class _Listing:
    """A repository's files at one commit, with sizes in bytes where the hub tells them."""

    request: HubRequest
    commit: str
    sizes: dict[str, int | None]
    token: str | None
    cache: Path


def _list(name: str, token: str | None) -> _Listing:
    repository, _, revision = name.partition("@")
    endpoint = (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")
    cache = _cache_directory()
    token = token or get_token()
    request = HubRequest(repository, revision or None, endpoint, has_token=token is not None)
    try:
        info = HfApi(endpoint=endpoint, token=token or False).model_info(
            repository, revision=revision or None, timeout=REQUEST_TIMEOUT_S, files_metadata=True
        )
    except HUB_ERRORS as error:
        raise explain(error, request) from error
    if not info.sha:
        raise ModelNotFound(f"{endpoint} tells no commit of {request.name}; its repository is empty")
    sizes = {file.rfilename: file.size for file in info.siblings or ()}
    if _CONFIG_FILE not in sizes:
        raise ModelNotFound(
            f"{request.name} has no {_CONFIG_FILE} on {endpoint}: it is not a transformers checkpoint. "
            "Use the model's own repository, or fetch its .gguf file and import it by path."
        )
    return _Listing(request, info.sha, sizes, token, cache)


def _weight_files(listing: _Listing, directory: Path) -> list[str]:
    """The files that hold the weights, by the listing; by their headers where it does not tell."""
    if INDEX_FILE in listing.sizes:
        return _with_index(INDEX_FILE, listing, directory)
    if SINGLE_FILE in listing.sizes:
        return [SINGLE_FILE]
    choice = choose_weights(listing.sizes, partial(_tensor_names, listing), listing.request.name)
    if choice is None:
        raise _no_weights(listing)
    return list(choice.files) if choice.index is None else _with_index(choice.index, listing, directory)


def _tensor_names(listing: _Listing, file: str) -> frozenset[str]:
    request = listing.request
    url = hf_hub_url(request.repository, file, revision=listing.commit, endpoint=request.endpoint)
    try:
        return fetch_tensor_names(url, PurePath(request.name, file), listing.token, REQUEST_TIMEOUT_S)
    except HUB_ERRORS as error:
        raise explain(error, request) from error


def _no_weights(listing: _Listing) -> CheckpointError:
    name = listing.request.name
    if any(file.endswith((".bin", ".pt", ".pth")) for file in listing.sizes):
        return CheckpointError(
            f"{name} holds only pickled weights (.bin or .pt), which can run code when read and are not fetched. Use a "
            "repository or revision with safetensors, or convert it yourself and import the path."
        )
    if any(file.startswith(CONSOLIDATED) and file.endswith(SUFFIX) for file in listing.sizes):
        return CheckpointError(
            f"{name} holds its weights in Mistral's own consolidated format only, whose names and layout differ. Use a "
            "repository with model*.safetensors, or a converted copy."
        )
    return CheckpointError(
        f"{name} holds no safetensors file of a model beside its {_CONFIG_FILE}. Use a repository with safetensors; a "
        ".gguf file must be fetched by hand and imported by its path, an adapter merged into its base model."
    )


def _with_index(index: str, listing: _Listing, directory: Path) -> list[str]:
    """The index, which is fetched, and the files that it names."""
    _fetch(listing, [index], None)
    where = f"{index} of {listing.request.name}"
    try:
        files = sorted(set(json.loads((directory / index).read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{where} is not a safetensors index") from error
    if not files:
        raise CheckpointError(f"{where} names no files")
    for file in files:
        if not isinstance(file, str) or posixpath.basename(file) != file or not file.endswith(SUFFIX):
            raise CheckpointError(f"{where} names {file!r}, not a safetensors file")
        if file not in listing.sizes:
            raise ModelNotFound(f"{listing.request.name} lacks {file}, which its index names; the upload is incomplete")
    return [index, *files]


def _check_room(listing: _Listing, files: Iterable[str]) -> None:
    """Refuse before a weight is fetched; partial downloads in the cache count as fetched, they are resumed."""
    repository = listing.cache / f"models--{listing.request.repository.replace('/', '--')}"
    partial = sum(path.stat().st_size for path in repository.glob("blobs/*.incomplete"))
    missing = [file for file in files if not _is_cached(listing, file)]
    needed = sum(listing.sizes[file] or 0 for file in missing) - partial
    if needed > _free_bytes(listing.cache):
        raise _disk_full(listing, needed)


def _free_bytes(directory: Path) -> int:
    existing = next(path for path in (directory, *directory.parents) if path.exists())
    return shutil.disk_usage(existing).free


def _disk_full(listing: _Listing, needed_bytes: int) -> DiskFull:
    free = _free_bytes(listing.cache)
    return DiskFull(
        f"{listing.request.name} needs {needed_bytes} more bytes in the download cache {listing.cache}, where {free} "
        "are free. Free some, or set HF_HOME to a larger disk; what is fetched already is kept.",
        needed_bytes=needed_bytes,
        free_bytes=free,
    )


def _is_cached(listing: _Listing, file: str) -> bool:
    found = try_to_load_from_cache(listing.request.repository, file, cache_dir=listing.cache, revision=listing.commit)
    return isinstance(found, str)


def _fetch(listing: _Listing, files: list[str], progress: Progress | None) -> Path:
    """Fetch `files` into the cache; the path of the first."""
    meter = _Meter(sum(listing.sizes[file] or 0 for file in files))
    with _Fetchers(listing, meter) as fetchers:
        futures = [fetchers.start(file) for file in files]
        pending = set(futures)
        while pending:
            _, pending = wait(pending, timeout=_REPORT_EVERY_S, return_when=FIRST_EXCEPTION)
            for future in futures:
                if future.done():
                    future.result(timeout=0)
            if progress is not None:
                progress("download", meter.done_bytes, meter.total_bytes)
        return futures[0].result(timeout=0)


class _Stopped(Exception):
    """Raised inside a download that is no longer wanted."""


class _Meter:
    """Counts fetched bytes, file by file; each file is counted by the one thread that fetches it."""

    def __init__(self, total_bytes: int) -> None:
        self.total_bytes = total_bytes
        self.stop = threading.Event()
        self._done: dict[str, int] = {}

    @property
    def done_bytes(self) -> int:
        return min(sum(list(self._done.values())), self.total_bytes)

    def add(self, file: str, nbytes: int) -> None:
        if self.stop.is_set():
            raise _Stopped
        self._done[file] = self._done.get(file, 0) + nbytes

    def finish(self, file: str, nbytes: int) -> None:
        self._done[file] = nbytes

    def bar_class(self, file: str) -> type:
        """A class that the hub library takes for a progress bar, and that feeds this meter."""
        meter = self

        class Bar:
            def __init__(self, *, total: float | None = None, initial: int = 0, **_look: object) -> None:
                self.total = total
                meter.add(file, initial)

            def __enter__(self) -> Bar:
                return self

            def __exit__(
                self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
            ) -> None:
                """Nothing to close."""

            def update(self, nbytes: float | None = 1) -> None:
                meter.add(file, int(nbytes or 0))

            def update_transfer(self, nbytes: float | None = 1) -> None:
                """Bytes on the network; `update` counts those on disk."""

            def set_postfix_str(self, text: str, refresh: bool = True) -> None:
                """Only for the eye."""

            def set_transfer_postfix_str(self, text: str, refresh: bool = True) -> None:
                """Only for the eye."""

            def refresh(self) -> None:
                """Only for the eye."""

            def close(self) -> None:
                """Nothing to close."""

        return Bar


class _Fetchers:
    """A few threads that fetch files; leaving the block with an error stops them at their next chunk."""

    def __init__(self, listing: _Listing, meter: _Meter) -> None:
        self._listing = listing
        self._meter = meter
        self._futures: list[Future[Path]] = []
        self._pool = ThreadPoolExecutor(PARALLEL_FILES, thread_name_prefix="lamella-hub")

    def __enter__(self) -> _Fetchers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._meter.stop.set()
        self._pool.shutdown(wait=False, cancel_futures=True)
        running = wait(self._futures, timeout=2 * REQUEST_TIMEOUT_S, return_when=ALL_COMPLETED).not_done
        self._pool.shutdown(wait=not running)

    def start(self, file: str) -> Future[Path]:
        future = self._pool.submit(self._fetch, file)
        self._futures.append(future)
        return future

    def _fetch(self, file: str) -> Path:
        listing = self._listing
        try:
            path = hf_hub_download(
                listing.request.repository,
                file,
                revision=listing.commit,
                cache_dir=listing.cache,
                endpoint=listing.request.endpoint,
                token=listing.token or False,
                etag_timeout=REQUEST_TIMEOUT_S,
                tqdm_class=self._meter.bar_class(file),
            )
        except HUB_ERRORS as error:
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                raise _disk_full(listing, self._meter.total_bytes - self._meter.done_bytes) from error
            raise explain(error, listing.request) from error
        self._meter.finish(file, self._listing.sizes[file] or 0)
        return Path(path)
