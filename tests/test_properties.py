"""Random shapes, memory, dtypes and geometry of every operator on the best CPU kernels, against float64."""

from __future__ import annotations

import os
import re
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastalex import reference, use_backend
from fastalex._geometry import convolved_size, is_channels_last, pooled_size
from fastalex.ops.augment import AUGMENT
from fastalex.ops.conv_relu import CONV_RELU, CONV_RELU_BACKWARD
from fastalex.ops.conv_relu_max_pool import CONV_RELU_LRN_MAX_POOL, CONV_RELU_MAX_POOL
from fastalex.ops.linear_relu import LINEAR_RELU, LINEAR_RELU_BACKWARD
from fastalex.ops.lrn import LRN, LRN_BACKWARD
from fastalex.ops.lrn_max_pool import LRN_MAX_POOL, LRN_MAX_POOL_BACKWARD
from fastalex.ops.max_pool import MAX_POOL, MAX_POOL_BACKWARD
from tests.support import bounds
from tests.support.backends import conv_precision
from tests.support.cases import (
    DTYPES,
    LAYOUTS,
    MATRIX_LAYOUTS,
    UNUSUAL_LAYOUTS,
    VECTOR_LAYOUTS,
    lay_out,
    with_specials,
)

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
matrix_layouts = st.sampled_from(MATRIX_LAYOUTS)
vector_layouts = st.sampled_from(VECTOR_LAYOUTS)
dtypes = st.sampled_from(DTYPES)
conv_dtypes = st.sampled_from((torch.float32, torch.bfloat16, torch.float16))
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
    bounds.assert_within(y, expected, bounds.lrn_bound(wide, arguments, dtype))
    expected = reference.lrn_backward(wide_g, wide, *arguments)
    bound = bounds.lrn_backward_bound(wide_g, wide, arguments, dtype)
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


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[Any, ...]:
    """(input shape, weight shape, (stride, padding, dilation, groups)), each pair (height, width)."""
    size, kernel, *geometry = zip(*(draw(convolved_dimension()) for _ in range(2)), strict=True)
    groups = draw(st.sampled_from((1, 1, 2, 3)))
    inputs, outputs = draw(st.integers(1, 20)), groups * draw(st.integers(1, 36))
    shape = (draw(st.integers(0, 3)), groups * inputs, *size)
    assume(torch.Size(shape).numel() <= 20_000)
    return shape, (outputs, inputs, *kernel), (*geometry, groups)


@st.composite
def conv_memory(draw: st.DrawFn) -> tuple[Any, ...]:
    """Layouts of input and weight, and that of the bias, or None for no bias."""
    return draw(layouts), draw(layouts), draw(st.one_of(st.none(), vector_layouts))


