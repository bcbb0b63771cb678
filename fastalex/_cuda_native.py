"""The CUDA C++ kernels' two libraries: one starts them itself, the other says what to start.

``_cuda`` is built by nvcc and launches. ``_cuda_plan`` is the same launchers built by any C++ compiler: each launch
goes to a function here, which records it (:func:`planned`) or gives it to CuPy (:mod:`fastalex._cupy`).
"""

from __future__ import annotations

import ctypes
import functools
import pathlib
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from fastalex import _native

#: What the kernels are written for: asynchronous copies and bfloat16 tensor cores.
OLDEST = (8, 0)
#: The one capability that has wgmma, and its architecture's name: code for it runs nowhere else.
HOPPER, HOPPER_CODE = (9, 0), "90a"


@functools.cache
def library_error() -> str | None:
    """Why the library that nvcc builds cannot serve, or None. Loads it at the first call."""
    return _native.load(
        "_cuda",
        "CUDA library",
        "install the CUDA toolkit (nvcc), then reinstall: FASTALEX_BUILD=cuda",
    )


def library() -> Any:
    """The operators of that library."""
    return torch.ops.fastalex_cuda


@functools.cache
def planner_error() -> str | None:
    """The same of the library that plans."""
    reason = _native.load(
        "_cuda_plan",
        "CUDA launch planner",
        "install a C++20 compiler, then reinstall: FASTALEX_BUILD=cpu",
    )
    if reason is None:
        (path,) = pathlib.Path(__file__).parent.glob("_cuda_plan.*so")
        ctypes.CDLL(str(path)).fastalex_hand_launches_to(_receiving)
    return reason


@functools.cache
def gpu_error(device: int) -> str | None:
    """Why no kernel can run on this GPU, or None."""
    if not torch.cuda.is_available():
        return "no NVIDIA driver answers here: install one, and a CUDA build of torch"
    have = torch.cuda.get_device_capability(device)
    if have >= OLDEST:
        return None
    return (
        f"this GPU has compute capability {have[0]}.{have[1]}, and the kernels need "
        f"{OLDEST[0]}.{OLDEST[1]} (Ampere) or newer: use backend triton or torch"
    )


@functools.cache
def architecture_error(device: int) -> str | None:
    """Why the code in the library does not run on this GPU, or None."""
    built = str(library().architectures())
    major, minor = torch.cuda.get_device_capability(device)
    for name in built.split(","):
        code = name.removesuffix("+PTX")
        number = int(code.removesuffix("a"))
        if code.endswith("a"):
            if number == 10 * major + minor:
                return None  # such code, and its PTX, runs on one capability alone
        elif number // 10 == major and number % 10 <= minor:
            return None  # machine code runs on later minors of its major
        elif name.endswith("+PTX") and number <= 10 * major + minor:
            return None
    return (
        f"the CUDA library was built for {built} and this GPU is {major}{minor}: reinstall with "
        f"FASTALEX_CUDA_ARCH={wanted_code(major, minor)}"
    )


def wanted_code(major: int, minor: int) -> str:
    """The architecture to build for: all instructions of a Hopper have a name of their own."""
    return HOPPER_CODE if (major, minor) == HOPPER else f"{major}{minor}"


@functools.cache
def wgmma_error(device: int) -> str | None:
    """Why this GPU has no wgmma, or None."""
    have = torch.cuda.get_device_capability(device)
    if have == HOPPER:
        return None
    return f"this GPU has compute capability {have[0]}.{have[1]}, and wgmma is that of 9.0 (Hopper)"


@functools.cache
def wgmma_library_error() -> str | None:
    """Why the library that nvcc builds has no wgmma, or None."""
    built = str(library().architectures())
    if HOPPER_CODE in re.split(r"[,+]", built):
        return None
    return (
        f"the CUDA library was built for {built}: reinstall with FASTALEX_CUDA_ARCH={HOPPER_CODE}"
    )


@dataclass(frozen=True)
class Instruction:
    """What multiplies 16-bit values on tensor cores: mma.sync, or wgmma, which is Hopper's alone."""

    wgmma: bool

    def __str__(self) -> str:
        return "wgmma" if self.wgmma else "mma.sync"


@dataclass(frozen=True)
class Launch:
    """A kernel as a C++ expression, the grid, and the bytes of its one argument, the plan."""

    kernel: str
    blocks: int
    threads: int
    shared_bytes: int
    plan: bytes

    def __str__(self) -> str:
        kernel = self.kernel.replace("fastalex::", "")
        shared = f", {self.shared_bytes / 1024:.0f} KB" if self.shared_bytes else ""
        return f"{kernel} ({self.blocks} x {self.threads}{shared})"


class _Planned(ctypes.Structure):
    """csrc/cuda/planner/host_launch.h."""

    _fields_ = (
        ("kernel", ctypes.c_char_p),
        ("blocks", ctypes.c_longlong),
        ("threads", ctypes.c_int),
        ("shared_bytes", ctypes.c_int),
        ("plan_bytes", ctypes.c_longlong),
        ("plan", ctypes.c_void_p),
    )


class _Receiver(threading.local):
    start: Callable[[Launch], None] | None = None
    error: BaseException | None = None


_receiver = _Receiver()


def _receive(pointer: Any) -> int:
    """Called by the planner for each launch; an exception waits for :func:`call` to raise it."""
    try:
        assert _receiver.start is not None, "a planned launch that nobody asked for"
        one = pointer.contents
        plan = ctypes.string_at(one.plan, one.plan_bytes)
        _receiver.start(
            Launch(one.kernel.decode(), one.blocks, one.threads, one.shared_bytes, plan)
        )
    except BaseException as error:
        _receiver.error = error
        return 1
    return 0


_receiving = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(_Planned))(_receive)


def call(op: str, args: Sequence[Any], start: Callable[[Launch], None]) -> Any:
    """Runs an operator of the planner, giving each of its launches to ``start`` while its tensors are alive."""
    if (reason := planner_error()) is not None:
        raise RuntimeError(reason)
    before, _receiver.start, _receiver.error = _receiver.start, start, None
    try:
        return getattr(torch.ops.fastalex_cuda_plan, op).default(*args)
    except RuntimeError as planners:
        error, _receiver.error = _receiver.error, None
        if error is not None:
            raise error from planners  # whose words name the operator and its tensors' shapes
        raise
    finally:
        _receiver.start = before


def planned(op: str, args: Sequence[Any]) -> list[Launch]:
    """What an operator would launch on these tensors, fake ones too: nothing runs."""
    launches: list[Launch] = []
    with _disable_current_modes(), torch.no_grad():
        call(op, [_shadow(value) for value in args], launches.append)
    return launches


def _shadow(value: Any) -> Any:
    """A tensor's shape, strides and dtype without its memory."""
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
