"""Random shapes, layouts, dtypes and geometry on the best CPU kernels, against the float64 reference."""

from __future__ import annotations

import os
from typing import Any

import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastalex
from fastalex import reference, use_backend
from fastalex._geometry import is_channels_last, pooled_size
from fastalex.ops.conv_relu import CONV_RELU, CONV_RELU_BACKWARD
from fastalex.ops.linear_relu import LINEAR_RELU, LINEAR_RELU_BACKWARD
from fastalex.ops.lrn import LRN, LRN_BACKWARD
from fastalex.ops.lrn_max_pool import LRN_MAX_POOL, LRN_MAX_POOL_BACKWARD
from fastalex.ops.max_pool import MAX_POOL, MAX_POOL_BACKWARD
from tests.support import bounds
from tests.support.cases import DTYPES, LAYOUTS, UNUSUAL_LAYOUTS, lay_out, with_specials

#: Many more: FASTALEX_EXAMPLES=20000.
examples = settings(
    max_examples=int(os.environ.get("FASTALEX_EXAMPLES", "300")),
    deadline=None,
    print_blob=True,
    database=None,
    # The autouse fixtures only set what every example may share.
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

layouts = st.sampled_from(LAYOUTS + UNUSUAL_LAYOUTS)
dtypes = st.sampled_from(DTYPES)
seeds = st.integers(0, 2**31)


def numbers(shape: tuple[int, ...], dtype: torch.dtype, layout: str, seed: int) -> Tensor:
    """Normal values, drawn by hypothesis through their seed alone: shrinking them explains nothing."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, dtype=torch.float64, generator=generator)
    return lay_out(values.to(dtype), layout)


@st.composite
def lrn_arguments(draw: st.DrawFn) -> tuple[int, tuple[int, float, float, float, int]]:
    """Channels, which groups divide, and (size, scale, beta, k, groups) with k + scale * squares away from zero."""
    groups = draw(st.sampled_from((1, 1, 2, 3, 4)))
    channels = groups * draw(st.one_of(st.integers(1, 9), st.integers(10, 70)))
    size = draw(st.one_of(st.just(5), st.integers(1, 12)))
    scale = draw(st.sampled_from((0.0, 2e-5, 0.06, 0.5)))
    beta = draw(st.sampled_from((0.5, 0.75, 1.0, 0.0, 0.6, 2.0)))
    k = draw(st.sampled_from((1.0, 2.0, 0.5)))
    return channels, (size, scale, beta, k, groups)


@st.composite
def pooled_dimension(draw: st.DrawFn, ceil_mode: bool, dilated: bool) -> tuple[int, ...]:
    """(input size, kernel, stride, padding, dilation) with room for a window."""
    kernel = draw(st.one_of(st.just(3), st.integers(1, 7), st.just(17)))
    stride = draw(st.integers(1, 5))
    padding = draw(st.integers(0, kernel // 2))
    dilation = draw(st.integers(1, 3)) if dilated else 1
    size = draw(st.integers(1, 40))
    assume(pooled_size(size, kernel, stride, padding, dilation, ceil_mode) >= 1)
    return size, kernel, stride, padding, dilation


@st.composite
def pools(draw: st.DrawFn, dilated: bool) -> tuple[Any, ...]:
    """((height, width), kernel, stride, padding, dilation, ceil_mode), each pair (height, width)."""
    ceil_mode = draw(st.booleans())
    both = [draw(pooled_dimension(ceil_mode, dilated)) for _ in range(2)]
    return *zip(*both, strict=True), ceil_mode


def assert_laid_out_as(result: Tensor, like: Tensor) -> None:
    if is_channels_last(like):
        assert result.is_contiguous(memory_format=torch.channels_last)
    elif like.is_contiguous():
        assert result.is_contiguous()


@examples
@given(
    lrn=lrn_arguments(),
    batch=st.integers(0, 3),
    trailing=st.lists(st.integers(1, 24), min_size=1, max_size=3),
    dtype=dtypes,
    layout=layouts,
    grad_layout=layouts,
    seed=seeds,
)
def test_lrn(lrn, batch, trailing, dtype, layout, grad_layout, seed):
    channels, arguments = lrn
    shape = (batch, channels, *trailing)
    assume(torch.Size(shape).numel() <= 40_000)
    x = numbers(shape, dtype, layout, seed)
    g = numbers(shape, dtype, grad_layout, seed + 1)
    with use_backend("cpu"):
        y = LRN.run(x, *arguments)
        gx = LRN_BACKWARD.run(g, x, *arguments)
    assert y.dtype is gx.dtype is dtype
    wide, wide_g = x.double(), g.double()
    expected = reference.lrn(wide, *arguments)
    bounds.assert_within(y, expected, bounds.lrn_bound(wide, arguments, dtype))
    expected = reference.lrn_backward(wide_g, wide, *arguments)
    bound = bounds.lrn_backward_bound(wide_g, wide, arguments, dtype)
    bounds.assert_within(gx, expected, bound + bounds.rounding(expected, dtype))
    for result in (y, gx) if x.dim() == 4 else ():
        assert_laid_out_as(result, x)


@examples
@given(
    pool=pools(dilated=True),
    batch=st.integers(0, 3),
    channels=st.integers(1, 40),
    dtype=dtypes,
    layout=layouts,
    grad_layout=layouts,
    values=st.sampled_from(("normal", "ties", "specials")),
    seed=seeds,
)
def test_max_pool(pool, batch, channels, dtype, layout, grad_layout, values, seed):
    """Outputs and winners are the reference's exactly; gradients sum at most one term a window element."""
    size, *geometry, ceil_mode = pool
    shape = (batch, channels, *size)
    assume(torch.Size(shape).numel() <= 20_000)
    x = numbers(shape, dtype, "contiguous", seed)
    if values != "normal":
        x = x.round()
    x = lay_out(with_specials(x) if values == "specials" else x, layout)
    with use_backend("cpu"):
        y, offsets = MAX_POOL.run(x, *geometry, ceil_mode, True)
        alone, nothing = MAX_POOL.run(x, *geometry, ceil_mode, False)
        g = numbers(tuple(y.shape), dtype, grad_layout, seed + 1)
        gx = MAX_POOL_BACKWARD.run(g, offsets, size, *geometry)
    expected, expected_offsets = reference.max_pool(x.double(), *geometry, ceil_mode, True)
    for output in (y, alone):
        torch.testing.assert_close(output.double(), expected, rtol=0, atol=0, equal_nan=True)
        assert_laid_out_as(output, x)
    assert nothing.numel() == 0
    assert y.dtype is alone.dtype is gx.dtype is dtype
    assert torch.equal(offsets, expected_offsets)
    expected = reference.max_pool_backward(g.double(), offsets, size, *geometry)
    magnitude = reference.max_pool_backward(g.double().abs(), offsets, size, *geometry)
    (rows, columns) = geometry[0]
    bounds.assert_within(gx, expected, bounds.sum_bound(magnitude, rows * columns, expected, dtype))
    # The offsets alone tell the backward pass of a layout, and a map of one pixel has none.
    assert_laid_out_as(gx, offsets)


@examples
@given(
    lrn=lrn_arguments(),
    pool=pools(dilated=False),
    batch=st.integers(0, 3),
    dtype=dtypes,
    layout=layouts,
    grad_layout=layouts,
    seed=seeds,
)
def test_lrn_max_pool(lrn, pool, batch, dtype, layout, grad_layout, seed):
    """Each output is within LRN's bound of the float64 maximum, and equals the pair's bit for bit."""
    channels, arguments = lrn
    size, *geometry, ceil_mode = pool
    shape = (batch, channels, *size)
    assume(torch.Size(shape).numel() <= 20_000)
    x = numbers(shape, dtype, layout, seed)
    fused_geometry = geometry[:3]
    with use_backend("cpu"):
        y, offsets = LRN_MAX_POOL.run(x, *arguments, *fused_geometry, ceil_mode, True)
        alone, _ = LRN_MAX_POOL.run(x, *arguments, *fused_geometry, ceil_mode, False)
        pair, winners = MAX_POOL.run(LRN.run(x, *arguments), *geometry, ceil_mode, True)
        g = numbers(tuple(y.shape), dtype, grad_layout, seed + 1)
        gx = LRN_MAX_POOL_BACKWARD.run(g, x, offsets, *arguments, *fused_geometry)
    assert torch.equal(y, pair)
    assert torch.equal(alone, pair)
    assert torch.equal(offsets, winners)
    assert y.dtype is gx.dtype is dtype
    assert_laid_out_as(y, x)
    assert_laid_out_as(gx, x)

    wide = x.double()
    normalised = reference.lrn(wide, *arguments)
    allowed = bounds.lrn_bound(wide, arguments, dtype)
    lowest, highest = (
        reference.max_pool(map, *geometry, ceil_mode, False)[0]
        for map in (normalised - allowed, normalised + allowed)
    )
    assert ((lowest <= y) & (y <= highest)).all()

    # The winners are the forward's own: near ties may fall otherwise in float64.
    pooling = (offsets, size, *geometry)
    unpooled = reference.max_pool_backward(g.double(), *pooling)
    reach = reference.max_pool_backward(g.double().abs(), *pooling)
    expected = reference.lrn_backward(unpooled, wide, *arguments)
    summing = geometry[0][0] * geometry[0][1] * bounds.compute_eps(dtype)
    bound = bounds.lrn_backward_bound(reach, wide, arguments, dtype, summing)
    bounds.assert_within(gx, expected, bound + bounds.rounding(expected, dtype))


@st.composite
def convolved_dimension(draw: st.DrawFn) -> tuple[int, int, int, int, int]:
    """(input size, kernel, stride, padding, dilation) with room for the kernel."""
    kernel = draw(st.one_of(st.just(3), st.integers(1, 7), st.just(11)))
    stride, dilation = draw(st.integers(1, 4)), draw(st.sampled_from((1, 1, 2, 3)))
    padding = draw(st.integers(0, 6))
    size = draw(st.integers(1, 30))
    assume(size + 2 * padding >= dilation * (kernel - 1) + 1)
    return size, kernel, stride, padding, dilation


@examples
@given(
    dimensions=st.tuples(convolved_dimension(), convolved_dimension()),
    batch=st.integers(1, 3),
    groups=st.sampled_from((1, 1, 2, 3)),
    per_group=st.tuples(st.integers(1, 20), st.integers(1, 36)),
    has_bias=st.booleans(),
    dtype=st.sampled_from((torch.float32, torch.bfloat16, torch.float16)),
    layout=layouts,
    grad_layout=layouts,
    precision=st.sampled_from(("highest", "high", "medium")),
    seed=seeds,
)
def test_conv_relu(
    dimensions, batch, groups, per_group, has_bias, dtype, layout, grad_layout, precision, seed
):
    """Direct sums within their bound element by element; Winograd's within its level's, of the largest magnitude."""
    size, kernel, *geometry = zip(*dimensions, strict=True)
    inputs, outputs = (groups * count for count in per_group)
    assume(torch.Size((batch, inputs, *size)).numel() <= 20_000)
    x = numbers((batch, inputs, *size), dtype, layout, seed)
    weight = numbers((outputs, inputs // groups, *kernel), dtype, "contiguous", seed + 1)
    bias = numbers((outputs,), dtype, "contiguous", seed + 2) if has_bias else None
    rest = (*geometry, groups)
    before = fastalex.get_conv_precision()
    fastalex.set_conv_precision(precision)
    try:
        with use_backend("cpu"):
            y = CONV_RELU.run(x, weight, bias, *rest)
            g = numbers(tuple(y.shape), dtype, grad_layout, seed + 3)
            grads = CONV_RELU_BACKWARD.run(g, y, x, weight, *rest, [True, True, True])
    finally:
        fastalex.set_conv_precision(before)
    assert_laid_out_as(y, x)
    wide = [None if t is None else t.double() for t in (x, weight, bias)]
    sizes = [None if t is None else t.abs() for t in wide]
    backward = (g.double(), y.double(), wide[0], wide[1], *rest, [True, True, True])
    absolute = (g.double().abs(), y.double(), sizes[0], sizes[1], *rest, [True, True, True])
    pixels = y[:, 0].numel()
    results = [(y, reference.conv_relu(*wide, *rest), reference.conv_relu(*sizes, *rest))]
    results += zip(
        grads,
        reference.conv_relu_backward(*backward),
        reference.conv_relu_backward(*absolute),
        strict=True,
    )
    summands = (weight[0].numel() + 1, weight[:, 0].numel() // groups, pixels, pixels)
    for (actual, expected, magnitude), count in zip(results, summands, strict=True):
        assert actual.dtype is dtype
        allowed = bounds.sum_bound(magnitude, count, expected, dtype)
        if precision != "highest":
            allowed = allowed + bounds.CONV_PRECISION[precision][1] * magnitude.max()
        bounds.assert_within(actual, expected, allowed)


@examples
@given(
    rows=st.lists(st.integers(0, 9), min_size=0, max_size=2),
    inputs=st.integers(1, 300),
    outputs=st.integers(1, 80),
    has_bias=st.booleans(),
    relu=st.booleans(),
    dtype=st.sampled_from((torch.float32, torch.bfloat16, torch.float16)),
    seed=seeds,
)
def test_linear_relu(rows, inputs, outputs, has_bias, relu, dtype, seed):
    x = numbers((*rows, inputs), dtype, "contiguous", seed)
    weight = numbers((outputs, inputs), dtype, "contiguous", seed + 1)
    bias = numbers((outputs,), dtype, "contiguous", seed + 2) if has_bias else None
    y = LINEAR_RELU.run(x, weight, bias, relu)
    g = numbers(tuple(y.shape), dtype, "contiguous", seed + 3)
    mask = y if relu else None
    grads = LINEAR_RELU_BACKWARD.run(g, mask, x, weight, [True, True, True])
    wide = [None if t is None else t.double() for t in (x, weight, bias)]
    sizes = [None if t is None else t.abs() for t in wide]
    wide_mask = None if mask is None else mask.double()
    results = [(y, reference.linear_relu(*wide, relu), reference.linear_relu(*sizes, relu))]
    results += zip(
        grads,
        reference.linear_relu_backward(g.double(), wide_mask, *wide[:2], [True, True, True]),
        reference.linear_relu_backward(g.double().abs(), wide_mask, *sizes[:2], [True, True, True]),
        strict=True,
    )
    count = x[..., 0].numel()
    for (actual, expected, magnitude), summands in zip(
        results, (inputs + 1, outputs, count, count), strict=True
    ):
        assert actual.dtype is dtype
        bounds.assert_within(
            actual, expected, bounds.sum_bound(magnitude, summands, expected, dtype)
        )
