"""The process that opens one pickled weight file and writes its tensors as safetensors; nothing else runs in it.

Run as a script, with a request as JSON on standard input and an answer as JSON on standard output; imports torch alone.
The pickle may name tensors only (``weights_only``), its data are mapped, memory and output are limited, and what needs
no pickle is forbidden: sockets, other programs, and files beside the one to be written. `pickled_checkpoint` starts it.
"""

from __future__ import annotations

import json
import os
import re
import resource
import sys
import zipfile
from pathlib import Path
from typing import TextIO

import torch

_MEMORY_BYTES = 1 << 30  # beside the file: what torch takes to work at all
_OUTPUT_FACTOR, _OUTPUT_BYTES = 4, 1 << 24  # tied tensors share their data in a pickle, and nothing is shared outside
_CHUNK_ELEMENTS = 1 << 22
_FORBIDDEN = (
    "socket.", "subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.spawn", "os.startfile",
    "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.chmod", "os.chown", "os.truncate",
    "os.kill", "os.putenv", "shutil.", "pty.", "ctypes.", "webbrowser.", "ftplib.", "smtplib.", "urllib.",
)  # fmt: skip
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Refused(Exception):
    """The file is not what it should be; the message is for the user."""


def main(asked: TextIO, answers: TextIO) -> int:
    """Do what the request on `asked` says: ``source``, ``target`` and ``dtypes`` (torch names to the format's)."""
    request = json.load(asked)
    source, target = Path(request["source"]), Path(request["target"])
    _limit(source.stat().st_size)
    _forbid(target)
    try:
        tensors = checked_tensors(_load(source), request["dtypes"])
        _write(target, tensors, request["dtypes"])
    except Refused as refused:
        answer = {"error": str(refused)}
    except (RuntimeError, MemoryError, OSError, ValueError, OverflowError) as error:
        answer = {"error": f"it cannot be converted within its limits ({type(error).__name__}: {_first_line(error)})"}
    else:
        answer = {"tensors": str(len(tensors))}
    json.dump(answer, answers)
    return 0


def _limit(file_bytes: int) -> None:
    """Memory for one such file and the work on it; output for its tensors."""
    in_use = int(Path("/proc/self/statm").read_text().split()[5]) * os.sysconf("SC_PAGE_SIZE") if _has_proc() else 0
    memory = in_use + 2 * file_bytes + _MEMORY_BYTES
    output = _OUTPUT_FACTOR * file_bytes + _OUTPUT_BYTES
    for kind, most in ((resource.RLIMIT_DATA, memory), (resource.RLIMIT_FSIZE, output), (resource.RLIMIT_CORE, 0)):
        _, hard = resource.getrlimit(kind)
        resource.setrlimit(kind, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def _has_proc() -> bool:
    return Path("/proc/self/statm").exists()


def _forbid(target: Path) -> None:
    """Make everything an error that reading tensors does not need; it cannot be undone within the process."""
    allowed = os.fspath(target)

    def guard(event: str, values: tuple[object, ...]) -> None:
        if event.startswith(_FORBIDDEN):
            raise PermissionError(f"{event} is not allowed while a pickle is read")
        if event == "open":
            path, mode, flags = values
            is_write = isinstance(flags, int) and bool(flags & _WRITING)
            if (is_write or (isinstance(mode, str) and set(mode) & set("wax+"))) and path != allowed:
                raise PermissionError(f"writing {path} is not allowed while a pickle is read")

    sys.addaudithook(guard)


def _load(source: Path) -> object:
    with source.open("rb") as file:
        is_archive = file.read(4) == b"PK\x03\x04"
    if is_archive:
        _check_stored(source)
    try:
        return torch.load(source, map_location="cpu", weights_only=True, mmap=is_archive or None)
    except MemoryError:
        raise
    except Exception as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        if named:
            raise Refused(
                f"it asks for {named[1]} to be called, which is no tensor: it may be malicious, and was not run"
            ) from error
        raise Refused(
            f"it is damaged or no pickle of tensors ({type(error).__name__}: {_first_line(error)})"
        ) from error


def _check_stored(source: Path) -> None:
    """Data that are mapped are taken as they lie in the archive, so they must not be compressed in it."""
    try:
        with zipfile.ZipFile(source) as archive:
            packed = [entry.filename for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED]
    except (zipfile.BadZipFile, ValueError) as error:
        raise Refused(f"it is damaged or no pickle of tensors ({error})") from error
    if packed:
        raise Refused(f"its archive is compressed ({packed[0][:80]}), which torch.save never does")


def checked_tensors(state: object, dtypes: dict[str, str]) -> dict[str, torch.Tensor]:
    """The tensors of `state` by name, if it holds nothing else.

    Raises:
        Refused: it does, or one of them is not what weights are.
    """
    if not isinstance(state, dict) or not state:
        raise Refused(f"it holds {type(state).__name__}, not a table of tensors by name")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise Refused(f"its entry {name!r} is {type(value).__name__}, not a tensor under a name")
        if value.layout is not torch.strided or value.device.type != "cpu" or _name(value) not in dtypes:
            raise Refused(f"its tensor {name!r} is {value.dtype}, {value.layout}, which weights are not")
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise Refused(f"its tensor {name!r} is larger than the data that it is made of")
    return {name: value.detach() for name, value in state.items()}


def _write(target: Path, tensors: dict[str, torch.Tensor], dtypes: dict[str, str]) -> None:
    entries: dict[str, object] = {}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.numel() * tensor.element_size()
        entries[name] = {"dtype": dtypes[_name(tensor)], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with target.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for tensor in tensors.values():
            flat = tensor.contiguous().reshape(-1)
            for first in range(0, flat.numel(), _CHUNK_ELEMENTS):
                part = flat[first : first + _CHUNK_ELEMENTS].contiguous().view(torch.uint8)
                file.write(memoryview(part.numpy()))  # type: ignore[arg-type] # numpy arrays are buffers
        file.flush()
        os.fsync(file.fileno())


def _name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]


if __name__ == "__main__":
    sys.exit(main(sys.stdin, sys.stdout))
