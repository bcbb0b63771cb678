"""Builds the library of csrc/cuda with nvcc as setup.py does, for one GPU; needs none, nor a CUDA build of torch."""

from __future__ import annotations

import importlib.util
import os
import shutil
from functools import cache
from pathlib import Path
from typing import Any

from filelock import FileLock

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "cuda_extension"
ARCHITECTURE = "90a"


def unavailable() -> str | None:
    """Why the library cannot be built here, or None."""
    return None if shutil.which(os.environ.get("NVCC", "nvcc")) else "no nvcc on PATH"


@cache
def setup_module() -> Any:
    """setup.py as a module: it installs nothing unless it is run."""
    spec = importlib.util.spec_from_file_location("fastalex_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def build() -> Path:
    """The library; ninja rebuilds what changed."""
    before = os.environ.get("FASTALEX_CUDA_ARCH")
    os.environ["FASTALEX_CUDA_ARCH"] = ARCHITECTURE
    BUILD.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(BUILD / ".lock"):
            setup_module().build(BUILD, ["_cuda"])
    finally:
        os.environ.pop("FASTALEX_CUDA_ARCH")
        if before is not None:
            os.environ["FASTALEX_CUDA_ARCH"] = before
    return BUILD / "_cuda.so"
