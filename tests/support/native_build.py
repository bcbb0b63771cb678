"""Builds the CPU library, or a program of its torch-free parts, with the flags of a sanitizer or a fuzzer."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

from fastalex import _native
from tests.support.cuda_extension import setup_module

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "sanitized"

#: Everything of csrc/cpu that knows torch; a program brings its own host in their place.
KNOWS_TORCH = ("activation", "library", "register")
SANITIZERS = {
    # -O1: the sanitizers' own checks make -O3 slow to compile, and find no more.
    "address": "-O1 -g1 -fsanitize=address,undefined -fno-sanitize-recover=all",
    "thread": "-O1 -g1 -fsanitize=thread",
    "fuzz": "-O1 -g1 -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all",
}


def library(sanitizer: str) -> Path:
    """The CPU library with every instruction set, as setup.py builds it but for the sanitizer."""
    setup = setup_module()
    flags = f"{setup.CXX_FLAGS.replace('-O3', '')} {SANITIZERS[sanitizer]}"
    folder = BUILD / sanitizer
    link = f"{setup.COMPILER} {SANITIZERS[sanitizer]}"
    with mock.patch.multiple(setup, CXX_FLAGS=flags, COMPILER=link):
        setup.build(folder, ["_cpu"])
    return folder / "_cpu.so"


def package(sanitizer: str) -> Path:
    """A copy of the checkout whose package has that library."""
    from tests.support.packaging import copy_of_source

    built = library(sanitizer)
    folder = BUILD / sanitizer / "checkout"
    shutil.rmtree(folder, ignore_errors=True)
    copy_of_source(folder)
    shutil.copy(built, folder / "fastalex" / "_cpu.abi3.so")
    return folder


def program(main: Path, sanitizer: str, compiler: str, *more: str) -> Path:
    """``main`` with the torch-free sources for the best instruction set of this CPU, as one executable."""
    setup = setup_module()
    isa = _native.isa()
    folder = BUILD / f"{main.stem}-{sanitizer}-{isa}"
    folder.mkdir(parents=True, exist_ok=True)
    warnings = setup.WARNINGS if "g++" in compiler and "clang" not in compiler else "-w"
    flags = f"-std=c++20 {warnings} {SANITIZERS[sanitizer]} -DFASTALEX_ISA={isa}"
    flags = " ".join((flags, *more))
    host = [name for name in setup.CPU_HOST if not name.startswith(KNOWS_TORCH)]
    lines = [
        f"flags = {flags}",
        "rule compile",
        f"  command = {compiler} -MMD -MF $out.d $flags $isa -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {compiler} $flags -pthread $in -o $out",
    ]
    objects = []
    for source in (*host, *setup.CPU_KERNELS, main):
        path = source if isinstance(source, Path) else setup.CPU / f"{source}.cpp"
        objects.append(f"{str(source).replace('/', '_').strip('_')}.o")
        lines.append(f"build {objects[-1]}: compile {path}")
        # The host's code is for any CPU, as in the library.
        lines.append(f"  isa = {setup.ISA_FLAGS[isa] if source not in host else ''}")
    lines.append(f"build {main.stem}: link {' '.join(objects)}")
    (folder / "build.ninja").write_text("\n".join(lines) + "\n")
    command = [sys.executable, "-m", "ninja", "-C", str(folder), "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{main.name} does not build:\n{done.stdout[-4000:]}")
    return folder / main.stem
