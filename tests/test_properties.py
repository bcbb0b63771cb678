"""Random normalizations and pools, forward and backward, on the best CPU kernels, against the float64 reference."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from fastalex import _native, reference, use_backend
from fastalex.ops.lrn import LRN, LRN_BACKWARD
from fastalex.ops.lrn_max_pool import LRN_MAX_POOL, LRN_MAX_POOL_BACKWARD
from fastalex.ops.max_pool import MAX_POOL, MAX_POOL_BACKWARD
from tests.support import bounds
from tests.support.cases import lay_out, with_specials
from tests.support.draws import (
    assert_laid_out_as,
    dtypes,
    examples,
    layouts,
    lrn_arguments,
    numbers,
    pools,
    seeds,
)

BACKEND = f"cpu-{_native.isa()}"


@examples
@given(
    lrn=lrn_arguments(),
    batch=st.integers(0, 3),
    trailing=st.lists(st.integers(0, 24), min_size=1, max_size=3),
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
    bounds.assert_within(y, expected, bounds.lrn_bound(wide, arguments, dtype, BACKEND))
    expected = reference.lrn_backward(wide_g, wide, *arguments)
    bound = bounds.lrn_backward_bound(wide_g, wide, arguments, dtype, 0.0, BACKEND)
    bounds.assert_within(gx, expected, bound + bounds.rounding(expected, dtype))
    for result in (y, gx) if x.dim() == 4 else ():
        assert_laid_out_as(result, x)


def test_a_planted_bug_shrinks_to_one_line(monkeypatch):
    """One channel past a vector, wrong for one window size: found, made small, and given as a line to run again."""

    def wrong(x: Tensor, *arguments: Any) -> Tensor:
        y = type(LRN).run(LRN, x, *arguments)
        if arguments[0] == 5:
            y[:, 16:17] *= 1.5
        return y

    monkeypatch.setattr(LRN, "run", wrong)
    with pytest.raises(AssertionError) as failure:
        test_lrn()
    told = "\n".join(failure.value.__notes__)
    assert re.search(r"lrn=\(\d+, \(5,", told)
    assert "@reproduce_failure(" in told


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
    allowed = bounds.lrn_bound(wide, arguments, dtype, BACKEND)
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
    bound = bounds.lrn_backward_bound(reach, wide, arguments, dtype, summing, BACKEND)
    bounds.assert_within(gx, expected, bound + bounds.rounding(expected, dtype))
