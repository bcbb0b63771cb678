"""LRN and pooling kernels of the Triton backend, run in Triton's interpreter against float64."""

from __future__ import annotations

import os

import pytest
import torch

from tests.support import triton_oracle as oracle
from tests.support.triton_inputs import LAYOUTS, like, placed, random
from tests.support.triton_tables import FUSED_CASES, LRN_CASES, POOL_CASES
from tests.support.triton_tolerance import FUNCTIONS, assert_within

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip(
        "set TRITON_INTERPRET=1: Triton decides when it is imported", allow_module_level=True
    )
triton = pytest.importorskip("triton")
tl = triton.language

from fastalex.kernels import _configs as configs  # noqa: E402
from fastalex.kernels._common import narrow, widen  # noqa: E402
from fastalex.kernels.lrn import lrn, lrn_backward  # noqa: E402
from fastalex.kernels.lrn_max_pool import lrn_max_pool, lrn_max_pool_backward  # noqa: E402
from fastalex.kernels.max_pool import max_pool, max_pool_backward  # noqa: E402

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
ONE = (1, 1)
HALF_AND_SINGLE = [BF16, pytest.param(F32, marks=pytest.mark.slow)]


@triton.jit
def round_trip(x, wide, back, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    value = widen(tl.load(x + at))
    tl.store(wide + at, value)
    tl.store(back + at, narrow(value, back.dtype.element_ty))


@triton.jit
def rounded(x, y, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y + at, narrow(tl.load(x + at), y.dtype.element_ty))


def test_bfloat16_widens_and_narrows_bit_for_bit():
    bits = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(BF16)
    wide, back = torch.empty(65536), torch.empty(65536, dtype=BF16)
    round_trip[(1,)](bits, wide, back, 65536)
    number = ~bits.isnan()
    assert torch.equal(wide[number].view(torch.int32), bits.float()[number].view(torch.int32))
    assert torch.equal(back[number].view(torch.int16), bits[number].view(torch.int16))
    assert back[~number].isnan().all()


def test_bfloat16_rounds_ties_and_subnormals_as_torch():
    high = torch.arange(65536, dtype=torch.int64) << 16
    for low in (0x7FFF, 0x8000, 0x8001):
        x = (high + low).to(torch.int64).to(torch.int32).view(F32)
        y = torch.empty(65536, dtype=BF16)
        rounded[(1,)](x, y, 65536)
        number = ~x.isnan()
        assert torch.equal(y[number].view(torch.int16), x.to(BF16)[number].view(torch.int16))


def check_lrn(x, grad, size, scale, beta, k, groups):
    arguments = (size, scale, beta, k, groups)
    y = lrn(x, *arguments)
    assert_within(y, oracle.lrn(x.double(), *arguments), size + FUNCTIONS)
    assert y.stride() == like(y, x).stride()
    gx = lrn_backward(grad, x, *arguments)
    (expected,) = oracle.gradients(lambda a: oracle.lrn(a, *arguments), grad, x)
    assert_within(
        gx, expected, 2 * size + 2 * FUNCTIONS, oracle.lrn_gradient_magnitude(x, grad, *arguments)
    )
    assert gx.stride() == y.stride()


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("case", LRN_CASES, ids=str)
def test_lrn(case, layout, dtype):
    shape, size, beta, k, groups = case
    x, grad = random(shape, dtype, layout), random(shape, dtype, layout, seed=1)
    check_lrn(x, grad, size, 0.3, beta, k, groups)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_lrn_reads_every_layout_in_place(layout):
    x = random((2, 16, 3, 5), BF16, layout)
    check_lrn(x, random((2, 16, 3, 5), BF16, "nchw", seed=1), 5, 0.3, 0.75, 2.0, 2)


@pytest.mark.parametrize("shape", [(2, 8, 6), (1, 8, 2, 3, 4)], ids=str)
def test_lrn_takes_any_rank(shape):
    check = torch.randn(shape)
    y = lrn(check, 5, 0.3, 0.75, 2.0, 1)
    assert y.shape == shape
    assert_within(y, oracle.lrn(check.double(), 5, 0.3, 0.75, 2.0, 1), 5 + FUNCTIONS)
    (expected,) = oracle.gradients(lambda a: oracle.lrn(a, 5, 0.3, 0.75, 2.0, 1), check, check)
    gx = lrn_backward(check, check, 5, 0.3, 0.75, 2.0, 1)
    assert_within(
        gx, expected, 26, oracle.lrn_gradient_magnitude(check, check, 5, 0.3, 0.75, 2.0, 1)
    )


def test_lrn_copies_what_no_kernel_reads():
    x = torch.randn(2, 4, 6, 10)[:, ::2, :, ::2]
    grad = torch.randn(2, 2, 6, 1).expand(2, 2, 6, 5)
    check_lrn(x, grad, 3, 0.3, 0.75, 2.0, 1)


def test_lrn_bfloat16_is_the_rounded_float32_bit_for_bit():
    x = random((2, 16, 6, 5), BF16, "nhwc")
    wide = lrn(x.float(), 5, 0.3, 0.75, 2.0, 2)
    assert torch.equal(lrn(x, 5, 0.3, 0.75, 2.0, 2), wide.to(BF16))


def test_lrn_spreads_nan_and_infinity_as_torch():
    values = torch.ones(1, 16, 2, 2)
    values[0, 3, 0, 0], values[0, 9, 1, 1], values[0, 0, 0, 1] = (
        float("nan"),
        float("inf"),
        -float("inf"),
    )
    for layout in ("nchw", "nhwc"):
        x = placed(values, layout)
        for arguments in ((5, 0.3, 0.75, 2.0, 2), (4, 0.3, 0.6, 1.0, 1)):
            assert_within(lrn(x, *arguments), oracle.lrn(x.double(), *arguments), 20)
            (expected,) = oracle.gradients(
                lambda a, norm=arguments: oracle.lrn(a, *norm), torch.ones_like(x), x
            )
            assert torch.equal(
                lrn_backward(torch.ones_like(x), x, *arguments).isnan(), expected.isnan()
            )


def tied(shape, dtype, layout):
    """Small integers, hence ties, with NaN and windows of nothing but -inf."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-3, 3, shape, generator=generator).float()
    corner = x[:, :, :3, :4]
    corner[torch.rand(corner.shape, generator=generator) < 0.2] = float("nan")
    x[:, ::2, -5:, -5:] = -float("inf")
    return placed(x.to(dtype), layout)


def same(found, expected):
    return torch.equal(found.isnan(), expected.isnan()) and torch.equal(
        found.nan_to_num(0.5), expected.nan_to_num(0.5)
    )


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("case", POOL_CASES, ids=str)
def test_max_pool(case, layout, dtype):
    shape, *window, ceil_mode = case
    x = tied(shape, dtype, layout)
    expected, taps = oracle.max_pool(x.contiguous(), *window, ceil_mode)
    y, offsets = max_pool(x, *window, ceil_mode, True)
    assert same(y, expected)
    assert torch.equal(offsets.long(), taps)
    assert y.stride() == like(y, x).stride() == offsets.stride()
    without, none = max_pool(x, *window, ceil_mode, False)
    assert same(without, expected)
    assert none.shape == (0,)
    assert none.dtype == torch.uint8
    grad = random(tuple(y.shape), dtype, layout)
    gx = max_pool_backward(grad, offsets, shape[2:], *window)
    (wanted,) = oracle.gradients(lambda a: oracle.max_pool(a, *window, ceil_mode)[0], grad, x)
    (magnitude,) = oracle.gradients(
        lambda a: oracle.max_pool(a, *window, ceil_mode)[0], grad.abs(), x
    )
    assert_within(gx, wanted, window[0][0] * window[0][1], magnitude)


@pytest.mark.slow
def test_max_pool_counts_more_than_256_taps():
    x = random((1, 1, 18, 18), F32, "nhwc")
    arguments = ((17, 17), (3, 3), (0, 1), ONE)
    y, offsets = max_pool(x, *arguments, False, True)
    expected, taps = oracle.max_pool(x, *arguments, False)
    assert offsets.dtype == torch.int32
    assert torch.equal(y, expected)
    assert torch.equal(offsets.long(), taps)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_max_pool_reads_every_layout_in_place(layout):
    x = random((2, 8, 7, 6), F16, layout)
    y, offsets = max_pool(x, (3, 3), (2, 2), (1, 1), ONE, False, True)
    expected, taps = oracle.max_pool(x.contiguous(), (3, 3), (2, 2), (1, 1), ONE, False)
    assert torch.equal(y, expected)
    assert torch.equal(offsets.long(), taps)
    grad = random(tuple(y.shape), F16, "nchw")
    gx = max_pool_backward(grad, offsets, (7, 6), (3, 3), (2, 2), (1, 1), ONE)
    (wanted,) = oracle.gradients(
        lambda a: oracle.max_pool(a, (3, 3), (2, 2), (1, 1), ONE, False)[0], grad, x
    )
    assert_within(gx, wanted, 9, wanted.abs() + 4)
    assert gx.stride() == like(gx, x).stride()


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("case", FUSED_CASES, ids=str)
def test_lrn_max_pool_equals_the_pair_bit_for_bit(case, layout, dtype):
    shape, norm, *window, ceil_mode = case
    x = random(shape, dtype, layout)
    y, offsets = lrn_max_pool(x, *norm, *window, ceil_mode, True)
    pair, taps = max_pool(lrn(x, *norm), *window, ONE, ceil_mode, True)
    assert torch.equal(y, pair)
    assert torch.equal(offsets, taps)
    assert torch.equal(lrn_max_pool(x, *norm, *window, ceil_mode, False)[0], pair)
    grad = random(tuple(y.shape), dtype, layout, seed=1)
    normal = lrn(x, *norm)

    def pool(a):
        return oracle.max_pool(a, *window, ONE, ceil_mode)[0]

    (sent,) = oracle.gradients(pool, grad, normal)
    (sent_at_most,) = oracle.gradients(pool, grad.abs(), normal)
    (expected,) = oracle.gradients(lambda a: oracle.lrn(a, *norm), sent, x)
    magnitude = oracle.lrn_gradient_magnitude(x, sent_at_most, *norm)
    gx = lrn_max_pool_backward(grad, x, offsets, *norm, *window)
    # a wide window runs as the pair, whose gradient between is rounded to the type
    rounding = 0 if norm[0] <= 33 else torch.finfo(dtype).eps / torch.finfo(F32).eps
    windows = window[0][0] * window[0][1]
    assert_within(gx, expected, 2 * norm[0] + 2 * FUNCTIONS + windows + rounding, magnitude)


def test_lrn_max_pool_keeps_nan_and_empty_windows():
    x = tied((1, 8, 9, 9), F32, "nhwc")
    norm, window = (3, 0.3, 0.75, 1.0, 1), ((3, 3), (2, 2), (1, 1))
    y, offsets = lrn_max_pool(x, *norm, *window, False, True)
    pair, taps = max_pool(lrn(x, *norm), *window, ONE, False, True)
    assert same(y, pair)
    assert torch.equal(offsets, taps)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_every_pointwise_launch_gives_the_same(layout):
    last = layout == "nhwc"
    x = random((1, 16, 9, 9), F16, layout)
    norm, window = (5, 0.3, 0.75, 2.0, 2), ((3, 3), (2, 2), (0, 0))

    def all_equal(results):
        assert all(torch.equal(r, results[0]) for r in results)

    all_equal([lrn(x, *norm, launch=t) for t in configs.LRN["forward", last]])
    all_equal([lrn_backward(x, x, *norm, launch=t) for t in configs.LRN["backward", last]])
    all_equal(
        [
            max_pool(x, *window, ONE, False, True, launch=t)[0]
            for t in configs.POOL["forward", last, False]
        ]
    )
    launches = configs.POOL["forward", last, True]
    all_equal([lrn_max_pool(x, *norm, *window, False, True, launch=t)[1] for t in launches])
    y, taps = lrn_max_pool(x, *norm, *window, False, True)
    launches = configs.POOL["backward", last, False]
    all_equal([max_pool_backward(y, taps, (9, 9), *window, ONE, launch=t) for t in launches])
    launches = configs.POOL["backward", last, True]
    all_equal([lrn_max_pool_backward(y, x, taps, *norm, *window, launch=t) for t in launches])


def far_apart(shape, dtype, last):
    """A tensor whose two images lie more than 2^31 elements apart, in memory that is never touched
    between them.
    """
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        memory = torch.empty(2**31 + 2**16, dtype=dtype)
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = True
    _, c, h, w = shape
    strides = (2**31 + 64, 1, w * c, c) if last else (2**31 + 64, h * w, w, 1)
    return memory.as_strided(shape, strides).copy_(torch.randn(shape))


@pytest.mark.parametrize("last", [True, False], ids=["nhwc", "nchw"])
def test_offsets_beyond_32_bits(last):
    x = far_apart((2, 8, 5, 5), F16, last)
    dense = x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    norm, window = (5, 0.3, 0.75, 2.0, 1), ((3, 3), (2, 2), (0, 0))
    assert torch.equal(lrn(x, *norm), lrn(dense, *norm))
    assert torch.equal(lrn_backward(x, x, *norm), lrn_backward(dense, dense, *norm))
    y, taps = lrn_max_pool(x, *norm, *window, False, True)
    same_y, same_taps = lrn_max_pool(dense, *norm, *window, False, True)
    assert torch.equal(y, same_y)
    assert torch.equal(taps, same_taps)
    gx = lrn_max_pool_backward(y, x, taps, *norm, *window)
    assert torch.equal(gx, lrn_max_pool_backward(y, dense, taps, *norm, *window))


def test_an_empty_batch_gives_an_empty_result():
    x = torch.empty(0, 8, 5, 5)
    norm, window = (5, 0.3, 0.75, 2.0, 1), ((3, 3), (2, 2), (0, 0))
    assert lrn(x, *norm).shape == (0, 8, 5, 5)
    assert lrn_backward(x, x, *norm).shape == (0, 8, 5, 5)
    y, taps = lrn_max_pool(x, *norm, *window, False, True)
    assert y.shape == taps.shape == (0, 8, 2, 2)
    assert max_pool_backward(y, taps, (5, 5), *window, ONE).shape == (0, 8, 5, 5)
