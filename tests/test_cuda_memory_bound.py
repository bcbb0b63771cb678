"""csrc/cuda's LRN, max-pooling and their fusion, executed on the host against float64."""

from __future__ import annotations

import pytest
import torch

from fastalex import reference
from tests.support import cuda_host
from tests.support.cuda_cases import (
    DTYPES,
    FORMATS,
    assert_within,
    draw,
    lrn_backward_bound,
    lrn_bound,
    rounding,
    sum_bound,
)

pytestmark = pytest.mark.skipif(
    cuda_host.unavailable() is not None, reason=str(cuda_host.unavailable())
)

ALEXNET = (5, 0.02, 0.75, 2.0)
# (shape, groups, (size, scale, beta, k)); each line is a reason to go wrong
LRN_CASES = {
    "alexnet": ((2, 96, 3, 5), 2, ALEXNET),
    "odd plane: no wide loads in nchw": ((1, 16, 7, 7), 1, ALEXNET),
    "group no multiple of a pack": ((2, 12, 4, 4), 2, ALEXNET),
    "fewer channels than the window": ((1, 3, 4, 5), 1, ALEXNET),
    "even window, other beta": ((2, 16, 3, 4), 2, (4, 0.5, 0.6, 1.0)),
    "window of one": ((1, 8, 3, 3), 1, (1, 0.3, 0.75, 1.0)),
    "window wider than a pack": ((1, 32, 2, 3), 1, (19, 0.1, 0.75, 1.0)),
    "window wider than half a block": ((1, 300, 2, 2), 1, (295, 0.01, 0.75, 1.0)),
    "several blocks an image": ((2, 64, 9, 9), 1, ALEXNET),
    "one channel": ((3, 1, 4, 4), 1, ALEXNET),
    "size-1 map": ((2, 40, 1, 1), 1, ALEXNET),
    "alpha as printed": ((1, 16, 4, 4), 1, (5, 1e-4, 0.75, 2.0)),
}
# (shape, kernel, stride, padding, dilation, ceil_mode)
POOL_CASES = {
    "alexnet": ((2, 32, 13, 13), (3, 3), (2, 2), (0, 0), (1, 1), False),
    "padding": ((1, 16, 7, 9), (3, 3), (2, 2), (1, 1), (1, 1), False),
    "ceil": ((1, 8, 8, 10), (3, 3), (2, 2), (0, 0), (1, 1), True),
    "uneven": ((2, 5, 9, 8), (2, 3), (1, 2), (0, 1), (1, 1), False),
    "dilation": ((1, 16, 11, 12), (3, 2), (2, 1), (1, 0), (2, 3), True),
    "stride past the window": ((1, 8, 9, 9), (2, 2), (3, 4), (0, 0), (1, 1), False),
    "wide offsets": ((1, 2, 20, 18), (17, 16), (1, 2), (8, 8), (1, 1), False),
    "padding alone in a window": ((1, 8, 1, 4), (2, 2), (1, 1), (1, 0), (2, 1), False),
    "one pixel": ((2, 8, 1, 1), (1, 1), (1, 1), (0, 0), (1, 1), False),
}
FUSED_CASES = {
    "alexnet": ((2, 32, 13, 13), 2, ALEXNET, (3, 3), (2, 2), (0, 0), False),
    "padding and ceil": ((1, 16, 8, 9), 1, ALEXNET, (3, 3), (2, 2), (1, 1), True),
    "odd channels": ((1, 6, 7, 6), 2, (3, 0.4, 0.5, 1.0), (2, 3), (1, 2), (0, 0), False),
    "bands: more rows than one tile": ((1, 8, 45, 33), 1, ALEXNET, (3, 3), (2, 2), (0, 0), False),
    "several rows of outputs a block": ((96, 8, 37, 5), 1, ALEXNET, (3, 3), (2, 2), (0, 0), False),
    "rows wider than a ring": ((1, 256, 5, 40), 1, ALEXNET, (3, 3), (2, 2), (0, 0), False),
    "stride past the window": ((1, 8, 9, 9), 1, ALEXNET, (2, 2), (3, 3), (0, 0), False),
    "too large: two kernels": ((1, 16, 40, 40), 1, ALEXNET, (33, 33), (2, 2), (0, 0), False),
}  # fmt: skip


def each(cases):
    return pytest.mark.parametrize("case", cases.values(), ids=list(cases))


every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
every_layout = pytest.mark.parametrize("layout", FORMATS)