def conv_tensors(
    conv: tuple[Any, ...], memory: tuple[Any, ...], dtype: torch.dtype, seed: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    shape, weight_shape, _ = conv
    x = numbers(shape, dtype, memory[0], seed)
    weight = numbers(weight_shape, dtype, memory[1], seed + 1)
    bias = None if memory[2] is None else numbers(weight_shape[:1], dtype, memory[2], seed + 2)
    return x, weight, bias


def conv_bound(
    expected: Tensor, magnitude: Tensor, summands: int, dtype: torch.dtype, precision: str
) -> Tensor:
    """A direct sum's, element by element; and of Winograd's levels, a share of the largest magnitude."""
    allowed = bounds.sum_bound(magnitude, summands, expected, dtype)
    if precision == "highest" or not magnitude.numel():
        return allowed
    return allowed + bounds.CONV_PRECISION[precision][1] * magnitude.max()


def wide(tensors: Any, absolute: bool = False) -> list[Any]:
    """In float64; or the magnitudes."""
    doubles = (None if t is None else t.double() for t in tensors)
    return [t.abs() if absolute and t is not None else t for t in doubles]


@examples
@given(
    conv=convolutions(),
    memory=conv_memory(),
    dtype=conv_dtypes,
    grad_layout=layouts,
    precision=st.sampled_from(("highest", "high", "medium")),
    seed=seeds,
)
def test_conv_relu(conv, memory, dtype, grad_layout, precision, seed):
    x, weight, _ = tensors = conv_tensors(conv, memory, dtype, seed)
    geometry = conv[-1]
    with conv_precision(precision), use_backend("cpu"):
        y = CONV_RELU.run(*tensors, *geometry)
        g = numbers(tuple(y.shape), dtype, grad_layout, seed + 3)
        grads = CONV_RELU_BACKWARD.run(g, y, x, weight, *geometry, [True, True, True])
    assert_laid_out_as(y, x)
    exact, sizes = (reference.conv_relu(*wide(tensors, a), *geometry) for a in (False, True))
    results = [(y, exact, sizes)]
    exact_grads, grad_sizes = (
        reference.conv_relu_backward(
            *wide((g,), a), y.double(), *wide((x, weight), a), *geometry, [True, True, True]
        )
        for a in (False, True)
    )
    results += zip(grads, exact_grads, grad_sizes, strict=True)
    pixels, groups = y[:, 0].numel(), geometry[-1]
    summands = (weight[0].numel() + 1, weight[:, 0].numel() // groups, pixels, pixels)
    for (actual, expected, magnitude), count in zip(results, summands, strict=True):
        assert actual.dtype is dtype
        bounds.assert_within(
            actual, expected, conv_bound(expected, magnitude, count, dtype, precision)
        )


@st.composite
def pools_of_convolutions(draw: st.DrawFn) -> tuple[Any, ...]:
    """A convolution, and the (size, stride, padding, ceil_mode) of a pool that fits its map."""
    conv = draw(convolutions())
    shape, weight, (*geometry, _) = conv
    ceil_mode, pool = draw(st.booleans()), []
    for side in convolved_size(shape[2:], weight[2:], *geometry):
        size = draw(st.integers(1, 5))
        stride, padding = draw(st.integers(1, 4)), draw(st.integers(0, size // 2))
        assume(pooled_size(side, size, stride, padding, 1, ceil_mode) >= 1)
        pool.append((size, stride, padding))
    return conv, (*zip(*pool, strict=True), ceil_mode)


@examples
@given(
    both=pools_of_convolutions(),
    memory=conv_memory(),
    dtype=conv_dtypes,
    precision=st.sampled_from(("highest", "high", "medium")),
    seed=seeds,
)
def test_conv_relu_max_pool(both, memory, dtype, precision, seed):
    """Each output is within the convolution's bound of the float64 maximum, and equals the pair's bit for bit."""
    conv, (*pool, ceil_mode) = both
    tensors, geometry = conv_tensors(conv, memory, dtype, seed), conv[-1]
    with conv_precision(precision), use_backend("cpu"):
        y = CONV_RELU_MAX_POOL.run(*tensors, *geometry, *pool, ceil_mode)
        map = CONV_RELU.run(*tensors, *geometry)
        pair, _ = MAX_POOL.run(map, *pool, (1, 1), ceil_mode, False)
    assert torch.equal(y, pair)
    assert y.dtype is dtype
    assert_laid_out_as(y, tensors[0])
    exact, sizes = (reference.conv_relu(*wide(tensors, a), *geometry) for a in (False, True))
    allowed = conv_bound(exact, sizes, tensors[1][0].numel() + 1, dtype, precision)
    lowest, highest = (
        reference.max_pool(map, *pool, (1, 1), ceil_mode, False)[0]
        for map in (exact - allowed, exact + allowed)
    )
    # What overflows float16 is infinite there.
    assert ((lowest <= y) & ((y <= highest) | y.isinf())).all()


@examples
@given(
    both=pools_of_convolutions(),
    memory=conv_memory(),
    lrn=lrn_arguments(),
    dtype=conv_dtypes,
    precision=st.sampled_from(("highest", "high", "medium")),
    seed=seeds,
)
def test_conv_relu_lrn_max_pool(both, memory, lrn, dtype, precision, seed):
    """Equal bit for bit to the convolution, then the pair, each of which is compared with float64 above."""
    conv, pool = both
    tensors, geometry = conv_tensors(conv, memory, dtype, seed), conv[-1]
    *window, groups = lrn[1]
    norm = (*window, groups if conv[1][0] % groups == 0 else 1)
    with conv_precision(precision), use_backend("cpu"):
        y = CONV_RELU_LRN_MAX_POOL.run(*tensors, *geometry, *norm, *pool)
        map = CONV_RELU.run(*tensors, *geometry)
        pair, _ = LRN_MAX_POOL.run(map, *norm, *pool, False)
    torch.testing.assert_close(y, pair, rtol=0, atol=0, equal_nan=True)
    assert y.dtype is dtype
    assert_laid_out_as(y, tensors[0])
    normalised = reference.lrn(map.double(), *norm)
    allowed = bounds.lrn_bound(map.double(), norm, dtype)
    *sides, ceil_mode = pool
    lowest, highest = (
        reference.max_pool(each, *sides, (1, 1), ceil_mode, False)[0]
        for each in (normalised - allowed, normalised + allowed)
    )
    finite = (
        lowest.isfinite() & highest.isfinite()
    )  # a map that overflowed float16 is compared above
    assert ((lowest <= y) & (y <= highest) | ~finite).all()


@examples
@given(
    rows=st.lists(st.integers(0, 9), min_size=0, max_size=2),
    inputs=st.integers(0, 300),
    outputs=st.integers(1, 80),
    relu=st.booleans(),
    dtype=conv_dtypes,
    memory=st.tuples(matrix_layouts, st.sampled_from(("contiguous", "misaligned")), matrix_layouts),
    bias_layout=st.one_of(st.none(), vector_layouts),
    seed=seeds,
)
def test_linear_relu(rows, inputs, outputs, relu, dtype, memory, bias_layout, seed):
    x = numbers((*rows, inputs), dtype, memory[0], seed)
    weight = numbers((outputs, inputs), dtype, memory[1], seed + 1)
    bias = None if bias_layout is None else numbers((outputs,), dtype, bias_layout, seed + 2)
    tensors = (x, weight, bias)
    with use_backend("cpu"):
        y = LINEAR_RELU.run(*tensors, relu)
        g = numbers(tuple(y.shape), dtype, memory[2], seed + 3)
        mask = y if relu else None
        grads = LINEAR_RELU_BACKWARD.run(g, mask, x, weight, [True, True, True])
    exact, sizes = (reference.linear_relu(*wide(tensors, a), relu) for a in (False, True))
    results = [(y, exact, sizes)]
    exact_grads, grad_sizes = (
        reference.linear_relu_backward(
            *wide((g,), a), *wide((mask,)), *wide((x, weight), a), [True, True, True]
        )
        for a in (False, True)
    )
    results += zip(grads, exact_grads, grad_sizes, strict=True)
    count = x[..., 0].numel() if inputs else 0
    for (actual, expected, magnitude), summands in zip(
        results, (inputs + 1, outputs, count, count), strict=True
    ):
        assert actual.dtype is dtype
        bounds.assert_within(
            actual, expected, bounds.sum_bound(magnitude, summands, expected, dtype)
        )


@st.composite
def crops(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, int]]:
    """([N, H, W, C] of the images, (height, width) of the crop)."""
    size = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    crop = tuple(draw(st.integers(1, side)) for side in size)
    return (draw(st.integers(0, 4)), *size, draw(st.integers(1, 5))), crop


@examples
@given(
    crop=crops(),
    layout=st.sampled_from(("contiguous", "sliced", "planes", "expanded", "misaligned", "columns")),
    mean_is_image=st.booleans(),
    scale=st.sampled_from((1.0, 1 / 58, -0.3)),
    gap=st.integers(0, 3),
    dtype=conv_dtypes,
    seed=seeds,
)
def test_augment(crop, layout, mean_is_image, scale, gap, dtype, seed):
    """The steps rounded one by one, bit for bit; and within three roundings of the value in float64."""
    shape, size = crop
    count, height, width, channels = shape
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    images = lay_out_images(images, layout)
    room = torch.tensor([height - size[0] + 1, width - size[1] + 1])
    corners = (torch.rand(count, 2, generator=generator, dtype=torch.float64) * room).long()
    mirrored = torch.rand(count, generator=generator) < 0.5
    shift = torch.randn(count, channels, generator=generator) * 10
    mean = torch.rand(height, width, channels, generator=generator) * 255
    mean = mean if mean_is_image else mean[0, 0]
    call = (images, corners, mirrored, shift, mean, size, scale, size[1] + gap, dtype)
    with use_backend("cpu"):
        y = AUGMENT.run(*call)
    rounded = reference.augment(*call)
    assert torch.equal(y, rounded)
    assert y.stride() == rounded.stride() or not y.numel()
    if gap and count:
        between = y.as_strided(
            (count, size[0], gap, channels), y.permute(0, 2, 3, 1).stride(), size[1] * channels
        )
        assert not between.any()
    one = [tensor.double() for tensor in (shift, mean)]
    exact = reference.augment(*call[:3], *one, *call[5:8], torch.float64)
    sizes = reference.augment(
        *call[:3], one[0].abs(), -one[1].abs(), size, abs(scale), *call[7:8], torch.float64
    )
    bounds.assert_within(y, exact, sizes * 4 * 2**-24 + bounds.rounding(exact, dtype))


def lay_out_images(images: Tensor, layout: str) -> Tensor:
    """The same uint8 images [N, H, W, C] in memory laid out otherwise; expanded ones are all the first."""
    if layout == "sliced":
        return torch.nn.functional.pad(images, (0, 0, 2, 3, 1, 1))[:, 1:-1, 2:-3]
    if layout == "planes":
        return images.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    if layout == "expanded":
        return images[:1].expand(images.shape)
    if layout == "misaligned":
        return lay_out(images.flatten(), "misaligned").view(images.shape)
    if layout == "columns":
        return images.repeat_interleave(2, dim=2)[:, :, ::2]
    return images
