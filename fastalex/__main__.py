"""``python -m fastalex``: the environment, and the state of every backend."""

from __future__ import annotations

import platform
import sys

import torch

import fastalex
from fastalex import _cuda_native, _cupy, _native
from fastalex.backends import NAMES
from fastalex.ops import _triton
from fastalex.ops._operator import REGISTRY


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo") as info:
            return next(line.partition(":")[2].strip() for line in info if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or "unknown"


def _backend_state(name: str) -> str:
    served = [op for op in REGISTRY if any(k.backend == name for k in REGISTRY[op].kernels.kernels)]
    if name == "cpu":
        if _native.error is not None:
            return f"absent: {_native.error}"
        available = ", ".join(_native.available_isas())
        return f"{_native.isa()} kernels (this CPU runs {available}); {len(served)} operators"
    missing = {"triton": _triton.missing, "cuda": _cuda_native.library_error, "cupy": _cupy.missing}
    if name in missing and (reason := missing[name]()) is not None:
        return f"absent: {reason}"
    waiting = "" if name == "torch" or torch.cuda.is_available() else ", for a CUDA GPU"
    return f"{len(served)} operators{waiting}"


def main() -> None:
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA GPU"
    rows = [
        ("fastalex", fastalex.__version__),
        ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("torch", f"{torch.__version__}, {torch.get_num_threads()} threads"),
        ("cpu", _cpu_model()),
        ("gpu", cuda),
        *((f"backend {name}", _backend_state(name)) for name in NAMES),
    ]
    width = max(len(label) for label, _ in rows)
    sys.stdout.writelines(f"{label:{width}}  {text}\n" for label, text in rows)


if __name__ == "__main__":
    main()
