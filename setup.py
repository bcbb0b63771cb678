"""Builds the native libraries with ninja. Without a compiler the package installs as pure Python.

FASTALEX_BUILD: "auto" (default: what the machine can build; CUDA where nvcc is, GPU or not), "cpu" (fail unless the
CPU library builds, and build no CUDA), "cuda" (fail unless both build) or "none". A compiler that is there and fails is
an error in every mode that builds. CXX and NVCC name the compilers. FASTALEX_CUDA_ARCH lists compute capabilities, such
as "80;90a;120+PTX" (the last one's PTX for GPUs to come; 90a is 9.0 with Hopper's own instructions); by default, all
of CUDA_ARCHITECTURES that nvcc knows.
"""

import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.absolute()
CPU = ROOT / "csrc/cpu"
CUDA = ROOT / "csrc/cuda"
COMPILER = os.environ.get("CXX", "g++")
NVCC = os.environ.get("NVCC", "nvcc")
BUILD = ROOT / "build/native"  # kept between builds, so that a rebuild compiles what changed
# Compiled once per instruction set, free of torch; the other sources know torch and no instruction set.
CPU_KERNELS = (
    *("lrn_rows", "lrn", "max_pool", "lrn_max_pool", "fingerprint", "augment", "kernel_table"),
    *(f"conv/kernels/{path.stem}" for path in sorted(CPU.glob("conv/kernels/*.cpp"))),
)
CPU_HOST = (
    *(
        "activation",
        "buffer",
        "conv_plans",
        "kept_memory",
        "library",
        "packed",
        "register",
        "register_conv",
        "register_conv_pool",
        "register_augment",
        "register_linear",
        "linear",
    ),
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
# The launchers and the registration: they decide, and compute nothing.
PLAN_FLAGS = "-std=c++20 -O1 -fPIC -fvisibility=hidden -Wall -Wextra -Wno-unknown-pragmas"
NVCC_FLAGS = "-std=c++20 -O3 -lineinfo -Xcompiler=-fPIC,-fvisibility=hidden"
CUDA_ARCHITECTURES = ("80", "86", "89", "90a", "100", "120+PTX")
TORCH_TARGET_VERSION = "0x020b000000000000"  # the stable ABI as torch 2.11 has it
LIBRARIES = {"cpu": ("_cpu", "_cuda_plan"), "cuda": ("_cpu", "_cuda_plan", "_cuda")}


def isas() -> list[str]:
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return list(ISA_FLAGS) if x86 else ["portable"]


def cuda_architectures() -> list[str]:
    """FASTALEX_CUDA_ARCH, or what this nvcc knows of the default."""
    asked = re.split(r"[;, ]+", os.environ.get("FASTALEX_CUDA_ARCH", "").strip())
    if asked != [""]:
        for name in asked:
            if not re.fullmatch(r"[1-9]\d+a?(\+PTX)?", name):
                raise SystemExit(
                    f"FASTALEX_CUDA_ARCH has '{name}'; it lists compute capabilities such as 80;90+PTX"
                )
        return asked
    listed = subprocess.run([NVCC, "--list-gpu-arch"], capture_output=True, text=True, check=False)
    known = set(re.findall(r"compute_(\d+)", listed.stdout))
    default = [name for name in CUDA_ARCHITECTURES if re.match(r"\d+", name)[0] in known]
    return default or list(CUDA_ARCHITECTURES)


def gencode(architectures: list[str]) -> str:
    flags = []
    for name in architectures:
        number = name.removesuffix("+PTX")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if name != number:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return " ".join(flags)


def as_target(path: Path) -> str:
    """A path as ninja writes it where it names files."""
    return re.sub(r"([$ :])", r"$\1", str(path))


def as_argument(path: Path | str) -> str:
    """A path as a word of a command that ninja gives to a shell."""
    return shlex.quote(str(path)).replace("$", "$$")


class NinjaFile:
    """The build of the native libraries: ``library`` adds one, ``text`` is the file."""

    def __init__(self) -> None:
        from torch.utils.cpp_extension import include_paths, library_paths

        includes = " ".join(f"-isystem {as_argument(p)}" for p in include_paths())
        self.stable_abi = f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION} {includes}"
        libraries = " ".join(f"-L{as_argument(p)}" for p in library_paths())
        link = f"$in -o $out {libraries} -ltorch_cpu -lc10"
        self.lines = ["ninja_required_version = 1.5", f"cxx = {COMPILER}", f"nvcc = {NVCC}"]
        for rule, command in (
            ("compile", "$cxx -MMD -MF $out.d $flags -c $in -o $out"),
            ("compile_cuda", "$nvcc -MMD -MF $out.d $flags -c $in -o $out"),
            ("link", f"$cxx -shared {link}"),
            ("link_cuda", f"$nvcc -shared -cudart static $flags {link}"),
        ):
            self.lines += [f"rule {rule}", f"  command = {command}", "  description = $out"]
            if rule.startswith("compile"):
                self.lines += ["  depfile = $out.d", "  deps = gcc"]

    def compile(self, label: str, source: Path, flags: str, rule: str = "compile") -> str:
        root = CPU if source.is_relative_to(CPU) else CUDA
        made = f"{label}/{source.relative_to(root).with_suffix('')}.o"
        self.lines += [f"build {made}: {rule} {as_target(source)}", f"  flags = {flags}"]
        return made

    def library(self, name: str) -> None:
        """``_cpu``, ``_cuda_plan`` or ``_cuda``."""
        rule, flags = "link", ""
        if name == "_cpu":
            objects = self.cpu_objects()
        elif name == "_cuda_plan":
            objects = self.plan_objects()
        else:
            flags = gencode(cuda_architectures())
            rule, objects = "link_cuda", self.cuda_objects(flags)
        self.lines += [f"build {name}.so: {rule} {' '.join(objects)}", f"  flags = {flags}"]

    def cpu_objects(self) -> list[str]:
        objects = []
        for isa in isas():
            for source in CPU_KERNELS:
                flags = f"{CXX_FLAGS} -DFASTALEX_ISA={isa} {ISA_FLAGS[isa]}"
                objects.append(self.compile(isa, CPU / f"{source}.cpp", flags))
        for source in CPU_HOST:
            flags = f"{CXX_FLAGS} {self.stable_abi}"
            objects.append(self.compile("host", CPU / f"{source}.cpp", flags))
        return objects

    def plan_objects(self) -> list[str]:
        planner = CUDA / "planner"
        folders = f"-I{as_argument(planner)} -I{as_argument(CUDA)}"
        header = f"-include {as_argument(planner / 'planner.h')}"
        flags = f"{PLAN_FLAGS} {folders} {header} {self.stable_abi}"
        sources = sorted([*CUDA.glob("*.cu"), *CUDA.glob("*.cpp"), planner / "planner.cpp"])
        return [self.compile("plan", source, f"{flags} -x c++") for source in sources]

    def cuda_objects(self, architectures: str) -> list[str]:
        built = f"-DFASTALEX_CUDA_ARCHITECTURES='\"{','.join(cuda_architectures())}\"'"
        host, device = f"{PLAN_FLAGS} {built} {self.stable_abi}", f"{NVCC_FLAGS} {architectures}"
        return [
            *(self.compile("cuda", path, host) for path in sorted(CUDA.glob("*.cpp"))),
            *(
                self.compile("cuda", path, device, "compile_cuda")
                for path in sorted(CUDA.glob("*.cu"))
            ),
        ]

    def text(self) -> str:
        return "\n".join(self.lines) + "\n"


