"""Builds the native libraries with ninja. Without a compiler the package installs as pure Python.

FASTALEX_BUILD: "auto" (default: what the machine can build), "cpu" (fail unless the CPU library builds) or "none".
A compiler that is there and fails is an error in every mode that builds. CXX names the compiler.
"""

import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.absolute()
CPU = ROOT / "csrc/cpu"
COMPILER = os.environ.get("CXX", "g++")
BUILD = ROOT / "build/native"  # kept between builds, so that a rebuild compiles what changed
# Compiled once per instruction set, free of torch; the other sources know torch and no instruction set.
CPU_KERNELS = (
    *("lrn_rows", "lrn", "max_pool", "lrn_max_pool", "kernel_table"),
    *(f"conv/kernels/{path.stem}" for path in sorted(CPU.glob("conv/kernels/*.cpp"))),
)
CPU_HOST = (
    *("activation", "library", "register", "linear"),
    *(f"conv/{path.stem}" for path in sorted(CPU.glob("conv/*.cpp"))),
)
ISA_FLAGS = {
    "portable": "",
    "avx2": "-mavx2 -mfma -mf16c",
    "avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c",
}
WARNINGS = "-Wall -Wextra -Wno-psabi -Wno-uninitialized"  # the two that GCC's own intrinsics raise
CXX_FLAGS = (
    f"-std=c++20 -O3 -fPIC -fvisibility=hidden -fno-math-errno -ffp-contract=fast {WARNINGS}"
)
TORCH_TARGET_VERSION = "0x020b000000000000"  # the stable ABI as torch 2.11 has it


def isas() -> list[str]:
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return list(ISA_FLAGS) if x86 else ["portable"]


def ninja_file(compiler: str, output: Path) -> str:
    """The whole build of the CPU library as one ninja file."""
    from torch.utils.cpp_extension import include_paths, library_paths

    includes = " ".join(f"-isystem {shlex.quote(p)}" for p in include_paths())
    libraries = " ".join(f"-L{shlex.quote(p)}" for p in library_paths())
    lines = [
        "ninja_required_version = 1.5",
        f"cxx = {compiler}",
        "rule compile",
        f"  command = $cxx -MMD -MF $out.d {CXX_FLAGS} $flags -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = $out",
        "rule link",
        f"  command = $cxx -shared $in -o $out {libraries} -ltorch_cpu -lc10",
        "  description = $out",
    ]
    objects = []

    def compile_one(source: str, label: str, flags: str) -> None:
        objects.append(f"{label}/{source}.o")
        lines.extend([f"build {objects[-1]}: compile {CPU / source}.cpp", f"  flags = {flags}"])

    for isa in isas():
        for source in CPU_KERNELS:
            compile_one(source, isa, f"-DFASTALEX_ISA={isa} {ISA_FLAGS[isa]}")
    for source in CPU_HOST:
        compile_one(source, "host", f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION} {includes}")
    lines.append(f"build {output}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


class BuildNative(build_ext):
    """Writes the ninja file and runs it."""

    def build_extension(self, ext: Extension) -> None:
        BUILD.mkdir(parents=True, exist_ok=True)
        built = BUILD / "_cpu.so"
        (BUILD / "build.ninja").write_text(ninja_file(COMPILER, built))
        run_ninja(BUILD)
        output = Path(self.get_ext_fullpath(ext.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(built, output)


def run_ninja(folder: Path) -> None:
    """Builds; a compiler that fails ends the installation, and its words are kept in a log."""
    log = folder / "build.log"
    command = [sys.executable, "-m", "ninja", "-C", str(folder)]
    with (
        log.open("w") as kept,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as ninja,
    ):
        assert ninja.stdout is not None
        for line in ninja.stdout:
            kept.write(line)
            sys.stdout.write(line)
    if ninja.returncode != 0:
        raise SystemExit(
            f"fastalex: '{COMPILER}' could not build the CPU library (log: {log}); set CXX to another "
            "C++20 compiler, or FASTALEX_BUILD=none to install without the library"
        )


def missing() -> str | None:
    """What a build lacks here and how to get it, or None."""
    if shutil.which(shlex.split(COMPILER)[0]) is None:
        return f"no C++20 compiler '{COMPILER}' was found: install one, or set CXX to where it is"
    for module in ("torch", "ninja"):
        if importlib.util.find_spec(module) is None:
            return f"{module} is not in the build environment: pip install {module} first"
    return None


def extensions() -> list[Extension]:
    choice = os.environ.get("FASTALEX_BUILD", "auto")
    if choice not in ("auto", "cpu", "none"):
        raise SystemExit(f"FASTALEX_BUILD is '{choice}'; it can be auto, cpu or none")
    if choice == "none":
        return []
    reason = missing()
    if reason is None:
        return [Extension("fastalex._cpu", sources=[], py_limited_api=True)]
    if choice == "cpu":
        raise SystemExit(f"fastalex: FASTALEX_BUILD=cpu, but {reason}")
    print(f"fastalex: building without the CPU library, because {reason}", file=sys.stderr)
    return []


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildNative},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
