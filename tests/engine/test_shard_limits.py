"""Building under hostile conditions, in processes of their own: killed, raced, out of disk, short of memory."""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from lamella_engine import ShardStore
from lamella_engine.errors import DiskFull, ModelNotFound
from tests import tiny_models
from tests.engine.shards import stored_weights

BUILD = """
import sys
from pathlib import Path
from lamella_engine import ShardStore
from lamella_engine.errors import DiskFull
store, source = ShardStore(Path(sys.argv[1])), Path(sys.argv[2])
"""


@contextmanager
def _python(code: str, *arguments: object, wrapper: tuple[str, ...] = ()) -> Iterator[subprocess.Popen[str]]:
    """A process that runs BUILD and `code`; killed at the end of the block."""
    command = [*wrapper, sys.executable, "-c", BUILD + code, *map(str, arguments)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        with process:
            yield process
    finally:
        process.kill()


def _output(code: str, *arguments: object, wrapper: tuple[str, ...] = ()) -> str:
    with _python(code, *arguments, wrapper=wrapper) as process:
        output, _ = process.communicate(timeout=90)
    assert process.returncode == 0, output
    return output


def test_a_killed_build_is_no_model_and_is_resumed(tiny_llama_dir: Path, tmp_path: Path) -> None:
    halt = """
def halt(phase, done, total):
    if done > 0.6 * total:
        print('halted', flush=True)
        sys.stdin.read()
store.ensure('tiny', source=source, progress=halt)
"""
    store = ShardStore(tmp_path)
    with _python(halt, tmp_path, tiny_llama_dir) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "halted\n"
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=40)
    finished = {path.name: path.stat().st_ino for path in tmp_path.glob("tiny/*/*.safetensors")}
    assert len(list(tmp_path.glob("tiny/*/*.part"))) == 1
    assert len(finished) >= 2
    assert store.list() == ()
    with pytest.raises(ModelNotFound):
        store.open("tiny")

    model = store.ensure("tiny", source=tiny_llama_dir)

    assert {path.name: path.stat().st_ino for path in model.directory.glob("*.safetensors")}.items() >= finished.items()
    assert not list(tmp_path.glob("tiny/*/*.part"))
    store.verify("tiny")
    reference = stored_weights(ShardStore(tmp_path / "other").ensure("tiny", source=tiny_llama_dir))
    resumed = stored_weights(model)
    assert all(torch.equal(resumed[name], value) for name, value in reference.items())


def test_two_processes_build_once_and_both_get_the_model(tiny_llama_dir: Path, tmp_path: Path) -> None:
    race = """
print('ready', flush=True)
sys.stdin.readline()
phases = set()
model = store.ensure('tiny', source=source, progress=lambda phase, done, total: phases.add(phase))
print('built' if 'build' in phases else 'waited', len(model.layers), flush=True)
"""
    phases = set()
    with _python(race, tmp_path, tiny_llama_dir) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "ready\n"
        assert other.stdin is not None
        other.stdin.write("go\n")
        other.stdin.flush()
        mine = ShardStore(tmp_path).ensure(
            "tiny", source=tiny_llama_dir, progress=lambda phase, done, total: phases.add(phase)
        )
        outcome = other.communicate(timeout=60)[0].strip()

    outcomes = sorted([outcome, f"{'built' if 'build' in phases else 'waited'} {len(mine.layers)}"])
    assert outcomes == ["built 4", "waited 4"]


