"""The proof proves itself: every planted bug is noticed by values, a sanitizer or a trace."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import cuda_host
from tests.support.cuda_mutants import MUTANTS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(cuda_host.unavailable() is not None, reason=str(cuda_host.unavailable())),
]
ROOT = Path(__file__).resolve().parents[1]
MEMORY, CONV = "tests/test_cuda_memory_bound.py", "tests/test_cuda_conv.py"
CONV_FILES = ("conv_",)
SANITIZER = {
    "LD_PRELOAD": "libasan.so",
    "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1:verify_asan_link_order=0",
}


def noticed(kernels: Path, suite: str, variant: str, selection: str = "") -> bool:
    """Whether the suite fails on these kernels; a build that fails is an error, not a notice."""
    cuda_host.build(variant, kernels)
    environment = {
        **os.environ,
        "FASTALEX_HOST_CUDA": variant,
        "FASTALEX_CUDA_KERNELS": str(kernels),
    }
    if variant == "address":
        found = subprocess.run(
            ["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
        )
        environment |= SANITIZER | {"LD_PRELOAD": found.stdout.strip()}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", suite]
    marker = "slow" if suite.endswith("traces.py") else "not slow"
    command += ["-m", marker, *(["-k", selection] if selection else [])]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True).returncode == 1


@pytest.mark.parametrize("mutant", MUTANTS, ids=[m.name for m in MUTANTS])
def test_mutant_is_noticed(mutant, tmp_path):
    kernels = tmp_path / "cuda"
    shutil.copytree(cuda_host.KERNELS, kernels)
    path = kernels / mutant.file
    text = path.read_text()
    assert text.count(mutant.old) >= 1, "the pattern is gone: mend the mutant"
    path.write_text(text.replace(mutant.old, mutant.new))
    suite = CONV if mutant.file.startswith(CONV_FILES) else MEMORY
    gates = [(suite, "plain"), (suite, "address"), ("tests/test_cuda_traces.py", "trace")]
    assert any(noticed(kernels, *gate) for gate in gates), "SURVIVED"
