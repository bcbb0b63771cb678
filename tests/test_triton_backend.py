"""How calls reach the Triton backend: chosen, refused, and imported only then; needs no GPU."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fastalex
from fastalex import BackendError, _tuning, ops
from fastalex._explain import explanation
from fastalex.ops import _triton

CALLS = {"lrn": (5,), "max_pool": (3, 2), "lrn_max_pool": (5,)}


def fake(*shape, dtype=torch.float32):
    with FakeTensorMode():
        return torch.empty(shape, dtype=dtype, device="cuda")


def measured(monkeypatch, backend):
    """Every call was measured, and this backend won; None: no call was."""
    choice = backend and _tuning.Choice(backend)
    monkeypatch.setattr(_tuning, "recorded", lambda op, args: choice)


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


def test_a_convolution_runs_on_triton_when_forced_or_measured_faster(triton, monkeypatch):
    call = ("conv_relu", fake(2, 8, 9, 9), fake(4, 8, 3, 3))
    measured(monkeypatch, None)
    text = explanation(*call)
    assert text.startswith("conv_relu: runs on torch\n")
    assert "not measured against cuDNN yet" in text
    with fastalex.use_backend("triton"):
        assert explanation(*call).startswith("conv_relu: runs on triton (forced)\n")
    measured(monkeypatch, "triton")
    assert explanation(*call).startswith("conv_relu: runs on triton\n")
    measured(monkeypatch, "torch")
    assert "triton  no: torch was measured faster" in explanation(*call)


def test_explain_names_the_configuration_and_why(triton, monkeypatch):
    measured(monkeypatch, None)
    assert "launch 128 lanes, 4 warps (expected best of 2)" in explanation(
        "lrn", fake(2, 8, 9, 9), 5
    )
    text = explanation("conv_relu", fake(2, 8, 9, 9), fake(4, 8, 3, 3), None, 1, 1)
    assert "tile 64x16x" in text


@pytest.mark.parametrize("which", [0, 1])
def test_a_convolutions_gradient_names_the_tiles_it_would_use(triton, monkeypatch, which):
    kernels = ops.conv_relu.CONV_RELU_BACKWARD.kernels
    output, mask = fake(2, 4, 7, 7), [which == 0, which == 1, False]
    call = (output, output, fake(2, 8, 9, 9), fake(4, 8, 3, 3), (1, 1), (0, 0), (1, 1), 1, mask)
    measured(monkeypatch, None)
    assert kernels.choose(*call).backend == "torch"
    measured(monkeypatch, "triton")
    assert kernels.choose(*call).backend == "triton"
    text = kernels.explain(*call)
    assert ("input_tile" in text, "weight_tile" in text) == (which == 0, which == 1)


def test_without_triton_the_reason_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(_triton, "missing", lambda: "Triton is not installed: pip install triton")
    text = explanation("lrn", fake(2, 96, 55, 55), 5)
    assert not text.startswith("lrn: runs on triton\n")
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
