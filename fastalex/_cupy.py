"""The CUDA C++ kernels without nvcc: NVRTC compiles them at their first use, CuPy starts them on torch's stream.

What a kernel compiled to is kept in ``$FASTALEX_CACHE_DIR/cubin`` (by default ``~/.cache/fastalex/cubin``), a file a
kernel and architecture. A file begins with a line of JSON that says what follows and its digest; what does not fit, or
could have been written by somebody else, is ignored with a warning and compiled again.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import json
import os
import pathlib
import sysconfig
import warnings
from collections.abc import Sequence
from typing import Any

import torch

from fastalex import _cache, _cuda_native
from fastalex._cuda_native import Launch

VERSION = 1
_FOLDER = pathlib.Path(__file__).parent


@functools.cache
def missing() -> str | None:
    """What this machine lacks for CuPy to start a kernel, and what would mend it; None where nothing."""
    if importlib.util.find_spec("cupy") is None:
        major = (torch.version.cuda or "13").partition(".")[0]
        return f"CuPy is not installed: pip install fastalex[cuda{major}]"
    if (reason := _cuda_native.planner_error()) is not None:
        return reason
    if cuda_include() is None:
        return "NVRTC needs cuda_fp16.h: pip install nvidia-cuda-runtime, or set CUDA_HOME"
    return None


def kernel_folder() -> pathlib.Path:
    """Where the kernels' source is: package data, or ``csrc/cuda`` of a checkout."""
    packaged = _FOLDER / "cuda"
    return packaged if packaged.exists() else _FOLDER.parent / "csrc" / "cuda"


@functools.cache
def cuda_include() -> pathlib.Path | None:
    """The folder with cuda_fp16.h: of a toolkit, or of the wheel that torch depends on."""
    site = pathlib.Path(sysconfig.get_paths()["purelib"]) / "nvidia"
    folders = [pathlib.Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include"]
    folders += [site / name / "include" for name in ("cu13", "cu12", "cuda_runtime")]
    return next((f for f in folders if (f / "cuda_fp16.h").exists()), None)


def compile_kernels(
    expressions: Sequence[str], options: Sequence[str], binary: str
) -> tuple[bytes, dict[str, str]]:
    """(code, {kernel: its name in the code}) by NVRTC, which needs no GPU. ``binary`` is "cubin" or "ptx".

    Raises:
        RuntimeError: with the compiler's log.
    """
    from cupy.cuda import nvrtc

    program = nvrtc.createProgram('#include "kernels.cuh"\n', "kernels.cu", (), ())
    try:
        for expression in expressions:
            nvrtc.addNameExpression(program, expression)
        nvrtc.compileProgram(program, tuple(options))
        get = nvrtc.getCUBIN if binary == "cubin" else nvrtc.getPTX
        names = {one: str(nvrtc.getLoweredName(program, one)) for one in expressions}
        # CuPy cuts the last byte, as of a C string: it is a cubin's own, and a zero.
        return bytes(get(program)) + b"\0", names
    except nvrtc.NVRTCError as error:
        log = nvrtc.getProgramLog(program)
        what = ", ".join(expressions)
        raise RuntimeError(f"NVRTC cannot compile {what}: {error}\n{log}") from error
    finally:
        nvrtc.destroyProgram(program)


def options_for(capability: int) -> tuple[tuple[str, ...], str]:
    """(NVRTC's options, "cubin" or "ptx") for a GPU, such as 90; code it does not know runs as PTX of an older one."""
    from cupy.cuda import nvrtc

    known = [arch for arch in nvrtc.getSupportedArchs() if arch <= capability]
    best = max(known, default=80)
    own = best // 10 == capability // 10
    name = _cuda_native.wanted_code(*divmod(best, 10)) if best == capability else best
    code = f"--gpu-architecture={'sm' if own else 'compute'}_{name}"
    include = (f"-I{kernel_folder()}", f"-I{cuda_include()}")
    return (code, "-std=c++20", *include), "cubin" if own else "ptx"


# --- the disk ------------------------------------------------------------------------------------


def cache_folder() -> pathlib.Path:
    return _cache.folder() / "cubin"


@functools.cache
def _source_digest() -> str:
    digest = hashlib.sha256()
    for path in sorted(kernel_folder().glob("*.*")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def cache_key(expression: str, options: Sequence[str]) -> str:
    """What the code depends on: kernel, target, compiler, and the kernels' source."""
    from cupy.cuda import nvrtc

    wanted = [option for option in options if not option.startswith("-I")]
    return json.dumps([VERSION, expression, wanted, nvrtc.getVersion(), _source_digest()])


def cache_file(key: str) -> pathlib.Path:
    return cache_folder() / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.bin"


def load(key: str) -> tuple[bytes, str] | None:
    """(code, name) kept under the key; None where there is none, or it cannot be trusted."""
    path = cache_file(key)
    try:
        # What runs on the GPU with the user's data must be the user's own.
        first, _, code = _cache.read(path).partition(b"\n")
        head = json.loads(first)
        if head["key"] != key or hashlib.sha256(code).hexdigest() != head["sha256"]:
            raise ValueError("it is damaged")
        return code, str(head["name"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        warnings.warn(f"{path} is ignored: {error}; delete it to be rid of this", stacklevel=2)
        return None


def save(key: str, code: bytes, name: str) -> None:
    """Keeps code. A full disk costs no call."""
    path = cache_file(key)
    head = {"key": key, "name": name, "sha256": hashlib.sha256(code).hexdigest()}
    try:
        _cache.write(path, json.dumps(head).encode() + b"\n" + code)
    except OSError as error:
        warnings.warn(f"{path} could not be kept: {error}", stacklevel=2)


# --- the GPU -------------------------------------------------------------------------------------


@functools.cache
def _function(expression: str, device: int) -> int:
    """The kernel, loaded into the device's context; from disk after its first time on this machine."""
    from cupy.cuda import driver

    major, minor = torch.cuda.get_device_capability(device)
    options, binary = options_for(10 * major + minor)
    key = cache_key(expression, options)
    found = load(key)
    if found is None:
        code, names = compile_kernels([expression], options, binary)
        found = code, names[expression]
        save(key, *found)
    code, name = found
    function: int = driver.moduleGetFunction(driver.moduleLoadData(code), name)
    return function


def start(launch: Launch, device: int) -> None:
    """Starts a kernel on torch's current stream of the device; the plan is its one argument.

    Raises:
        RuntimeError: where it does not start, naming kernel, grid and reason.
    """
    from cupy.cuda import driver

    plan = ctypes.create_string_buffer(launch.plan, len(launch.plan))
    arguments = (ctypes.c_void_p * 1)(ctypes.addressof(plan))
    try:
        with torch.cuda.device(device):
            function = _function(launch.kernel, device)
            if launch.shared_bytes > 48 * 1024:  # more than the default must be asked for
                most = driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                driver.funcSetAttribute(function, most, launch.shared_bytes)
            stream = torch.cuda.current_stream(device).cuda_stream
            grid = (launch.blocks, 1, 1, launch.threads, 1, 1, launch.shared_bytes)
            driver.launchKernel(function, *grid, stream, ctypes.addressof(arguments), 0)
    except driver.CUDADriverError as error:
        raise RuntimeError(f"fastalex: {launch} did not start: {error}") from error


def run(op: str, args: Sequence[Any]) -> Any:
    """Runs an operator; its results are allocated, and its launches decided, by the same C++ as the CUDA library's."""
    device = args[0].device.index
    return _cuda_native.call(op, args, lambda launch: start(launch, device))
