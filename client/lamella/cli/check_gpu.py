"""Doctor's look at the GPUs, and whether the installed torch can run on them.

Owns the rules that match a torch build with a driver and a compute capability. Asks nvidia-smi and a child process
that imports torch; the client itself never does.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from lamella.cli.finding import Finding, broken, good, note

QUERY = "index,name,memory.total,driver_version,compute_cap"
SMI_TIMEOUT_S = 20.0
TORCH_TIMEOUT_S = 180.0
LEAST_DRIVER = {11: (450, 80), 12: (525, 60), 13: (580, 65)}  # by CUDA major version, on Linux
_PROBE = (
    "import json, torch\n"
    "print(json.dumps({'version': torch.__version__, 'cuda': torch.version.cuda,"
    " 'available': torch.cuda.is_available(), 'archs': torch.cuda.get_arch_list()}))\n"
)


class Gpu(NamedTuple):
    """One GPU as nvidia-smi sees it; memory in MiB, capability such as (6, 1)."""

    number: int
    name: str
    memory_mib: int
    driver: str
    capability: tuple[int, int]


class TorchBuild(NamedTuple):
    """The installed torch; `cuda` is None for a build without CUDA, `archs` such as ``sm_75``."""

    version: str
    cuda: str | None
    is_available: bool
    archs: tuple[str, ...]


def check_gpus() -> list[Finding]:
    """Check GPUs, driver and torch."""
    program = shutil.which("nvidia-smi")
    if program is None:
        if Path("/dev/nvidia0").exists():
            return [
                broken("gpu: a device is there, but nvidia-smi is not", "install the NVIDIA driver's tools"),
                *_cpu(),
            ]
        return [good("gpu: none (no nvidia-smi); workers run on the CPU"), *_cpu()]
    command = [program, f"--query-gpu={QUERY}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=SMI_TIMEOUT_S, check=False)
    except (subprocess.TimeoutExpired, OSError) as error:
        return [broken(f"gpu: nvidia-smi does not answer ({type(error).__name__})", "reboot, or reinstall the driver")]
    if answer.returncode != 0:
        said = (answer.stdout.strip() or answer.stderr.strip() or "no message").splitlines()[0]
        return [broken(f"gpu: nvidia-smi fails: {said}", "load or reinstall the NVIDIA driver, then run this again")]
    gpus, unread = parse_gpus(answer.stdout)
    findings = [note(f"gpu: nvidia-smi says {line!r}, which is not understood", "update the driver") for line in unread]
    if not gpus:
        return [*findings, good("gpu: none; workers run on the CPU"), *_cpu()]
    torch = _torch_build()
    if isinstance(torch, Finding):
        return [*findings, *(good(_described(gpu)) for gpu in gpus), torch]
    return [*findings, *(finding for gpu in gpus for finding in judge_gpu(gpu, torch))]


def parse_gpus(text: str) -> tuple[list[Gpu], list[str]]:
    """Read nvidia-smi's answer; return the GPUs and the lines that are not understood."""
    gpus, unread = [], []
    for fields in csv.reader(text.splitlines(), skipinitialspace=True):
        try:
            number, name, memory, driver, capability = fields
            major, _, minor = capability.partition(".")
            gpus.append(Gpu(int(number), name, int(float(memory)), driver, (int(major), int(minor))))
        except ValueError:
            if fields:
                unread.append(", ".join(fields))
    return gpus, unread


def judge_gpu(gpu: Gpu, torch: TorchBuild) -> list[Finding]:
    """Say whether this torch runs on this GPU, and what to do if not."""
    what = f"{_described(gpu)}: "
    if torch.cuda is None:
        return [broken(f"{what}torch {torch.version} is a build without CUDA", f"install {fitting_torch(gpu)}")]
    cuda_major = int(torch.cuda.split(".")[0])
    least = LEAST_DRIVER.get(cuda_major)
    driver = tuple(int(part) for part in gpu.driver.split(".")[:2] if part.isdecimal())
    if least is not None and driver < least:
        return [
            broken(
                f"{what}torch {torch.version} (CUDA {torch.cuda}) needs driver {least[0]}.{least[1]} or newer",
                f"update the driver, or install {fitting_torch(gpu)}",
            )
        ]
    if torch.archs and not any(runs_on(arch, gpu.capability) for arch in torch.archs):
        return [
            broken(
                f"{what}torch {torch.version} (CUDA {torch.cuda}) only has code for {' '.join(torch.archs)}",
                f"install {fitting_torch(gpu)}",
            )
        ]
    if not torch.is_available:
        return [
            broken(
                f"{what}torch {torch.version} should run on it but finds no GPU",
                "check CUDA_VISIBLE_DEVICES, the rights on /dev/nvidia*, and in a container its GPU access",
            )
        ]
    findings = [good(f"{what}torch {torch.version} (CUDA {torch.cuda}) runs on it")]
    if gpu.capability < (8, 0):
        findings.append(
            note(f"gpu {gpu.number}: has no bfloat16 units", "serve with dtype float16, or float32 if it overflows")
        )
    return findings


def runs_on(arch: str, capability: tuple[int, int]) -> bool:
    """True if code built for `arch` (``sm_61``, ``compute_90``) runs on a GPU of this capability."""
    kind, _, number = arch.partition("_")
    digits = "".join(char for char in number if char.isdigit())
    if len(digits) < 2:
        return False
    built = (int(digits[:-1]), int(digits[-1]))
    if number != digits:  # sm_90a and the like run on that very capability only
        return built == capability
    if kind == "compute":
        return built <= capability
    return built[0] == capability[0] and built[1] <= capability[1]


def fitting_torch(gpu: Gpu) -> str:
    """Return which torch to install for a GPU."""
    if gpu.capability < (6, 0):
        return "another GPU: cards below compute capability 6.0 are not supported by torch 2.6 and newer"
    if gpu.capability < (7, 5):
        return "torch 2.14 or older with CUDA 12.6, the last that carries code for this generation"
    return "a current torch with CUDA"


def _torch_build() -> TorchBuild | Finding:
    if importlib.util.find_spec("torch") is None:
        return note("torch: not installed, so no worker can run here", 'run `pip install "lamella[worker]"`')
    command = [sys.executable, "-c", _PROBE]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=TORCH_TIMEOUT_S, check=False)
        fields = json.loads(answer.stdout.splitlines()[-1])
        return TorchBuild(fields["version"], fields["cuda"], fields["available"], tuple(fields["archs"]))
    except subprocess.TimeoutExpired:
        return broken(
            f"torch: importing it takes more than {TORCH_TIMEOUT_S:g} s", "check the disk and the installation"
        )
    except (OSError, ValueError, IndexError, KeyError):
        last = (answer.stderr.strip() or "no message").splitlines()[-1]
        return broken(f"torch: importing it fails: {last}", 'reinstall it with `pip install "lamella[worker]"`')


def _cpu() -> list[Finding]:
    torch = _torch_build()
    return [torch] if isinstance(torch, Finding) else [good(f"torch: {torch.version} imports")]


def _described(gpu: Gpu) -> str:
    capability = f"{gpu.capability[0]}.{gpu.capability[1]}"
    return f"gpu {gpu.number}: {gpu.name}, {gpu.memory_mib} MiB, driver {gpu.driver}, compute capability {capability}"