@pytest.fixture
def host():
    library = cuda_host.host_cuda()
    library.schedule("forward")
    yield library
    library.schedule("forward")
    library.launches()


@each(LRN_CASES)
@every_layout
@every_dtype
def test_lrn(host, case, layout, dtype):
    shape, groups, params = case
    x = draw(shape, dtype, layout, scale=3.0)
    y = host.lrn(x, *params, groups)
    exact = reference.lrn(x.double(), *params, groups)
    assert y.is_contiguous(memory_format=FORMATS[layout])
    assert_within(y, exact, lrn_bound(exact, params[0]) + rounding(exact, dtype))


@each(LRN_CASES)
@every_layout
@every_dtype
def test_lrn_backward(host, case, layout, dtype):
    shape, groups, params = case
    x, grad = draw(shape, dtype, layout, scale=3.0), draw(shape, dtype, layout, seed=1)
    gx = host.lrn_backward(grad, x, *params, groups)
    exact = reference.lrn_backward(grad.double(), x.double(), *params, groups)
    bound = lrn_backward_bound(grad, x, *params, groups)
    assert_within(gx, exact, bound + rounding(exact, dtype))


@each(POOL_CASES)
@every_layout
@every_dtype
@pytest.mark.parametrize("save", [True, False])
def test_max_pool(host, case, layout, dtype, save):
    shape, *geometry = case
    x = special_values(draw(shape, dtype, layout))
    y, offsets = host.max_pool(x, *geometry, save)
    expected, expected_offsets = reference.max_pool(x.float(), *geometry, save)
    assert torch.equal(y.float().nan_to_num(nan=1e9), expected.nan_to_num(nan=1e9))
    assert torch.equal(offsets, expected_offsets)


@each(POOL_CASES)
@every_layout
@every_dtype
def test_max_pool_backward(host, case, layout, dtype):
    shape, *geometry, _ = case
    x = special_values(draw(shape, dtype, layout))
    y, offsets = reference.max_pool(x.float(), *geometry, case[-1], True)
    grad = draw(y.shape, dtype, layout, seed=1)
    gx = host.max_pool_backward(grad, offsets, shape[2:], *geometry)
    arguments = (offsets, shape[2:], *geometry)
    exact = reference.max_pool_backward(grad.double(), *arguments)
    absolute = reference.max_pool_backward(grad.double().abs(), *arguments)
    windows = geometry[0][0] * geometry[0][1]
    assert_within(gx, exact, sum_bound(absolute, windows) + rounding(exact, dtype))


