"""The convolution with its pool in one kernel of the Triton backend, run in Triton's interpreter."""

from __future__ import annotations

import os

import pytest
import torch

from tests.support import triton_oracle as oracle
from tests.support.triton_inputs import like, placed, random
from tests.support.triton_tables import CONV_CASES
from tests.support.triton_tolerance import assert_within

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip(
        "set TRITON_INTERPRET=1: Triton decides when it is imported", allow_module_level=True
    )
pytest.importorskip("triton")

from fastalex.kernels import _configs as configs
from fastalex.kernels.conv_relu import conv_relu
from fastalex.kernels.conv_relu_max_pool import (
    conv_relu_max_pool,
    refuse_conv_relu_max_pool,
)
from fastalex.kernels.max_pool import max_pool

import fastalex
from fastalex import ops
from fastalex.ops._operator import REGISTRY

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
ONE = (1, 1)
POOLS = [((3, 3), (2, 2), ONE, True), ((3, 3), (2, 2), (0, 0), False)]
TILE = configs.CONV_POOL[0]


def pair(x, weight, bias, convolution, pool):
    map = conv_relu(x, weight, bias, *convolution)
    return max_pool(map, *pool[:3], ONE, pool[3], False)[0]


def same(found, expected):
    return torch.equal(found.isnan(), expected.isnan()) and torch.equal(
        found.nan_to_num(0.5), expected.nan_to_num(0.5)
    )


def whole(shape, dtype, layout, seed):
    """Small integers: every sum is exact, in any order, and windows have ties."""
    generator = torch.Generator().manual_seed(seed)
    return placed(torch.randint(-2, 3, shape, generator=generator).to(dtype), layout)


@pytest.mark.parametrize("dtype", [BF16, pytest.param(F32, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("case", CONV_CASES, ids=str)
def test_values_and_windows(case, layout, dtype):
    """Near float64; and of whole numbers, exactly the pair's."""
    shape, outputs, kernel, *convolution, _ = case
    weight_shape = (outputs, shape[1] // convolution[-1], *kernel)
    x, weight = random(shape, dtype, layout), random(weight_shape, dtype, layout, 1)
    bias = random((1, outputs, 1, 1), dtype, seed=2).flatten()
    pool = POOLS[0]
    y = conv_relu_max_pool(x, weight, bias, *convolution, *pool, tile=TILE)
    wide = [t.double() for t in (x, weight, bias)]
    expected, magnitude = (
        oracle.max_pool(oracle.conv_relu(*parts, *convolution), *pool[:3], ONE, pool[3])[0]
        for parts in (wide, [t.abs() for t in wide])
    )
    assert_within(y, expected, weight[0].numel() + 2, magnitude)
    assert y.stride() == like(y, x).stride()
    x, weight = whole(shape, dtype, layout, 3), whole(weight_shape, dtype, layout, 4)
    y = conv_relu_max_pool(x, weight, None, *convolution, *pool, tile=TILE)
    assert torch.equal(y, pair(x, weight, None, convolution, pool))


@pytest.mark.parametrize("tile", configs.CONV_POOL, ids=str)
def test_every_tile_over_many_patches(tile):
    """A map of 35 x 38 pixels, several patches each way, cut by both edges; NaN and windows of zeros among them."""
    pool = POOLS[configs.CONV_POOL.index(tile) % 2]
    x, weight = whole((2, 4, 37, 40), F16, "nhwc", 5), whole((24, 4, 3, 3), F16, "nhwc", 6)
    x[0, 1, 7, 9] = x[1, 2, 36, 39] = float("nan")
    x[1, :, 10:20, 10:20] = 0
    convolution = (ONE, (0, 0), ONE, 1)
    y = conv_relu_max_pool(x, weight, None, *convolution, *pool, tile=tile)
    assert same(y, pair(x, weight, None, convolution, pool))
    assert y.isnan().any()


def test_float32_outside_the_tensor_cores():
    x, weight = random((1, 3, 20, 20), F32, "nhwc"), random((8, 3, 3, 3), F32, "nhwc", 1)
    arguments = (x, weight, None, ONE, ONE, ONE, 1, *POOLS[1])
    y = conv_relu_max_pool(*arguments, tile=configs.IEEE_TILE, precision="ieee")
    wide = oracle.conv_relu(x.double(), weight.double(), None, ONE, ONE, ONE, 1)
    expected = oracle.max_pool(wide, *POOLS[1][:3], ONE, False)[0]
    assert_within(y, expected, 29, expected.abs() + 3)


def test_what_one_kernel_does_not_pay_for_is_refused():
    """Another window, or too many products to compute twice; an empty batch gives an empty result."""
    convolution = (ONE, ONE, ONE, 1)
    x, weight = whole((1, 8, 9, 9), F16, "nhwc", 7), whole((16, 8, 3, 3), F16, "nhwc", 8)

    def refused(x, weight, *pool):
        return refuse_conv_relu_max_pool(x, weight, None, *convolution, *pool)

    assert refused(x, weight, *POOLS[1]) is None
    assert "half the window" in refused(x, weight, (3, 3), (2, 2), (2, 2), False)
    assert "3 x 3, two apart, not 2 x 2" in refused(x, weight, (2, 2), (2, 2), (0, 0), False)
    conv5 = torch.empty(1, 192, 13, 13, dtype=F16), torch.empty(128, 192, 3, 3, dtype=F16)
    assert "445 FLOP for each byte" in refused(*conv5, *POOLS[1])
    empty = conv_relu_max_pool(x[:0], weight, None, *convolution, *POOLS[1])
    assert empty.shape == (0, 16, 4, 4)


def test_the_operator_runs_it_where_it_is_forced_and_its_parts_where_it_is_refused(monkeypatch):
    ran = []
    for operator in REGISTRY.values():
        for kernel in (k for k in operator.kernels.kernels if k.backend == "triton"):
            original = kernel.run
            monkeypatch.setitem(
                kernel.__dict__,
                "run",
                lambda *args, name=operator.name, run=original: ran.append(name) or run(*args),
            )
    x, weight = whole((1, 8, 9, 9), F32, "nhwc", 7), whole((16, 8, 3, 3), F32, "nhwc", 8)
    for size, names in ((3, ["conv_relu_max_pool"]), (2, ["conv_relu", "max_pool"])):
        found = {}
        for backend in ("triton", "torch"):
            with fastalex.use_backend(backend):
                found[backend] = ops.conv2d_relu_max_pool2d(x, weight, padding=1, pool_size=size)
        assert torch.equal(found["triton"], found["torch"])
        assert ran == names
        ran.clear()
