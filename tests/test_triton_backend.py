"""How calls reach the Triton backend: chosen, refused, and imported only then; needs no GPU."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fastalex
from fastalex import BackendError, ops
from fastalex._explain import explanation
from fastalex.ops import _triton

CALLS = {"lrn": (5,), "max_pool": (3, 2), "lrn_max_pool": (5,)}


def fake(*shape, dtype=torch.float32):
    with FakeTensorMode():
        return torch.empty(shape, dtype=dtype, device="cuda")


def tuned_for(monkeypatch, *options):
    """Every call has a tuning record for these options."""
    tune = _triton._module("_tune")
    monkeypatch.setattr(
        tune, "remembered", lambda op, option, args: object() if option in options else None
    )


@pytest.fixture
def triton():
    """Skips where there is none."""
    return pytest.importorskip("triton")


@pytest.mark.parametrize("op", CALLS)
def test_cuda_tensors_run_on_triton(triton, op):
    assert explanation(op, fake(2, 96, 55, 55), *CALLS[op]).startswith(f"{op}: runs on triton\n")


@pytest.mark.parametrize("op", CALLS)
def test_what_the_kernels_refuse_runs_on_torch(triton, op):
    text = explanation(op, fake(2, 96, 55, 55, dtype=torch.float64), *CALLS[op])
    assert text.startswith(f"{op}: runs on torch\n")
    assert "float64" in text


def test_a_convolution_runs_on_triton_when_forced_or_tuned(triton, monkeypatch):
    call = ("conv_relu", fake(2, 8, 9, 9), fake(4, 8, 3, 3))
    tuned_for(monkeypatch)
    text = explanation(*call)
    assert text.startswith("conv_relu: runs on torch\n")
    assert "only when forced, or tuned" in text
    with fastalex.use_backend("triton"):
        assert explanation(*call).startswith("conv_relu: runs on triton (forced)\n")
    tuned_for(monkeypatch, "tile")
    assert explanation(*call).startswith("conv_relu: runs on triton\n")


@pytest.mark.parametrize("option", ["input_tile", "weight_tile"])
def test_a_convolutions_gradient_runs_on_triton_when_tuned(triton, monkeypatch, option):
    kernels = ops.conv_relu.CONV_RELU_BACKWARD.kernels
    output, mask = fake(2, 4, 7, 7), [True, True, False]
    call = (output, output, fake(2, 8, 9, 9), fake(4, 8, 3, 3), (1, 1), (0, 0), (1, 1), 1, mask)
    tuned_for(monkeypatch)
    assert kernels.choose(*call).backend == "torch"
    tuned_for(monkeypatch, option)
    assert kernels.choose(*call).backend == "triton"


def test_without_triton_the_reason_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(_triton, "missing", lambda: "Triton is not installed: pip install triton")
    text = explanation("lrn", fake(2, 96, 55, 55), 5)
    assert text.startswith("lrn: runs on torch\n")
    assert "pip install triton" in text


def test_a_cpu_tensor_is_refused_when_forced(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with (
        fastalex.use_backend("triton"),
        pytest.raises(BackendError, match="CUDA tensors, and this one is on cpu"),
    ):
        ops.local_response_norm(torch.zeros(1, 2, 3, 3), 5)


def test_calls_on_the_cpu_import_no_triton():
    """Nor need it: here it cannot be imported at all."""
    code = (
        "import os, sys; os.environ.pop('TRITON_INTERPRET', None); sys.modules['triton'] = None\n"
        "import torch, fastalex\n"
        "x = torch.randn(1, 8, 9, 9)\n"
        "fastalex.ops.conv2d_relu(x, torch.randn(4, 8, 3, 3))\n"
        "fastalex.ops.lrn_max_pool2d(x, 5)\n"
        "fastalex.explain('lrn', x, 5)\n"
        "assert not [m for m in sys.modules if m.startswith('fastalex.kernels')]"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