def _sparse_checkpoint(directory: Path, data_bytes: int) -> Path:
    """A one-layer Llama of about `data_bytes` bytes, nearly all of them in a hole of the file."""
    source = tiny_models.save_family("llama", directory)
    hidden = 64
    width = data_bytes // (3 * 4 * hidden)
    config = json.loads((source / "config.json").read_text())
    config |= {"num_hidden_layers": 1, "intermediate_size": width}
    (source / "config.json").write_text(json.dumps(config))
    with (source / "model.safetensors").open("rb") as file:
        entries = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    header: dict[str, object] = {}
    offset = 0
    for name, entry in entries.items():
        if name == "__metadata__" or any(f"layers.{layer}." in name for layer in (1, 2, 3)):
            continue
        shape = [width if size == 96 else size for size in entry["shape"]]
        nbytes = 4 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    raw = json.dumps(header).encode()
    with (source / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(8 + len(raw) + offset)
    return source


def test_too_small_a_disk_is_told_with_both_figures_before_a_byte_is_written(tmp_path: Path) -> None:
    free_bytes = shutil.disk_usage(tmp_path).free
    source = _sparse_checkpoint(tmp_path / "huge", 2 * free_bytes)
    data_bytes = (source / "model.safetensors").stat().st_size

    with pytest.raises(DiskFull, match="Nothing was written") as caught:
        ShardStore(tmp_path / "store").ensure("huge", source=source)

    assert data_bytes <= caught.value.needed_bytes < data_bytes + 200_000
    assert abs(caught.value.free_bytes - free_bytes) < 0.2 * free_bytes
    assert f"{caught.value.needed_bytes:,}" in str(caught.value)
    assert f"{caught.value.free_bytes:,}" in str(caught.value)
    assert [path.name for path in (tmp_path / "store").iterdir()] == [".locks"]


def test_only_the_room_for_what_is_missing_is_asked_for(tiny_llama_dir: Path, tmp_path: Path) -> None:
    _needs_private_mounts()
    # The disk holds the model once, not one and a half times: a resumed build must count what it has.
    code = """
class Stop(BaseException): pass
def stop(phase, done, total):
    if done > 0.8 * total: raise Stop
try:
    store.ensure('tiny', source=source, progress=stop)
except Stop:
    pass
print(len(store.ensure('tiny', source=source).layers))
"""
    needed_kib = sum(path.stat().st_size for path in tiny_llama_dir.iterdir()) // 1024

    output = _output(code, tmp_path / "disk", tiny_llama_dir, wrapper=_small_disk(tmp_path / "disk", needed_kib + 250))

    assert output == "4\n"


def test_a_disk_that_fills_up_midway_is_told_and_finished_shards_are_kept(tiny_llama_dir: Path, tmp_path: Path) -> None:
    _needs_private_mounts()
    code = """
ballast = store.root / 'ballast'
store.ensure('old', source=source)
def fill(phase, done, total):
    if phase == 'build' and done > 0.4 * total and not ballast.exists():
        with ballast.open('wb', buffering=0) as file:
            try:
                while True: file.write(bytes(4096))
            except OSError:
                pass
try:
    store.ensure('new', source=source, progress=fill)
except DiskFull as error:
    figures = (error.needed_bytes, error.free_bytes)
    print([f'{figure:,}' in str(error) for figure in figures])
store.verify('old')
print(len(list(store.root.glob('new/*/*.safetensors'))) > 0, len(list(store.root.glob('new/*/*.part'))))
ballast.unlink()
print(len(store.ensure('new', source=source).layers))
"""

    output = _output(code, tmp_path / "disk", tiny_llama_dir, wrapper=_small_disk(tmp_path / "disk", 4096))

    assert output == "[True, True]\nTrue 0\n4\n"


def test_a_limit_on_file_size_is_told_like_a_full_disk(tiny_llama_dir: Path, tmp_path: Path) -> None:
    code = """
import resource
def limit(phase, done, total):
    if done > 0.4 * total:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, resource.RLIM_INFINITY))
try:
    store.ensure('tiny', source=source, progress=limit)
except DiskFull as error:
    print('full', error.needed_bytes > 8192)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(len(store.ensure('tiny', source=source).layers))
"""

    assert _output(code, tmp_path, tiny_llama_dir) == "full True\n4\n"


def _small_disk(directory: Path, size_kib: int) -> tuple[str, ...]:
    """Words before a command that give it a disk of `size_kib` at `directory`, which only it sees."""
    directory.mkdir()
    mount = f"mount -t tmpfs -o size={size_kib}k none '{directory}' && exec \"$@\""
    return ("unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount, "sh")


def _needs_private_mounts() -> None:
    probe = ("unshare", "--user", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "none", "/mnt")
    if not shutil.which("unshare") or subprocess.run(probe, capture_output=True, timeout=10, check=False).returncode:
        pytest.skip("private mounts are not permitted here")


MEASURE = """
def status(key):
    return next(int(line.split()[1]) * 1024 for line in open('/proc/self/status') if line.startswith(key))
store.ensure('warm', source=Path(sys.argv[3]))
open('/proc/self/clear_refs', 'w').write('5')
before = status('VmRSS')
model = store.ensure('large', source=source)
layer = max(shard.nbytes for shard in model.layers)
print((status('VmHWM') - before) / layer, model.size_bytes / layer)
"""
LARGE = {
    "llama": {
        "vocab_size": 128, "hidden_size": 768, "intermediate_size": 2560, "num_hidden_layers": 6,
        "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 256,
    },
    "mixtral": {
        "vocab_size": 128, "hidden_size": 512, "intermediate_size": 896, "num_hidden_layers": 6, "num_local_experts": 8,
        "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 256,
    },
}  # fmt: skip


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="peak memory is read from /proc")
# Fusing experts holds the parts beside the whole; what the allocator keeps of the layer before comes on top.
@pytest.mark.parametrize(("family", "bound"), [("llama", 2.0), ("mixtral", 2.75)])
def test_building_holds_a_few_layers_at_most(family: str, bound: float, tiny_llama_dir: Path, tmp_path: Path) -> None:
    shape: dict[str, object] = LARGE[family] | {"pad_token_id": 0}
    source = tiny_models.save_checkpoint(tmp_path / "large", family, shape)

    peak_layers, model_layers = map(float, _output(MEASURE, tmp_path / "store", source, tiny_llama_dir).split())

    assert peak_layers < bound
    assert model_layers > 4
