"""Random convolutions, alone and with their pools, linear layers and augmentations, against float64."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from fastalex import _native, reference, use_backend
from fastalex._geometry import convolved_size, pooled_size
from fastalex.ops.augment import AUGMENT
from fastalex.ops.conv_relu import CONV_RELU, CONV_RELU_BACKWARD
from fastalex.ops.conv_relu_max_pool import CONV_RELU_LRN_MAX_POOL, CONV_RELU_MAX_POOL
from fastalex.ops.linear_relu import LINEAR_RELU, LINEAR_RELU_BACKWARD
from fastalex.ops.lrn_max_pool import LRN_MAX_POOL
from fastalex.ops.max_pool import MAX_POOL
from tests.support import bounds
from tests.support.backends import conv_precision
from tests.support.cases import lay_out
from tests.support.draws import (
    assert_laid_out_as,
    conv_dtypes,
    examples,
    layouts,
    lrn_arguments,
    matrix_layouts,
    numbers,
    seeds,
    vector_layouts,
)


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
    allowed = bounds.lrn_bound(map.double(), norm, dtype, f"cpu-{_native.isa()}")
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
