"""``python -m tests.support.abi_check WHEEL TORCH...``: one wheel in a fresh environment of every torch named.

Each installation runs the tour of the package, at the CPU's best instruction set and capped to each lower one, then
the smoke tests, which run every instruction set against float64 and stock torch.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import venv
from pathlib import Path

from tests.support.packaging import ROOT, TOUR, run

#: The case tables, gradients included, on every instruction set.
SMOKE = (
    "test_lrn",
    "test_max_pool",
    "test_lrn_max_pool",
    "test_conv_relu_max_pool",
    "test_linear_relu",
)


def tour(python: str, torch: str, isa: str, folder: Path) -> bool:
    done = run([python, "-c", TOUR], folder, FASTALEX_CPU_ISA=isa)
    wanted = (f"torch           {torch}+", "lrn: runs on cpu", f"{isa} kernels")
    passed = done.code == 0 and all(text in done.text for text in wanted)
    print(f"torch {torch}, at most {isa}: {'works' if passed else f'FAILS{chr(10)}{done.text}'}")
    return passed


def smoke(python: str, torch: str, folder: Path) -> bool:
    """The tests without the sources they came with: what they import is the wheel's."""
    shutil.copytree(ROOT / "tests", folder / "tests")
    shutil.copy(ROOT / "pyproject.toml", folder)
    files = [f"tests/{name}.py" for name in SMOKE]
    command = [python, "-m", "pytest", "-m", "not slow and not gpu", *files]
    done = run(command, folder)
    summary = done.text.strip().splitlines()[-1]
    print(
        f"torch {torch}, smoke tests: {summary if done.code == 0 else f'FAIL{chr(10)}{done.text}'}"
    )
    return done.code == 0


def check(wheel: Path, torch: str, folder: Path) -> bool:
    """Whether the tour and the smoke tests pass; prints what was said where they don't."""
    venv.create(folder, with_pip=True)
    python = str(folder / "bin/python")
    needs = [f"torch=={torch}", str(wheel), "numpy", "pytest"]
    done = run([python, "-m", "pip", "install", "-q", *needs], folder)
    if done.code != 0:
        print(f"torch {torch}: not installed\n{done.text}")
        return False
    toured = [tour(python, torch, isa, folder) for isa in ("avx512", "avx2", "portable")]
    return smoke(python, torch, folder) and all(toured)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("torch", nargs="+", help="versions of torch, e.g. 2.11.0")
    options = parser.parse_args()
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    results = []
    for version in options.torch:
        with tempfile.TemporaryDirectory() as folder:
            results.append(check(options.wheel.resolve(), version, Path(folder)))
    sys.exit(not all(results))


if __name__ == "__main__":
    main()
