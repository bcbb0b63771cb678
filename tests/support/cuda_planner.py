"""Builds the launch planner: the launchers of csrc/cuda compiled by g++ with no CUDA at all."""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ROOT / "csrc" / "cuda"
PLANNER = KERNELS / "planner"
BUILD = ROOT / "build" / "cuda_planner"

FLAGS = ["-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden"]
FLAGS += ["-Wall", "-Wextra", "-Wno-unknown-pragmas"]


def build() -> Path:
    """The planner's shared library, rebuilt only when a source changed."""
    digest = hashlib.sha256(" ".join(FLAGS).encode())
    for path in sorted([*KERNELS.glob("*.*"), *PLANNER.glob("*.*")]):
        digest.update(path.name.encode() + path.read_bytes())
    folder = BUILD / digest.hexdigest()[:16]
    library = folder / "_cuda_plan.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    flags = [*FLAGS, "-include", str(PLANNER / "planner.h"), f"-I{PLANNER}", f"-I{KERNELS}"]

    def compile_one(source: Path) -> str:
        target = str(folder / (source.stem + ".o"))
        subprocess.run(
            ["g++", *flags, "-x", "c++", "-c", str(source), "-o", target],
            check=True,
            capture_output=True,
        )
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, [*KERNELS.glob("*.cu"), PLANNER / "planner.cpp"]))
    partial = folder / f"partial-{os.getpid()}.so"
    subprocess.run(["g++", "-shared", *objects, "-o", str(partial)], check=True)
    return partial.rename(library)


@cache
def load() -> ctypes.CDLL:
    from fastalex import _cupy

    return _cupy.bind_planner(ctypes.CDLL(str(build())))
