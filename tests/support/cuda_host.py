"""Builds csrc/cuda with g++ against the host runtime and calls the operators through ctypes."""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
KERNELS = Path(os.environ.get("FASTALEX_CUDA_KERNELS", ROOT / "csrc" / "cuda"))
RUNTIME = ROOT / "tests" / "support" / "host_cuda"
BUILD = ROOT / "build" / "host_cuda"

FLAGS = ["-std=c++20", "-O1", "-g", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off"]
FLAGS += ["-Wall", "-Wextra", "-Wno-unknown-pragmas"]
VARIANTS: dict[str, list[str]] = {
    "plain": [],
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-fsanitize=thread"],
    "trace": ["-fsanitize=thread", "-DHOST_CUDA_TRACE"],
}
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
SCHEDULES = {"forward": 0, "backward": 1, "random": 2, "greedy": 3, "greedy_backward": 4}


def cuda_include() -> Path | None:
    """The folder with cuda_fp16.h: a toolkit's, or that of the wheel torch depends on."""
    site = Path(sysconfig.get_paths()["purelib"])
    nvcc = shutil.which("nvcc")
    folders = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include"]
    folders += [Path(nvcc).resolve().parents[1] / "include"] if nvcc else []
    folders += [site / "nvidia" / name / "include" for name in ("cu13", "cu12", "cuda_runtime")]
    return next((f for f in folders if (f / "cuda_fp16.h").exists()), None)


def unavailable() -> str | None:
    """Why the host runtime cannot be built here, or None."""
    if not shutil.which("g++"):
        return "no g++"
    if os.uname().machine != "x86_64":
        return "the fiber switch is written for x86-64"
    if cuda_include() is None:
        return "no cuda_fp16.h: install a CUDA toolkit or nvidia-cuda-runtime"
    return None


def _included(source: Path, folders: tuple[Path, ...], seen: set[Path]) -> set[Path]:
    """The source and every header of ours that it includes."""
    if source in seen:
        return seen
    seen.add(source)
    for name in re.findall(r'#include "(.+)"', source.read_text()):
        found = next((f / name for f in folders if (f / name).exists()), None)
        if found:
            _included(found, folders, seen)
    return seen


def fingerprint(flags: list[str], source: Path, folders: tuple[Path, ...]) -> str:
    """Of everything an object depends on, so that a change rebuilds only what it touches."""
    digest = hashlib.sha256(" ".join(flags).encode())
    files = _included(source, folders, {RUNTIME / "host_cuda.h", RUNTIME / "fibers.h"})
    for path in sorted(files, key=lambda p: p.name):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _fused_multiply_add() -> list[str]:
    """fmaf as one instruction where this CPU has it; without, libm computes the same, slowly."""
    info = Path("/proc/cpuinfo")
    flags = info.read_text() if info.exists() else ""
    return ["-mfma", "-mf16c"] if " fma " in flags and " f16c " in flags else []


def build(variant: str = "plain", kernels: Path | None = None) -> Path:
    """The library of one variant; objects are rebuilt only when what they include changed."""
    kernels = kernels or KERNELS
    flags = FLAGS + VARIANTS[variant] + _fused_multiply_add()
    link = [f for f in flags if not (variant == "trace" and f == "-fsanitize=thread")]
    objects = BUILD / "objects"
    objects.mkdir(parents=True, exist_ok=True)
    include = [f"-I{RUNTIME}", f"-I{kernels}", f"-I{cuda_include()}"]

    def compile_one(source: Path) -> Path:
        # The tracer must not trace itself.
        chosen = link if source.parent == RUNTIME else flags
        name = f"{source.stem}-{fingerprint(chosen, source, (RUNTIME, kernels))}"
        target = objects / f"{name}.o"
        if target.exists():
            return target
        partial = objects / f"{name}.{os.getpid()}.o"
        forced = ["-x", "c++", "-include", str(RUNTIME / "host_cuda.h")]
        command = ["g++", *chosen, *include, *forced, "-c", str(source), "-o", str(partial)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
        return partial.rename(target)

    listed = [*sorted(kernels.glob("*.cu")), *sorted(RUNTIME.glob("*.cpp"))]
    with ThreadPoolExecutor(2) as pool:
        built = [str(o) for o in pool.map(compile_one, listed)]
    digest = hashlib.sha256(" ".join([*link, *built]).encode()).hexdigest()[:16]
    library = BUILD / f"libhost_cuda-{variant}-{digest}.so"
    if not library.exists():
        partial = BUILD / f"partial-{os.getpid()}.so"
        subprocess.run(["g++", *link, "-shared", *built, "-o", str(partial)], check=True)
        partial.rename(library)
    return library


class View(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("size", ctypes.c_longlong * 4),
        ("stride", ctypes.c_longlong * 4),
    ]

    @staticmethod
    def of(tensor: torch.Tensor) -> View:
        assert tensor.dim() == 4
        return View(tensor.data_ptr(), tuple(tensor.shape), tuple(tensor.stride()))


class LrnParams(ctypes.Structure):
    _fields_ = [
        ("size", ctypes.c_int),
        ("scale", ctypes.c_float),
        ("beta", ctypes.c_float),
        ("k", ctypes.c_float),
        ("groups", ctypes.c_int),
    ]


class PoolParams(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int * 2) for name in ("kernel_size", "stride", "padding", "dilation")
    ]


class Offsets(ctypes.Structure):
    _fields_ = [("view", View), ("wide", ctypes.c_bool)]


class ConvParams(ctypes.Structure):
    _fields_ = [
        *[(name, ctypes.c_int * 2) for name in ("stride", "padding", "dilation")],
        ("groups", ctypes.c_int),
        ("tf32", ctypes.c_bool),
    ]


class ConvGradients(ctypes.Structure):
    _fields_ = [("input", View), ("weight", View), ("bias", ctypes.c_void_p)]


@dataclass
class Launch:
    kernel: str
    blocks: int
    threads: int
    shared_bytes: int
    plan: bytes


class HostCuda:
    """The operators on the host runtime, with the signatures of fastalex's schemas."""

    def __init__(self, library: Path) -> None:
        self.path = library
        self.lib = ctypes.CDLL(str(library))
        for name in ("host_cuda_launches", "host_cuda_trace_end"):
            getattr(self.lib, name).restype = ctypes.c_char_p
        for name in ("host_conv_relu_workspace", "host_conv_relu_backward_workspace"):
            getattr(self.lib, name).restype = ctypes.c_longlong
        self.lib.host_lrn_max_pool_is_fused.restype = ctypes.c_bool
        self.tf32 = False

    def schedule(self, kind: str, seed: int = 1) -> None:
        self.lib.host_cuda_schedule(SCHEDULES[kind], ctypes.c_uint(seed))

    def launches(self) -> list[Launch]:
        """What was launched since the last call."""
        rows = [line.split("\t") for line in self.lib.host_cuda_launches().decode().splitlines()]
        return [Launch(r[0], int(r[1]), int(r[2]), int(r[3]), bytes.fromhex(r[4])) for r in rows]

    def call(self, name: str, dtype: torch.dtype, *arguments) -> None:
        function = getattr(self.lib, name)
        function.restype = ctypes.c_char_p
        error = function(DTYPES[dtype], *map(_by_reference, arguments))
        if error:
            raise RuntimeError(error.decode())

    def lrn(self, input, size, scale, beta, k, groups):
        x, out = _as_4d(input), poisoned_like(_as_4d(input))
        params = LrnParams(size, scale, beta, k, groups)
        self.call("host_lrn", x.dtype, View.of(x), View.of(out), params)
        return out.view(input.shape)

    def lrn_backward(self, grad, input, size, scale, beta, k, groups):
        x, g = _as_4d(input), _as_4d(grad)
        out = poisoned_like(x)
        params = LrnParams(size, scale, beta, k, groups)
        self.call("host_lrn_backward", x.dtype, View.of(g), View.of(x), View.of(out), params)
        return out.view(input.shape)

    def max_pool(self, input, kernel_size, stride, padding, dilation, ceil_mode, save_offsets):
        out, offsets, where = _pool_outputs(
            input, kernel_size, stride, padding, dilation, ceil_mode, save_offsets
        )
        params = _pool_params(kernel_size, stride, padding, dilation)
        self.call("host_max_pool", input.dtype, View.of(input), View.of(out), where, params)
        return out, offsets

    def max_pool_backward(self, grad, offsets, input_size, kernel_size, stride, padding, dilation):
        shape = (*grad.shape[:2], *input_size)
        out = poisoned(shape, grad.dtype, _format_of(grad))
        where = Offsets(View.of(offsets), offsets.dtype == torch.int32)
        params = _pool_params(kernel_size, stride, padding, dilation)
        self.call("host_max_pool_backward", grad.dtype, View.of(grad), where, View.of(out), params)
        return out

    def lrn_max_pool(
        self, input, size, scale, beta, k, groups, kernel_size, stride, padding, ceil_mode,
        save_offsets,
    ):  # fmt: skip
        out, offsets, where = _pool_outputs(
            input, kernel_size, stride, padding, (1, 1), ceil_mode, save_offsets
        )
        pool = _pool_params(kernel_size, stride, padding, (1, 1))
        fused = self.lib.host_lrn_max_pool_is_fused(
            DTYPES[input.dtype], *map(ctypes.byref, (View.of(input), View.of(out), pool))
        )
        if not fused:
            middle = self.lrn(input, size, scale, beta, k, groups)
            return self.max_pool(
                middle, kernel_size, stride, padding, (1, 1), ceil_mode, save_offsets
            )
        params = LrnParams(size, scale, beta, k, groups)
        self.call(
            "host_lrn_max_pool", input.dtype, View.of(input), View.of(out), where, params, pool
        )
        return out, offsets

    def lrn_max_pool_backward(
        self, grad, input, offsets, size, scale, beta, k, groups, kernel_size, stride, padding
    ):
        out = poisoned_like(input)
        where = Offsets(View.of(offsets), offsets.dtype == torch.int32)
        params = LrnParams(size, scale, beta, k, groups)
        pool = _pool_params(kernel_size, stride, padding, (1, 1))
        views = (View.of(grad), View.of(input), where, View.of(out))
        self.call("host_lrn_max_pool_backward", input.dtype, *views, params, pool)
        return out

    def conv_relu(self, input, weight, bias, stride, padding, dilation, groups):
        sides = [
            pool_size(*numbers, False)
            for numbers in zip(
                input.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True
            )
        ]
        out = poisoned((input.shape[0], weight.shape[0], *sides), input.dtype, _format_of(input))
        params = self._conv_params(stride, padding, dilation, groups)
        views = (View.of(input), View.of(weight), View.of(out))
        workspace = self._workspace("host_conv_relu_workspace", input.dtype, *views, params)
        self.call(
            "host_conv_relu", input.dtype, *views[:2], _pointer(bias), views[2], params,
            _pointer(workspace),
        )  # fmt: skip
        return out

    def conv_relu_backward(
        self, grad, output, input, weight, stride, padding, dilation, groups, output_mask
    ):
        made = [
            poisoned_like(input) if output_mask[0] else None,
            poisoned_like(weight) if output_mask[1] else None,
            poisoned((weight.shape[0],), input.dtype) if output_mask[2] else None,
        ]
        views = [View.of(t) if t is not None else View() for t in made[:2]]
        wanted = ConvGradients(*views, made[2].data_ptr() if output_mask[2] else None)
        params = self._conv_params(stride, padding, dilation, groups)
        arguments = (View.of(output), View.of(input), View.of(weight), wanted, params)
        name = "host_conv_relu_backward_workspace"
        workspace = self._workspace(name, input.dtype, *arguments)
        self.call(
            "host_conv_relu_backward", input.dtype, View.of(grad), *arguments, _pointer(workspace)
        )
        return tuple(t if t is not None else input.new_empty(0) for t in made)

    def _conv_params(self, stride, padding, dilation, groups) -> ConvParams:
        return ConvParams(tuple(stride), tuple(padding), tuple(dilation), groups, self.tf32)

    def _workspace(self, name: str, dtype: torch.dtype, *arguments) -> torch.Tensor:
        size = getattr(self.lib, name)(DTYPES[dtype], *map(_by_reference, arguments))
        buffer = torch.full((size + 256,), 0xFF, dtype=torch.uint8)  # NaN in every type
        return buffer[-buffer.data_ptr() % 256 :]


def _pointer(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def _by_reference(argument):
    return ctypes.byref(argument) if isinstance(argument, ctypes.Structure) else argument


def _format_of(tensor: torch.Tensor) -> torch.memory_format:
    last = tensor.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last and not tensor.is_contiguous() else torch.contiguous_format


def _as_4d(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dim() == 4:
        return tensor
    return tensor.reshape(*tensor.shape[:2], -1, tensor.shape[-1])


def poisoned(shape, dtype, memory_format=torch.contiguous_format) -> torch.Tensor:
    """An output that a kernel must overwrite: NaN, or 0xAB for integers."""
    out = torch.empty(shape, dtype=dtype, memory_format=memory_format)
    return out.fill_(float("nan") if dtype.is_floating_point else 0xAB)


def poisoned_like(tensor: torch.Tensor) -> torch.Tensor:
    return poisoned(tensor.shape, tensor.dtype, _format_of(tensor))


def _pool_params(kernel_size, stride, padding, dilation) -> PoolParams:
    return PoolParams(tuple(kernel_size), tuple(stride), tuple(padding), tuple(dilation))


def pool_size(size: int, kernel: int, stride: int, padding: int, dilation: int, ceil: bool) -> int:
    """Outputs along one axis, by torch's rule: no window may start in the padding behind."""
    reach = size + 2 * padding - dilation * (kernel - 1) - 1
    out = (reach + (stride - 1 if ceil else 0)) // stride + 1
    return out - 1 if ceil and (out - 1) * stride >= size + padding else out


def _pool_outputs(input, kernel_size, stride, padding, dilation, ceil_mode, save_offsets):
    sides = [
        pool_size(*numbers, ceil_mode)
        for numbers in zip(input.shape[2:], kernel_size, stride, padding, dilation, strict=True)
    ]
    shape = (*input.shape[:2], *sides)
    out = poisoned(shape, input.dtype, _format_of(input))
    if not save_offsets:
        return out, torch.empty(0, dtype=torch.uint8), Offsets()
    wide = kernel_size[0] * kernel_size[1] > 256
    dtype = torch.int32 if wide else torch.uint8
    offsets = poisoned(shape, dtype, _format_of(input))
    return out, offsets, Offsets(View.of(offsets), wide)


@cache
def host_cuda(variant: str = "") -> HostCuda:
    """The library of the variant that the environment asks for, plain otherwise."""
    return HostCuda(build(variant or os.environ.get("FASTALEX_HOST_CUDA", "plain")))
