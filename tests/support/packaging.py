"""Builds and installs the package as a user's pip would, away from the source tree."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

#: A call of every operator, a gradient, and what the package says of itself.
TOUR = """
import torch, fastalex
from fastalex import ops
x = torch.randn(2, 8, 13, 13, requires_grad=True)
w = torch.randn(4, 8, 3, 3)
for y in (
    ops.conv2d_relu(x, w), ops.local_response_norm(x, 5), ops.max_pool2d(x, 3, 2), ops.lrn_max_pool2d(x, 5),
    ops.linear_relu(x, torch.randn(4, 13)),
):
    y.sum().backward()
with torch.no_grad():
    ops.conv2d_relu_max_pool2d(x, w), ops.conv2d_relu_lrn_max_pool2d(x, w, size=5)
images, corners = torch.zeros(2, 9, 9, 3, dtype=torch.uint8), torch.zeros(2, 2, dtype=torch.int64)
ops.augment(images, corners, torch.tensor([False, True]), size=7)
print(fastalex.__file__, fastalex.__version__)
fastalex.explain("lrn", x, 5)
from fastalex.__main__ import main
main()
"""

#: A compiler that writes whatever file it is asked for, and compiles nothing.
PRETENDING_COMPILER = """#!/bin/sh
while [ $# -gt 0 ]; do
  case "$1" in -o|-MF) echo > "$2"; shift ;; esac
  shift
done
"""
FAILING_COMPILER = """#!/bin/sh
echo "internal compiler error: out of patience" >&2
exit 1
"""

#: What a checkout holds besides its sources.
_MADE_THERE = shutil.ignore_patterns(
    ".*_cache", ".git", ".venv", ".hypothesis", "__pycache__", "*.so", "*.egg-info", "build", "dist", "out"
)  # fmt: skip


@dataclass(frozen=True)
class Result:
    """How a command ended, and everything it said."""

    code: int
    text: str


def run(command: list[str], cwd: Path, **environment: str) -> Result:
    done = subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return Result(done.returncode, done.stdout)


def python(code: str, site: Path, **environment: str) -> Result:
    """Runs a snippet on the package installed in ``site``."""
    return run([sys.executable, "-c", code], site, PYTHONPATH=str(site), **environment)


def copy_of_source(folder: Path) -> Path:
    """The sources of the checkout without anything built in it."""
    return Path(shutil.copytree(ROOT, folder, ignore=_MADE_THERE))


def build_sdist(source: Path, output: Path) -> Path:
    """The .tar.gz that the build backend makes of ``source``."""
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(output)!r})"
    result = run([sys.executable, "-c", code], source)
    assert result.code == 0, result.text
    (archive,) = output.glob("*.tar.gz")
    return archive


def pip_wheel(source: Path, output: Path, **environment: str) -> Result:
    """``pip wheel`` with the tools of this environment, its compilers and FASTALEX_* from ``environment`` alone.

    Without NVCC there: as on a machine that has none, since it takes minutes.
    """
    command = ["-m", "pip", "wheel", "-v", "--no-build-isolation", "--no-deps", "--no-index", "-w"]
    unset = {
        "FASTALEX_BUILD": "auto",
        "CXX": "g++",
        "NVCC": "/nonexistent",
        "FASTALEX_CUDA_ARCH": "",
    }
    return run(
        [sys.executable, *command, str(output), str(source)], source, **(unset | environment)
    )


def install(wheel: Path, site: Path) -> Path:
    command = ["-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target"]
    result = run([sys.executable, *command, str(site), str(wheel)], wheel.parent)
    assert result.code == 0, result.text
    return site


def compiler(folder: Path, script: str) -> str:
    """An executable that stands in for a C++ compiler."""
    path = folder / "c++"
    path.write_text(script)
    path.chmod(0o755)
    return str(path)
