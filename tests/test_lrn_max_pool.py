"""lrn_max_pool2d: equal bit for bit to LRN and max-pooling in turn, forward; bounded backward."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastalex import ops, reference
from fastalex.ops.lrn_max_pool import LRN_MAX_POOL, LRN_MAX_POOL_BACKWARD
from fastalex.ops.max_pool import pool_geometry
from tests.support import bounds
from tests.support.backends import BACKENDS, running
from tests.support.cases import DTYPES, LAYOUTS, LRN, Pool, random_input

DTYPE_IDS = [str(dtype).removeprefix("torch.") for dtype in DTYPES]

CASES = (
    (LRN((2, 96, 13, 15), groups=2), Pool(())),
    (LRN((1, 256, 13, 13)), Pool(())),
    (LRN((1, 48, 55, 61)), Pool(())),  # taller than one NCHW band
    (LRN((3, 7, 9, 8), size=3), Pool((), ceil_mode=True)),
    (LRN((2, 12, 11, 11), size=4, groups=3), Pool((), kernel_size=3, stride=1, padding=1)),
    (LRN((2, 5, 10, 9), beta=0.5), Pool((), kernel_size=2, stride=2)),
    (LRN((1, 9, 12, 20), beta=1.0), Pool((), kernel_size=(2, 3), stride=(3, 2), padding=(1, 1))),
    (LRN((1, 6, 19, 18), beta=0.6), Pool((), kernel_size=17, stride=1)),
    (LRN((0, 6, 9, 9)), Pool(())),
)


def arguments(lrn: LRN, pool: Pool) -> dict:
    pooling = {k: v for k, v in pool.arguments().items() if k != "dilation"}
    return lrn.arguments() | pooling


@pytest.mark.parametrize(("lrn", "pool"), CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_equals_the_pair(backend, dtype, lrn, pool):
    for layout in LAYOUTS:
        x = random_input(lrn.shape, dtype, layout)
        with running(backend):
            fused = ops.lrn_max_pool2d(x, **arguments(lrn, pool))
            pair = ops.max_pool2d(ops.local_response_norm(x, **lrn.arguments()), **pool.arguments())
        assert torch.equal(fused, pair)


@pytest.mark.parametrize("k", [0.0, 1.0])
@pytest.mark.parametrize("beta", [0.75, 0.5, 1.0, 0.6])
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_strange_values_equal_the_pair(backend, dtype, beta, k):
    """NaN, infinities, and the zeros that k=0 divides by: the row kernels' fast paths must leave them alone."""
    for strange in (float("nan"), float("inf"), -float("inf"), 0.0):
        for layout in ("contiguous", "channels_last"):
            x = random_input((2, 40, 11, 13), dtype, layout)
            x[1, 3:9, 4, 5] = strange
            x[0, 33:40, 8:10, 12] = strange
            lrn = {"size": 5, "beta": beta, "k": k, "groups": 2}
            with running(backend):
                fused = ops.lrn_max_pool2d(x, **lrn)
                pair = ops.max_pool2d(ops.local_response_norm(x, **lrn), 3, 2)
            torch.testing.assert_close(fused, pair, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("lrn", "pool"), CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_backward(backend, dtype, lrn, pool):
    """With the winners frozen to the forward's own: near ties may fall otherwise in float64."""
    operands = lrn.operator_arguments()
    shape = torch.Size(lrn.shape)
    both = pool_geometry(
        shape, pool.kernel_size, pool.stride, pool.padding, 1, pool.ceil_mode, "lrn_max_pool2d"
    )[:3]
    for layout, grad_layout in (
        ("contiguous", "contiguous"),
        ("channels_last", "contiguous"),
        ("contiguous", "channels_last"),
        ("channel_slice", "channels_last"),
    ):
        x = random_input(lrn.shape, dtype, layout)
        with running(backend):
            y, offsets = LRN_MAX_POOL.run(x, *operands, *both, pool.ceil_mode, True)
            g = random_input(tuple(y.shape), dtype, grad_layout)
            gx = LRN_MAX_POOL_BACKWARD.run(g, x, offsets, *operands, *both)
        wide = x.double()
        pooling = (offsets, x.shape[-2:], *both, (1, 1))
        unpooled = reference.max_pool_backward(g.double(), *pooling)
        reach = reference.max_pool_backward(g.double().abs(), *pooling)
        expected = reference.lrn_backward(unpooled, wide, *operands)
        summing = both[0][0] * both[0][1] * bounds.compute_eps(dtype)
        if backend == "torch":  # rounds the unpooled gradient to the narrow type in between
            summing += bounds.eps(dtype)
        bound = bounds.lrn_backward_bound(reach, wide, operands, dtype, summing, backend)
        bounds.assert_within(gx, expected, bound + bounds.rounding(expected, dtype))


def test_saves_the_input_and_one_byte_an_output():
    x = torch.randn(2, 16, 9, 9, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = ops.lrn_max_pool2d(x, 5)
    others = [tensor for tensor in saved if tensor.data_ptr() != x.data_ptr()]
    assert sum(tensor.numel() * tensor.element_size() for tensor in others) == y.numel()


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "torch"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_threads_do_not_change_a_bit(backend, layout):
    """Where a thread's share of the rows begins must not show."""
    x = random_input((3, 40, 29, 31), torch.float32, layout)
    lrn, pool = (5, 0.1, 0.75, 2.0, 2), ((3, 3), (2, 2), (1, 1))
    results = []
    for threads in (1, 2, 3):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        with running(backend):
            y, offsets = LRN_MAX_POOL.run(x, *lrn, *pool, False, True)
            gx = LRN_MAX_POOL_BACKWARD.run(y, x, offsets, *lrn, *pool)
        torch.set_num_threads(before)
        results.append((y, offsets, gx))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("groups", [1, 2])
def test_three_dimensions_are_read_as_the_stock_layers_read_them(groups):
    """Normalised over dimension 1 as [N, C, L], then pooled over dimensions 1 and 2 as [C, H, W]."""
    x = torch.randn(5, 8, 9, dtype=torch.float64, requires_grad=True)
    lrn, pool = (3, 0.3, 0.75, 2.0), (3, 2)
    towers = [nn.LocalResponseNorm(*lrn)(tower) for tower in x.chunk(groups, 1)]
    expected = nn.MaxPool2d(*pool)(torch.cat(towers, 1))
    layer = ops.LRNMaxPool2d(*lrn, *pool, groups=groups)
    actual = layer(x)
    torch.testing.assert_close(actual, expected, rtol=1e-14, atol=0)
    weights = torch.randn_like(expected)
    torch.testing.assert_close(
        *(torch.autograd.grad((y * weights).sum(), x)[0] for y in (actual, expected)),
        rtol=1e-12,
        atol=1e-14,
    )
