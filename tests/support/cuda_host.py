"""Builds csrc/cuda, its registration included, with g++ against the host runtime: kernels run on CPU tensors."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from filelock import FileLock

from fastalex import _cuda_native
from fastalex._cuda_native import Launch
from fastalex._cupy import cuda_include
from fastalex.ops import _cuda as ops_cuda

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ROOT / "csrc" / "cuda"
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
TORCH = Path(torch.__file__).parent
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020b000000000000", f"-isystem{TORCH / 'include'}"]
SCHEDULES = {"forward": 0, "backward": 1, "random": 2, "greedy": 3, "greedy_backward": 4}


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


def build(variant: str = "plain", kernels: Path = KERNELS, units: Collection[str] = ()) -> Path:
    """The library of one variant; objects are rebuilt only when what they include changed.

    Of changed ``kernels``, only the sources named ``units`` are taken, and the rest from the checkout.
    """
    flags = FLAGS + VARIANTS[variant] + _fused_multiply_add()
    link = [f for f in flags if not (variant == "trace" and f == "-fsanitize=thread")]
    objects = BUILD / "objects"
    objects.mkdir(parents=True, exist_ok=True)
    namespace = ["-DFASTALEX_WITHOUT_CUDA", "-DFASTALEX_POISON"]
    namespace.append(f"-DFASTALEX_NAMESPACE=fastalex_host_{variant}")

    def compile_one(source: Path) -> Path:
        # The tracer must not trace itself, and torch's side is not under test by it.
        chosen = link if source.suffix == ".cpp" else flags
        folders = (RUNTIME, KERNELS if source.parent == RUNTIME else source.parent)
        if source.parent != RUNTIME and source.suffix == ".cpp":
            chosen = [*chosen, *namespace, *STABLE_ABI]
        name = f"{source.stem}-{fingerprint(chosen, source, folders)}"
        target = objects / f"{name}.o"
        if target.exists():
            return target
        partial = objects / f"{name}.{os.getpid()}.o"
        include = [f"-I{folder}" for folder in (*folders, cuda_include())]
        forced = ["-x", "c++", "-include", str(RUNTIME / "host_cuda.h")]
        command = ["g++", *chosen, *include, *forced, "-c", str(source), "-o", str(partial)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
        return partial.rename(target)

    sources = sorted([*KERNELS.glob("*.cu"), *KERNELS.glob("*.cpp")])
    chosen_from = [kernels if source.stem in units else KERNELS for source in sources]
    listed = [folder / source.name for folder, source in zip(chosen_from, sources, strict=True)]
    with FileLock(BUILD / ".lock"), ThreadPoolExecutor(2) as pool:
        built = [str(o) for o in pool.map(compile_one, [*listed, *sorted(RUNTIME.glob("*.cpp"))])]
    torch_libraries = [f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-lc10"]
    digest = hashlib.sha256(" ".join([*link, *built]).encode()).hexdigest()[:16]
    library = BUILD / f"libhost_cuda-{variant}-{digest}.so"
    if not library.exists():
        partial = BUILD / f"partial-{os.getpid()}.so"
        command = ["g++", *link, "-shared", *built, *torch_libraries, "-o", str(partial)]
        subprocess.run(command, check=True)
        partial.rename(library)
    return library


class HostCuda:
    """The operators on the host runtime: ``host.lrn(input, ...)``, as in ``torch.ops.fastalex``."""

    def __init__(self, library: Path, variant: str) -> None:
        torch.ops.load_library(library)
        self.path = library
        self.ops = getattr(torch.ops, f"fastalex_host_{variant}")
        self.lib = ctypes.CDLL(str(library))
        for name in ("host_cuda_launches", "host_cuda_trace_end"):
            getattr(self.lib, name).restype = ctypes.c_char_p
        self.tf32 = self.wgmma = False

    def __getattr__(self, op: str) -> Callable[..., Any]:
        run = getattr(self.ops, op).default
        if not op.startswith("conv"):
            return run
        return lambda *args: run(*args, self.tf32, self.wgmma)

    def schedule(self, kind: str, seed: int = 1) -> None:
        self.lib.host_cuda_schedule(SCHEDULES[kind], ctypes.c_uint(seed))

    def launches(self) -> list[Launch]:
        """What was launched since the last call."""
        rows = [line.split("\t") for line in self.lib.host_cuda_launches().decode().splitlines()]
        return [Launch(r[0], int(r[1]), int(r[2]), int(r[3]), bytes.fromhex(r[4])) for r in rows]


@cache
def host_cuda(variant: str = "") -> HostCuda:
    """The library of the variant that the environment asks for, plain otherwise; or the very one it names."""
    asked = os.environ.get("FASTALEX_HOST_CUDA", "plain")
    variant = variant or asked
    named = os.environ.get("FASTALEX_HOST_CUDA_LIBRARY") if variant == asked else None
    return HostCuda(Path(named) if named else build(variant), variant)


@contextlib.contextmanager
def serving_cpu() -> Iterator[None]:
    """Inside, the backend `cuda` takes CPU tensors: its registration, launchers and kernels run on the host runtime."""
    host = host_cuda()
    replaced = [
        (ops_cuda, "DEVICE", "cpu"),
        (ops_cuda, "float32_in_tf32", lambda op: False),  # what bounds are derived for
        (_cuda_native, "library", lambda: host.ops),
        (_cuda_native, "library_error", lambda: None),
        (_cuda_native, "gpu_error", lambda device: None),
        (_cuda_native, "architecture_error", lambda device: None),
        (_cuda_native, "wgmma_error", lambda device: None),
        (_cuda_native, "wgmma_library_error", lambda: None),
    ]
    with contextlib.ExitStack() as stack:
        for module, name, value in replaced:
            stack.enter_context(mock.patch.object(module, name, value))
        yield
