"""Builds the stable-ABI library of csrc/cuda with nvcc; needs no GPU and no CUDA build of torch."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from tests.support.cuda_host import fingerprint

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ROOT / "csrc" / "cuda"
BUILD = ROOT / "build" / "cuda_extension"

TORCH = Path(torch.__file__).parent
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020b000000000000", f"-isystem{TORCH / 'include'}"]
HOST_FLAGS = ["-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
DEVICE_FLAGS = ["-std=c++20", "-O3", "-lineinfo", "-Xcompiler=-fPIC,-fvisibility=hidden"]


def unavailable() -> str | None:
    """Why the library cannot be built here, or None."""
    return None if shutil.which("nvcc") else "no nvcc on PATH"


def build(architectures: tuple[str, ...] = ("90",)) -> Path:
    """The library for these compute capabilities, rebuilt only when a source or a flag changed."""
    gencode = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]
    BUILD.mkdir(parents=True, exist_ok=True)

    def compile_one(source: Path) -> Path:
        device = source.suffix == ".cu"
        command = ["nvcc", *DEVICE_FLAGS, *gencode] if device else ["g++", *HOST_FLAGS, *STABLE_ABI]
        target = BUILD / f"{source.stem}-{fingerprint(command, source, (KERNELS,))}.o"
        if target.exists():
            return target
        partial = target.with_suffix(f".{os.getpid()}.o")
        done = subprocess.run(
            [*command, "-c", str(source), "-o", str(partial)], capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(f"{source.name}:\n{done.stderr}")
        return partial.rename(target)

    sources = sorted([*KERNELS.glob("*.cu"), *KERNELS.glob("*.cpp")])
    with ThreadPoolExecutor(2) as pool:
        objects = [str(o) for o in pool.map(compile_one, sources)]
    digest = hashlib.sha256(" ".join(objects).encode()).hexdigest()[:16]
    library = BUILD / f"fastalex_cuda-{digest}.so"
    if library.exists():
        return library
    link = ["nvcc", "-shared", "-cudart", "static", *gencode, *objects]
    link += [f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-lc10", "-o", str(library)]
    subprocess.run(link, check=True)
    return library
