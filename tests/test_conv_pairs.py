"""Direct bfloat16 convolutions, whose sums go by pairs of channels where the processor multiplies those."""

from __future__ import annotations

import pathlib

import pytest
import torch
import torch.nn.functional as F

import fastalex
from fastalex import _native, ops
from tests.support.bounds import assert_within, rounding

pytestmark = pytest.mark.skipif(_native.error is not None, reason=str(_native.error))

CASES = {  # input, weight, stride, padding, dilation, groups
    "pointwise": ((3, 34, 9, 11), (50, 34, 1, 1), 1, 0, 1, 1),
    "pointwise groups": ((2, 24, 8, 8), (36, 6, 1, 1), 1, 0, 1, 4),
    "strided": ((2, 16, 13, 10), (33, 16, 3, 3), 2, 1, 1, 1),
    "strided pointwise": ((2, 64, 9, 9), (16, 64, 1, 1), 2, 0, 1, 1),
    "dilated": ((1, 12, 14, 15), (20, 12, 3, 2), 1, 2, 2, 1),
    "many terms": ((1, 640, 5, 5), (48, 640, 1, 1), 1, 0, 1, 1),
    "one channel a group is no pair": ((2, 8, 7, 7), (8, 1, 3, 3), 1, 1, 1, 8),
    "odd channels are no pairs": ((2, 15, 7, 7), (8, 15, 1, 1), 1, 0, 1, 1),
    "one column": ((2, 16, 9, 1), (8, 16, 3, 1), 2, (1, 0), 1, 1),
}


def make(name: str):
    shape, weight_shape, *geometry = CASES[name]
    generator = torch.Generator().manual_seed(len(name))
    x = torch.randn(shape, generator=generator).bfloat16()
    w = torch.randn(weight_shape, generator=generator).bfloat16()
    b = torch.randn(weight_shape[0], generator=generator).bfloat16()
    return x.contiguous(memory_format=torch.channels_last), w, b, geometry


def bound(x, w, b, geometry) -> torch.Tensor:
    """A float32 sum of n terms and a bias errs by n + 1 roundings of at most the sum of magnitudes, and is rounded.

    The instruction takes subnormal operands for zero, which 2^-126 a term covers.
    """
    stride, padding, dilation, groups = geometry
    magnitude = F.conv2d(x.abs(), w.abs(), b.abs(), stride, padding, dilation, groups)
    terms = w[0].numel()
    error = (terms + 1) * (torch.finfo(torch.float32).eps * magnitude + 2.0**-126)
    return error + rounding(magnitude, torch.bfloat16)


def check(x, w, b, geometry) -> torch.Tensor:
    with fastalex.use_backend("cpu"), torch.no_grad():
        actual = ops.conv2d_relu(x, w, b, *geometry)
    wide = [tensor.double() for tensor in (x, w, b)]
    expected = F.relu(F.conv2d(*wide, *geometry))
    assert_within(actual, expected, bound(*wide, geometry))
    return actual


@pytest.mark.parametrize("isa", _native.available_isas() if _native.error is None else ())
@pytest.mark.parametrize("name", CASES)
def test_within_the_bound_of_a_float32_sum(name, isa):
    before = _native.isa()
    _native.set_isa(isa)
    try:
        check(*make(name))
    finally:
        _native.set_isa(before)


@pytest.mark.parametrize("name", ["pointwise", "strided"])
def test_inputs_that_hold_no_aligned_pairs(name):
    x, w, b, geometry = make(name)
    expected = check(x, w, b, geometry)
    flat = torch.empty(x.numel() + 1, dtype=x.dtype)[1:]  # two bytes off
    shifted = flat.as_strided(x.shape, x.stride(), 1).copy_(x)
    planes = x.contiguous()
    wider = torch.empty(x.shape[0], *x.shape[2:], x.shape[1] + 1, dtype=x.dtype)
    odd_pixels = wider.permute(0, 3, 1, 2)[:, 1:].copy_(x)
    for other in (shifted, planes, odd_pixels):
        assert torch.equal(other, x)
        check(other, w, b, geometry)
    assert torch.equal(
        check(x.clone(memory_format=torch.preserve_format), w, b, geometry), expected
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_come_out_where_torch_has_them(value):
    x, w, b, geometry = make("strided")
    x[0, 5, 3, 4] = value
    with torch.no_grad():
        actual = ops.conv2d_relu(x, w, b, *geometry).float()
        expected = F.relu(F.conv2d(x.float(), w.float(), b.float(), *geometry))
    assert torch.equal(actual.isnan(), expected.isnan())
    assert torch.equal(actual.isinf(), expected.isinf())


def test_a_weight_is_packed_for_pairs_and_for_others_apart():
    x, w, b, geometry = make("pointwise")
    first = check(x, w, b, geometry)
    check(x.contiguous(), w, b, geometry)
    assert torch.equal(check(x, w, b, geometry), first)
    w.neg_()
    assert not torch.equal(check(x, w, b, geometry), first)


def test_with_residual_pool_and_gradients():
    x, w, b, geometry = make("pointwise")
    residual = torch.randn(3, 50, 9, 11).bfloat16().contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        parts = ops.max_pool2d(ops.conv2d_relu(x, w, b), 3, 2)
        merged = ops.conv2d_relu_max_pool2d(x, w, b, pool_size=3, pool_stride=2)
    assert torch.equal(parts, merged)
    inference = torch.ops.fastalex_cpu.conv_inference
    numbers = torch.tensor([1, 1, 0, 0, 1, 1, 1, 1], dtype=torch.float64)
    actual = inference(x, w, None, b, residual, numbers)
    wide = [tensor.double() for tensor in (x, w, b, residual)]
    sums = F.conv2d(*wide[:3]) + wide[3]
    limit = bound(*wide[:3], geometry) + rounding(wide[3], torch.bfloat16)
    assert_within(actual, F.relu(sums), limit + rounding(sums, torch.bfloat16))
    leaves = [tensor.clone().requires_grad_() for tensor in (x, w, b)]
    ops.conv2d_relu(*leaves).float().sum().backward()
    assert all(leaf.grad is not None and leaf.grad.isfinite().all() for leaf in leaves)


def has_pairs() -> bool:
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    return cpuinfo.exists() and "avx512_bf16" in cpuinfo.read_text() and _native.isa() == "avx512"


def test_explain_says_so(capsys):
    x, w, b, _ = make("pointwise")
    fastalex.explain("conv_relu", x, w, b)
    assert ("direct by pairs of bfloat16" in capsys.readouterr().out) == has_pairs()
    fastalex.explain("conv_relu", x.float(), w.float(), b.float())
    assert "pairs" not in capsys.readouterr().out
