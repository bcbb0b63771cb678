"""``python -m tests.support.abi_check WHEEL TORCH...``: one wheel in a fresh environment of every torch named.

Each installation runs the tour of the package, at the CPU's best instruction set and capped to each lower one.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import venv
from pathlib import Path

from tests.support.packaging import TOUR, run


def check(wheel: Path, torch: str, folder: Path) -> bool:
    """Whether the tour runs on the CPU library; prints what was said where it does not."""
    venv.create(folder, with_pip=True)
    python = str(folder / "bin/python")
    done = run(
        [python, "-m", "pip", "install", "-q", f"torch=={torch}", "numpy", str(wheel)], folder
    )
    if done.code != 0:
        print(f"torch {torch}: not installed\n{done.text}")
        return False
    works = True
    for isa in ("avx512", "avx2", "portable"):
        tour = run([python, "-c", TOUR], folder, FASTALEX_CPU_ISA=isa)
        passed = (
            tour.code == 0 and f"torch {torch}" in tour.text and "lrn: runs on cpu" in tour.text
        )
        print(f"torch {torch}, at most {isa}: {'works' if passed else 'FAILS'}")
        if not passed:
            print(tour.text)
        works = works and passed
    return works


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("torch", nargs="+", help="versions of torch, e.g. 2.11.0")
    options = parser.parse_args()
    results = []
    for version in options.torch:
        with tempfile.TemporaryDirectory() as folder:
            results.append(check(options.wheel.resolve(), version, Path(folder)))
    sys.exit(not all(results))


if __name__ == "__main__":
    main()
