"""Compiles CUDA source at run time with the NVRTC that torch brings along, and starts what comes out.

Owns the two C libraries (NVRTC and the driver) and everything said to them. Needs no toolkit, no compiler and no header
on the machine. Launches go to torch's current stream, wait for nothing and allocate nothing, so they can be recorded in
a graph. Neighbour: `kernels` knows what is compiled.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import glob
import os
import sys
from collections.abc import Iterator, Mapping

import torch

Argument = torch.Tensor | int
"""A tensor travels as its address, a number as 32 bits."""


class KernelError(RuntimeError):
    """A kernel cannot be compiled, loaded or started here; the message says why."""


class Kernel:
    """A function on one device."""

    def __init__(self, function: ctypes.c_void_p, num_arguments: int) -> None:
        self._function = function
        self._num_arguments = num_arguments

    def launch(self, blocks: int, threads: int, arguments: list[Argument], device: torch.device) -> None:
        """Start `blocks` blocks of `threads` threads on the current stream of `device`.

        Raises:
            KernelError: the driver refuses.
        """
        assert len(arguments) == self._num_arguments
        held = [
            ctypes.c_void_p(value.data_ptr()) if isinstance(value, torch.Tensor) else ctypes.c_uint32(value)
            for value in arguments
        ]
        addresses = (ctypes.c_void_p * len(held))(*(ctypes.addressof(value) for value in held))
        stream = ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream)
        with _current(device):
            code = _driver().cuLaunchKernel(
                self._function, ctypes.c_uint(blocks), 1, 1, ctypes.c_uint(threads), 1, 1, 0, stream, addresses, None
            )
        _check_driver(code, "start a kernel")


def compile_kernels(
    source: str, signatures: Mapping[str, int], defines: Mapping[str, str], device: torch.device
) -> dict[str, Kernel]:
    """Compile `source` for `device` and load its functions.

    Args:
        source: CUDA C++ that includes nothing; functions are ``extern "C"``.
        signatures: of each function wanted, the number of its arguments.
        defines: macros.
        device: a CUDA device; what is loaded stays until the process ends.

    Raises:
        KernelError: there is no NVRTC, or it does not take the source, or the driver does not take the result.
    """
    major, minor = torch.cuda.get_device_capability(device)
    image = compile_image(source, 10 * major + minor, defines)
    module = ctypes.c_void_p()
    with _current(device):
        _check_driver(_driver().cuModuleLoadData(ctypes.byref(module), image), "load a compiled kernel")
        kernels = {}
        for name, num_arguments in signatures.items():
            function = ctypes.c_void_p()
            code = _driver().cuModuleGetFunction(ctypes.byref(function), module, name.encode())
            _check_driver(code, f"find the kernel {name}")
            kernels[name] = Kernel(function, num_arguments)
    return kernels


def compile_image(source: str, capability: int, defines: Mapping[str, str]) -> bytes:
    """Machine code for a compute capability (86 is 8.6); code for the driver to translate if NVRTC is older than that.

    Raises:
        KernelError: there is no NVRTC, or it does not take the source.
    """
    library = find_library()
    known = _known_capabilities(library)
    usable = [number for number in known if number <= capability]
    if not usable:
        raise KernelError(f"this NVRTC knows compute capabilities {known}, not {capability}")
    is_exact = capability in known
    target = f"sm_{capability}" if is_exact else f"compute_{max(usable)}"
    options = [f"--gpu-architecture={target}", "--std=c++17", *(f"-D{name}={value}" for name, value in defines.items())]
    program = ctypes.c_void_p()
    code = library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"lamella.cu", 0, None, None)
    _check_nvrtc(library, code, "take the source")
    try:
        listed = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        if library.nvrtcCompileProgram(program, len(options), listed):
            raise KernelError(f"NVRTC does not compile the kernels for {target}: {_program_log(library, program)}")
        return _read(library, program, "CUBIN" if is_exact else "PTX")
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


@functools.cache
def find_library() -> ctypes.CDLL:
    """NVRTC of the CUDA version that torch was built with.

    Raises:
        KernelError: torch has no CUDA, or the library is nowhere.
    """
    version = torch.version.cuda
    if version is None:
        raise KernelError("this torch was built without CUDA")
    return load_library(version.partition(".")[0])


def load_library(major: str) -> ctypes.CDLL:
    """NVRTC of one major version of CUDA: as the system finds it, or from the packages that torch depends on.

    Raises:
        KernelError: it is nowhere.
    """
    soname = f"nvrtc64_{major}0_0.dll" if sys.platform == "win32" else f"libnvrtc.so.{major}"
    for path in (soname, *_packaged(soname)):
        with contextlib.suppress(OSError):
            return ctypes.CDLL(path)
    raise KernelError(f"{soname} is neither on the library path nor among the installed packages")


def _packaged(soname: str) -> Iterator[str]:
    for root in sys.path:
        for pattern in (f"nvidia/*/lib/{soname}", f"nvidia/*/bin/{soname}", f"torch/lib/{soname}"):
            yield from sorted(glob.glob(os.path.join(root, pattern)))


def _known_capabilities(library: ctypes.CDLL) -> list[int]:
    count = ctypes.c_int()
    _check_nvrtc(library, library.nvrtcGetNumSupportedArchs(ctypes.byref(count)), "count its targets")
    listed = (ctypes.c_int * count.value)()
    _check_nvrtc(library, library.nvrtcGetSupportedArchs(listed), "list its targets")
    return sorted(listed)


def _read(library: ctypes.CDLL, program: ctypes.c_void_p, kind: str) -> bytes:
    size = ctypes.c_size_t()
    _check_nvrtc(library, getattr(library, f"nvrtcGet{kind}Size")(program, ctypes.byref(size)), "tell a size")
    image = ctypes.create_string_buffer(size.value)
    _check_nvrtc(library, getattr(library, f"nvrtcGet{kind}")(program, image), "hand its result over")
    return image.raw


def _program_log(library: ctypes.CDLL, program: ctypes.c_void_p) -> str:
    size = ctypes.c_size_t()
    library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    text = ctypes.create_string_buffer(max(1, size.value))
    library.nvrtcGetProgramLog(program, text)
    return text.value.decode(errors="replace")


def _check_nvrtc(library: ctypes.CDLL, code: int, action: str) -> None:
    if code:
        library.nvrtcGetErrorString.restype = ctypes.c_char_p
        raise KernelError(f"NVRTC cannot {action}: {library.nvrtcGetErrorString(code).decode()}")


@functools.cache
def _driver() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError as error:
        raise KernelError(f"the CUDA driver cannot be loaded: {error}") from error


def _check_driver(code: int, action: str) -> None:
    if code:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(code, ctypes.byref(text))
        raise KernelError(f"the CUDA driver cannot {action}: {(text.value or b'error %d' % code).decode()}")


@functools.cache
def _primary_context(index: int) -> ctypes.c_void_p:
    """The context of a device that torch uses as well, held until the process ends.

    Without that it would be gone again where torch has not begun to use the device yet.
    """
    context = ctypes.c_void_p()
    _check_driver(_driver().cuDevicePrimaryCtxRetain(ctypes.byref(context), index), "take the context")
    return context


@contextlib.contextmanager
def _current(device: torch.device) -> Iterator[None]:
    """Have torch's context of `device` current in this thread; a thread that never used CUDA has none."""
    with torch.cuda.device(device):
        context = ctypes.c_void_p()
        _check_driver(_driver().cuCtxGetCurrent(ctypes.byref(context)), "tell the current context")
        if not context.value:
            index = device.index if device.index is not None else torch.cuda.current_device()
            _check_driver(_driver().cuCtxSetCurrent(_primary_context(index)), "enter the context")
        yield
