"""Names of the tensors in a safetensors file on the hub, from its header alone: its weights stay where they are.

Neighbours: `hub` asks for them where names of files do not tell which belong together; `safetensors_header` knows the
format.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath

from huggingface_hub import get_session, hf_raise_for_status

from lamella_engine.safetensors_header import LENGTH_BYTES, header_length, names_in_header

_FIRST_BYTES = 1 << 17  # holds the whole header of all but the largest models' files
_FAILED = 400


def fetch_tensor_names(url: str, file: PurePath, token: str | None, timeout_s: float) -> frozenset[str]:
    """Names of the tensors in one file.

    Args:
        url: where the hub has it.
        file: repository and name, for errors.
        token: access token; None for none.
        timeout_s: without a byte.

    Raises:
        CheckpointError: it is no safetensors file.
        Exception: one of `hub_errors.HUB_ERRORS`, if the hub does not give it.
    """
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    begin = _read(url, _FIRST_BYTES, headers, timeout_s)
    end = LENGTH_BYTES + header_length(file, begin[:LENGTH_BYTES])
    if end > len(begin):
        begin = _read(url, end, headers, timeout_s)
    return names_in_header(file, begin[LENGTH_BYTES:end], end - LENGTH_BYTES)


def _read(url: str, count: int, headers: Mapping[str, str], timeout_s: float) -> bytes:
    """The first `count` bytes, or all there are; no more is taken from a server that ignores ranges."""
    wanted = {**headers, "Range": f"bytes=0-{count - 1}", "Accept-Encoding": "identity"}
    found = bytearray()
    with get_session().stream("GET", url, headers=wanted, timeout=timeout_s) as response:
        if response.status_code >= _FAILED:
            response.read()  # the error's words
        hf_raise_for_status(response)
        for block in response.iter_bytes():
            found += block
            if len(found) >= count:
                break
    return bytes(found[:count])