def test_max_pool_walks_down_bands_of_rows_where_there_are_many(host):
    """Two output rows a thread, the last band of one: what more elements than an H100 has threads are dealt as."""
    x = special_values(draw((4, 3, 215, 215), torch.float16, "nhwc"))
    geometry = ((3, 3), (1, 1), (1, 1), (1, 1))
    y, offsets = host.max_pool(x, *geometry, False, True)
    expected, expected_offsets = reference.max_pool(x.float(), *geometry, False, True)
    assert torch.equal(y.float().nan_to_num(nan=1e9), expected.nan_to_num(nan=1e9))
    assert torch.equal(offsets, expected_offsets)
    grad = draw(y.shape, torch.float16, "nhwc", seed=1)
    gx = host.max_pool_backward(grad, offsets, x.shape[2:], *geometry)
    forward, backward = host.launches()
    assert forward.blocks == backward.blocks == 4 * -(-108 * 215 * 3 // 256)
    exact = reference.max_pool_backward(grad.double(), offsets, x.shape[2:], *geometry)
    absolute = reference.max_pool_backward(grad.double().abs(), offsets, x.shape[2:], *geometry)
    assert_within(gx, exact, sum_bound(absolute, 9) + rounding(exact, torch.float16))


@each(FUSED_CASES)
@every_layout
@every_dtype
@pytest.mark.parametrize("save", [True, False])
def test_lrn_max_pool_is_the_pair_bit_for_bit(host, case, layout, dtype, save):
    shape, groups, params, kernel, stride, padding, ceil = case
    x = draw(shape, dtype, layout, scale=3.0)
    x[:, ::5, ::3, ::4] = float("inf") if layout == "nchw" else float("nan")
    fused = host.lrn_max_pool(x, *params, groups, kernel, stride, padding, ceil, save)
    pair = host.max_pool(host.lrn(x, *params, groups), kernel, stride, padding, (1, 1), ceil, save)
    assert torch.equal(fused[0].nan_to_num(nan=1e4), pair[0].nan_to_num(nan=1e4))
    assert torch.equal(fused[1], pair[1])


@each(FUSED_CASES)
@every_layout
@every_dtype
def test_lrn_max_pool_backward(host, case, layout, dtype):
    shape, groups, params, kernel, stride, padding, ceil = case
    x = draw(shape, dtype, layout, scale=3.0)
    y, offsets = host.lrn_max_pool(x, *params, groups, kernel, stride, padding, ceil, True)
    grad = draw(y.shape, dtype, layout, seed=1)
    gx = host.lrn_max_pool_backward(grad, x, offsets, *params, groups, kernel, stride, padding)
    pool = (offsets, shape[2:], kernel, stride, padding, (1, 1))
    middle = reference.max_pool_backward(grad.double(), *pool)
    absolute = reference.max_pool_backward(grad.double().abs(), *pool)
    exact = reference.lrn_backward(middle, x.double(), *params, groups)
    bound = lrn_backward_bound(absolute, x, *params, groups)
    bound += lrn_backward_bound(
        sum_bound(absolute, kernel[0] * kernel[1]) / 2**-24, x, *params, groups
    )
    assert_within(gx, exact, bound + rounding(exact, dtype))


@pytest.mark.parametrize("schedule", [s for s in cuda_host.SCHEDULES if s != "forward"])
@pytest.mark.parametrize("case", ["alexnet", "several rows of outputs a block"])
def test_every_schedule_gives_the_same_bits(host, case, schedule):
    shape, groups, params, *pool = FUSED_CASES[case]
    for layout in FORMATS:
        x = draw(shape, torch.float16, layout)
        grad = draw((*shape[:2], *(side // 2 for side in shape[2:])), torch.float16, layout, seed=1)
        results = []
        for kind in ("forward", schedule):
            host.schedule(kind, seed=7)
            y, offsets = host.lrn_max_pool(x, *params, groups, *pool, True)
            arguments = (*params, groups, *pool[:3])
            gx = host.lrn_max_pool_backward(grad, x, offsets, *arguments)
            results.append((y, offsets, gx, host.lrn_backward(x, x, *params, groups)))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@every_layout
def test_strides_are_taken_as_they_are(host, layout):
    """A channel slice, a batch stride and padded rows: no copy is asked for."""
    x = draw((4, 48, 6, 10), torch.float16, layout)[::2, 8:40, 1:, :7]
    size, scale, beta, k = ALEXNET
    for view in (x, x[:, 3:30]):
        y = host.lrn(view, size, scale, beta, k, 1)
        exact = reference.lrn(view.double(), size, scale, beta, k, 1)
        assert_within(y, exact, lrn_bound(exact, size) + rounding(exact, torch.float16))
        pooled, _ = host.max_pool(view, (3, 3), (2, 2), (0, 0), (1, 1), False, False)
        assert torch.equal(pooled.float(), torch.nn.functional.max_pool2d(view.float(), 3, 2))


def test_empty_batches_launch_nothing(host):
    x = torch.empty(0, 8, 4, 4)
    host.lrn(x, *ALEXNET, 1)
    host.max_pool(x, (3, 3), (1, 1), (0, 0), (1, 1), False, True)
    host.lrn_max_pool(x, *ALEXNET, 1, (3, 3), (1, 1), (0, 0), False, True)
    assert host.launches() == []


def test_lrn_takes_inf_and_nan_as_the_definition_does(host):
    for layout in FORMATS:
        x = draw((1, 16, 4, 4), torch.float32, layout)
        x[0, 3, 1, 1], x[0, 9, 2, 2], x[0, 12, 3, 3] = float("inf"), float("nan"), 0.0
        exact = reference.lrn(x.double(), *ALEXNET, 1)
        assert_within(host.lrn(x, *ALEXNET, 1), exact, lrn_bound(exact, 5))


def special_values(x):
    """Ties, NaN, infinities and a region of -inf, which a window may lie in."""
    x = x.clone(memory_format=torch.preserve_format)
    x[x > 1.5] = 1.5
    x[..., -2:, -2:] = float("-inf")
    flat = x.permute(0, 2, 3, 1).reshape(-1)
    flat = flat.clone()
    flat[::53], flat[::71] = float("nan"), float("inf")
    spread = flat.view(x.shape[0], *x.shape[2:], x.shape[1]).permute(0, 3, 1, 2)
    return x.copy_(spread)
