"""Runs the interpreter tests of the Triton backend where Triton will heed the variable: in a
process of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from fastalex.kernels.conv_relu import refuse_conv_relu
from fastalex.kernels.lrn import refuse_lrn
from fastalex.kernels.lrn_max_pool import refuse_lrn_max_pool
from fastalex.kernels.max_pool import refuse_max_pool, refuse_max_pool_backward

HERE = Path(__file__).parent
INTERPRETED = [*sorted(HERE.glob("test_triton_interpret*.py")), HERE / "test_triton_traffic.py"]


@pytest.mark.parametrize(
    "selection", ["not slow", pytest.param("slow", marks=pytest.mark.slow)], ids=["quick", "slow"]
)
def test_in_the_interpreter(selection):
    """In one process: starting another costs as much as dozens of these tests."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-m", selection, *map(str, INTERPRETED)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=HERE.parent)
    assert run.returncode == 0, run.stdout + run.stderr


def test_importing_the_package_imports_no_triton():
    code = "import sys, fastalex.kernels; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


ONE, NONE = (1, 1), (0, 0)


@pytest.fixture
def interpreting(monkeypatch):
    """Tensors of any device are taken: what else is refused then shows."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")


def test_a_cpu_tensor_is_refused_with_a_mend(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x, w = torch.empty(1, 4, 5, 5), torch.empty(8, 4, 3, 3)
    for reason in (
        refuse_lrn(x, 5, 1e-4, 0.75, 1.0, 1),
        refuse_max_pool(x, (3, 3), ONE, NONE, ONE, False, True),
        refuse_lrn_max_pool(x, 5, 1e-4, 0.75, 1.0, 1, (3, 3), ONE, NONE, False, True),
        refuse_conv_relu(x, w, None, ONE, NONE, ONE, 1),
    ):
        assert "not on a CUDA device" in reason


def test_what_can_be_served_is_not_refused(interpreting):
    x, w = torch.empty(1, 4, 5, 5, dtype=torch.bfloat16), torch.empty(8, 2, 3, 3).bfloat16()
    assert refuse_lrn(x, 5, 1e-4, 0.75, 1.0, 2) is None
    assert refuse_lrn(x.flatten(2), 5, 1e-4, 0.75, 1.0, 2) is None
    assert refuse_max_pool(x, (3, 3), ONE, ONE, ONE, True, False) is None
    assert refuse_conv_relu(x, w, None, ONE, NONE, ONE, 2) is None


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        (lambda x: refuse_lrn(x.double(), 5, 1.0, 0.75, 1.0, 1), "float64"),
        (lambda x: refuse_lrn(x, 5, 1.0, 0.75, 1.0, 3), "3 groups"),
        (lambda x: refuse_lrn(x[0, 0], 5, 1.0, 0.75, 1.0, 1), "[N, C, ...]"),
        (lambda x: refuse_lrn(x, 5, 1.0, 2.0, -1.0, 1), "negative base"),
        (lambda x: refuse_max_pool(x[0], (3, 3), ONE, NONE, ONE, False, True), "not 4"),
        (lambda x: refuse_max_pool(x, (3, 3), ONE, (2, 2), ONE, False, True), "half the window"),
        (lambda x: refuse_max_pool(x, (7, 7), ONE, NONE, ONE, False, True), "smaller"),
        (
            lambda x: refuse_max_pool_backward(x, x, (5, 5), (3, 3), ONE, NONE, ONE),
            "offsets are torch.float32",
        ),
        (lambda x: refuse_conv_relu(x, x.half(), None, ONE, NONE, ONE, 1), "one type"),
        (lambda x: refuse_conv_relu(x, x, None, ONE, NONE, ONE, 2), "2 groups"),
        (lambda x: refuse_conv_relu(x, x, x[0, 0, 0], ONE, NONE, ONE, 1), "bias"),
    ],
)
def test_a_refusal_names_its_reason(interpreting, reason, words):
    assert words in reason(torch.empty(1, 4, 5, 5))
