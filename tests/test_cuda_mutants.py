"""The proof proves itself: every planted bug is noticed by the gate that is named for it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

import pytest

from tests.support import cuda_host
from tests.support.cuda_mutants import MUTANTS
from tests.test_cuda_sanitizers import CONV, HOPPER, MEMORY, ROOT, sanitized

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(cuda_host.unavailable() is not None, reason=str(cuda_host.unavailable())),
]
CASES, TRACES = "tests/test_cuda_cases.py", "tests/test_cuda_traces.py"
VARIANTS = {"values": "plain", "address": "address", "trace": "trace"}
NOTICES = r"(?m)^FAILED |AddressSanitizer|runtime error:"


def report(gate: str, mutant, library) -> str:
    """What the gate's tests say of a library: the first failure ends them."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "FASTALEX_HOST_CUDA_LIBRARY": str(library)}
    environment["FASTALEX_HOST_CUDA"] = VARIANTS[gate]
    if gate == "address":
        environment |= sanitized("libasan.so")
    suites = [HOPPER] if "conv_wgmma" in mutant.units else [CONV, CASES]
    if not any("conv" in unit for unit in mutant.units):
        suites = [MEMORY, CASES]
    selection = "tf32" if "tf32" in mutant.name else "float16 or schedule or nan or torch"
    # A sanitizer ends the process, and with it what pytest had captured of its words: -s.
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-s", "-p", "no:cacheprovider"]
    if gate == "trace":
        command += [TRACES]
    else:
        command += [*suites, "-m", "not slow and not gpu", "-k", selection]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    return done.stdout + done.stderr


@pytest.mark.parametrize("gate", VARIANTS)
def test_gates_are_silent_where_nothing_is_planted(gate):
    said = report(gate, MUTANTS[0], cuda_host.build(VARIANTS[gate]))
    assert re.search(r"\d+ passed", said) or "[100%]" in said, said[-3000:]
    assert not re.search(NOTICES, said), said[-3000:]


@pytest.mark.parametrize("mutant", MUTANTS, ids=[m.name for m in MUTANTS])
def test_mutant_is_noticed(mutant, tmp_path):
    kernels = tmp_path / "cuda"
    shutil.copytree(cuda_host.KERNELS, kernels)
    path = kernels / mutant.file
    text = path.read_text()
    assert text.count(mutant.old) >= 1, "the pattern is gone: mend the mutant"
    path.write_text(text.replace(mutant.old, mutant.new))
    library = cuda_host.build(VARIANTS[mutant.gate], kernels, mutant.units)
    said = report(mutant.gate, mutant, library)
    assert re.search(NOTICES, said), f"SURVIVED {mutant.gate}\n{said[-2000:]}"
