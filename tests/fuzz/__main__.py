"""``python -m tests.fuzz SECONDS``: each fuzzer for so long, from the corpora beside it; exits with 1 at a finding.

What a run adds to the corpora, and the inputs of findings, go to build/fuzz.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.support.native_build import program

HERE = Path(__file__).parent
BUILD = HERE.parents[1] / "build" / "fuzz"
#: libFuzzer's: bytes of an input, and MiB that one may make the process take.
LIMITS = {"conv": (64, 2048), "weights": (8192, 4096)}


def clang() -> str:
    """CLANG, or the first clang++ on PATH, newest first."""
    names = [os.environ.get("CLANG", "clang++"), *(f"clang++-{n}" for n in range(30, 13, -1))]
    found = next((name for name in names if shutil.which(name)), None)
    if found is None:
        sys.exit("fuzz: no clang++: apt install clang libclang-rt-dev, or set CLANG")
    return found


def command(name: str) -> list[str]:
    """How a fuzzer starts."""
    if name == "conv":
        return [str(program(HERE / "fuzz_conv.cpp", "fuzz", clang()))]
    if importlib.util.find_spec("atheris") is None:
        sys.exit("fuzz: atheris is not installed: pip install atheris")
    return [sys.executable, "-m", "tests.fuzz.fuzz_weights"]


def run(name: str, seconds: int) -> bool:
    """Whether nothing was found; shows libFuzzer's statistics."""
    folder = BUILD / name
    (folder / "corpus").mkdir(parents=True, exist_ok=True)
    longest, memory = LIMITS[name]
    log = folder / "log"
    with log.open("w") as out:
        done = subprocess.run(
            [
                *command(name),
                f"-max_total_time={seconds}",
                f"-max_len={longest}",
                f"-rss_limit_mb={memory}",
                "-len_control=0",
                "-timeout=30",
                "-print_final_stats=1",
                f"-artifact_prefix={folder}/",
                str(folder / "corpus"),
                str(HERE / "corpus" / name),
            ],
            stdout=out,
            stderr=subprocess.STDOUT,
            check=False,
        )
    lines = [line for line in log.read_text(errors="replace").splitlines() if "stat::" in line]
    inputs = next((line.rpartition(" ")[2] for line in lines if "number_of_exec" in line), "no")
    verdict = "nothing found" if done.returncode == 0 else f"a FINDING, see {log}"
    print(f"{name}: {inputs} inputs in {seconds} s, {verdict}", flush=True)
    return done.returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("seconds", type=int)
    parser.add_argument("names", nargs="*", default=list(LIMITS), metavar="conv|weights")
    options = parser.parse_args()
    results = [run(name, options.seconds) for name in options.names]
    sys.exit(not all(results))


if __name__ == "__main__":
    main()
