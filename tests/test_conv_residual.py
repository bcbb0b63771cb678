"""The convolution that ends a residual block, relu(conv2d(x, w) + residual), against float64."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastalex
from fastalex.ops import _cpu_conv
from tests.support.backends import BACKENDS, running
from tests.test_conv_engine import assert_direct, assert_winograd

ENGINES = {"direct": 1, "winograd": 2}
LAYOUTS = {"nhwc": torch.channels_last, "nchw": torch.contiguous_format}
#: input, filters, kernel, stride, padding, groups.
CASES = {
    "pointwise, flat bands": ((3, 24, 11, 7), 64, 1, 1, 0, 1),
    "pointwise, tails": ((2, 17, 9, 8), 53, 1, 1, 0, 1),
    "3x3, tails": ((2, 19, 12, 17), 35, 3, 1, 1, 1),
    "3x3, strided, groups": ((2, 16, 13, 15), 40, 3, 2, 1, 2),
    "5x5, several bands": ((4, 8, 40, 37), 32, 5, 1, 2, 1),
}


@contextmanager
def forced(engine: str) -> Iterator[None]:
    torch.ops.fastalex_cpu.force_conv_engine(ENGINES[engine], 0)
    try:
        yield
    finally:
        torch.ops.fastalex_cpu.force_conv_engine(0, 0)


def arguments(case: str, dtype: torch.dtype, layout: str, other: str) -> tuple:
    shape, filters, kernel, stride, padding, groups = CASES[case]
    x = torch.randn(shape).to(dtype).contiguous(memory_format=LAYOUTS[layout])
    terms = shape[1] // groups * kernel * kernel
    weight = (torch.randn(filters, shape[1] // groups, kernel, kernel) * terms**-0.5).to(dtype)
    bias = torch.randn(filters).to(dtype)
    geometry = ((stride, stride), (padding, padding), (1, 1), groups)
    map = F.conv2d(x.float(), weight.float(), None, *geometry)
    residual = torch.randn_like(map).to(dtype).contiguous(memory_format=LAYOUTS[other])
    return x, weight, bias, geometry, residual


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("case", CASES)
def test_equals_the_sum_of_both(backend, dtype, engine, case):
    for layout in LAYOUTS:
        for other in LAYOUTS:
            x, weight, bias, geometry, residual = arguments(case, dtype, layout, other)
            with running(backend), forced(engine):
                chosen = _cpu_conv.plan(x, weight, bias, *geometry)
                for relu in (False, True):
                    out = _cpu_conv.inference(x, weight, None, bias, *geometry, relu, residual)
                    assert out.stride() == F.conv2d(x, weight, bias, *geometry).stride()
                    wide = [t.double() for t in (x, weight, bias, residual)]
                    expected = F.conv2d(*wide[:3], *geometry) + wide[3]
                    expected = expected.relu() if relu else expected
                    if "winograd" in chosen and dtype is torch.float32:
                        assert_winograd(out, expected)
                    elif "winograd" not in chosen:
                        size = [t.abs() for t in wide]
                        magnitude = F.conv2d(*size[:3], *geometry) + size[3]
                        # One term more than the convolution has: the residual.
                        assert_direct(out, expected, magnitude, weight[0].numel() + 1)
                    else:
                        # Winograd's norm bound, and one rounding of each result to its type.
                        error = (out.double() - expected).norm()
                        rounding = torch.finfo(dtype).eps / 2
                        assert error <= (1e-5 + rounding) * expected.norm()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("few", [True, False])
def test_nan_and_infinities_stay_where_they_belong(engine, few):
    x, weight, bias, geometry, residual = arguments("3x3, tails", torch.float32, "nhwc", "nhwc")
    for at in range(1 if few else x.shape[3]):
        x[0, 2, 3, at] = float("nan")
        x[1, 1, at % x.shape[2], at] = float("inf")
    residual[0, 1, 9, 9] = float("nan")
    residual[1, 3, 9, 9] = float("-inf")
    with forced(engine):
        out = _cpu_conv.inference(x, weight, None, bias, *geometry, True, residual)
    expected = F.relu(F.conv2d(x, weight, bias, *geometry) + residual)
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.isinf(), expected.isinf())
    finite = expected.isfinite()
    # The bound of the engine's documented precision, on what is finite.
    assert (out - expected)[finite].norm() <= 2e-5 * expected[finite].norm()


def test_a_residual_of_another_shape_or_dtype_is_refused():
    x, weight, bias, geometry, residual = arguments("3x3, tails", torch.float32, "nhwc", "nhwc")
    for wrong in (residual[:, :1], residual.double(), residual[:1]):
        with pytest.raises(RuntimeError, match="residual has the output's sizes"):
            _cpu_conv.inference(x, weight, None, bias, *geometry, True, wrong)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(16)

    def forward(self, x, other):
        return torch.relu(self.bn(self.conv(x)) + other)


@pytest.mark.parametrize("shape", [(2, 16, 9, 9), (1, 16, 1, 1), (2, 1, 9, 9), (9,)])
def test_optimize_merges_what_is_not_broadcast(monkeypatch, shape):
    residuals = []
    run = _cpu_conv.inference
    monkeypatch.setattr(
        _cpu_conv, "inference", lambda *args: residuals.append(args[-1]) or run(*args)
    )
    block, x, other = Block().eval(), torch.randn(2, 16, 9, 9), torch.randn(shape)
    kept = other.clone()
    with torch.no_grad():
        expected = block(x, other)
        fastalex.optimize(block)
        actual = block(x, other)
    assert [residual is not None for residual in residuals] == [shape == x.shape]
    assert torch.equal(other, kept)
    assert (actual - expected).norm() <= 1e-5 * expected.norm()


def test_gradients_go_the_way_they_went():
    block, other = Block().eval(), torch.randn(2, 16, 9, 9, requires_grad=True)
    x = torch.randn(2, 16, 9, 9)
    (expected,) = torch.autograd.grad(block(x, other).square().sum(), other)
    fastalex.optimize(block)
    (actual,) = torch.autograd.grad(block(x, other).square().sum(), other)
    assert (actual - expected).norm() <= 1e-4 * expected.norm()