def build(folder: Path, names: Sequence[str]) -> None:
    """Builds libraries as ``folder``/<name>.so."""
    folder.mkdir(parents=True, exist_ok=True)
    ninja = NinjaFile()
    for name in names:
        ninja.library(name)
    (folder / "build.ninja").write_text(ninja.text())
    run_ninja(folder)


class BuildNative(build_ext):
    """Builds all libraries in one run of ninja, and copies each to where setuptools wants it."""

    def build_extensions(self) -> None:
        build(BUILD, [ext.name.rpartition(".")[2] for ext in self.extensions])
        super().build_extensions()

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(BUILD / f"{ext.name.rpartition('.')[2]}.so", output)


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
        failed = re.search(r"FAILED: \S*?\b(cuda/|_cuda\.so)", log.read_text())
        compiler, library, mend = (
            (NVCC, "CUDA", "NVCC to another nvcc, or FASTALEX_BUILD=cpu to install without it")
            if failed
            else (
                COMPILER,
                "CPU",
                "CXX to another C++20 compiler, or FASTALEX_BUILD=none to install without it",
            )
        )
        raise SystemExit(
            f"fastalex: '{compiler}' could not build the {library} library (log: {log}); set {mend}"
        )


def missing_compiler() -> str | None:
    """How to get the compiler that a build lacks here, or None."""
    if shutil.which(shlex.split(COMPILER)[0]) is None:
        return f"no C++20 compiler '{COMPILER}' was found: install one, or set CXX to where it is"
    return None


def require_tools() -> None:
    """Where there is a compiler, what else is missing is a slip: a slow package would hide it."""
    for module in ("torch", "ninja"):
        if importlib.util.find_spec(module) is None:
            raise SystemExit(
                f"fastalex: {module} is not in the build environment: pip install {module} first, "
                "or set FASTALEX_BUILD=none to install without the CPU library"
            )


def extensions() -> list[Extension]:
    choice = os.environ.get("FASTALEX_BUILD", "auto")
    if choice not in ("auto", "cpu", "cuda", "none"):
        raise SystemExit(f"FASTALEX_BUILD is '{choice}'; it can be auto, cpu, cuda or none")
    if choice == "none":
        return []
    reason = missing_compiler()
    if reason is not None:
        if choice != "auto":
            raise SystemExit(f"fastalex: FASTALEX_BUILD={choice}, but {reason}")
        print(f"fastalex: building without the CPU library, because {reason}", file=sys.stderr)
        return []
    require_tools()
    wanted = "cpu"
    if choice != "cpu" and shutil.which(NVCC) is not None:
        wanted = "cuda"
    elif choice == "cuda":
        raise SystemExit(
            f"fastalex: FASTALEX_BUILD=cuda, but no nvcc '{NVCC}' was found: install the CUDA toolkit, "
            "or set NVCC to where it is"
        )
    return [
        Extension(f"fastalex.{name}", sources=[], py_limited_api=True) for name in LIBRARIES[wanted]
    ]


if __name__ == "__main__":
    setup(
        ext_modules=extensions(),
        cmdclass={"build_ext": BuildNative},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )
