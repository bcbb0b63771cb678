"""Runs the interpreter tests of the Triton backend where Triton will heed the variable: in a
process of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
HERE = Path(__file__).parent


@pytest.mark.parametrize(
    "selection", ["not slow", pytest.param("slow", marks=pytest.mark.slow)], ids=["quick", "slow"]
)
@pytest.mark.parametrize(
    "name", ["test_triton_interpret.py", "test_triton_interpret_conv.py", "test_triton_traffic.py"]
)
def test_in_the_interpreter(name, selection):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-m", selection, str(HERE / name)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=HERE.parent)
    assert run.returncode in (0, 5), run.stdout + run.stderr  # 5: nothing selected


def test_importing_the_package_imports_no_triton():
    code = "import sys, fastalex.kernels; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
