"""Gradients that a kernel masks where it makes them, in Triton's interpreter: bit for bit those a pass masks after."""

from __future__ import annotations

import os

import pytest
import torch
from torch import nn

import fastalex
from fastalex import ops
from fastalex.ops._operator import REGISTRY
from tests.support.triton_inputs import like, random
from tests.support.triton_tables import BLOCK_CASES, CONV_CASES, FUSED_CASES, POOL_CASES

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip(
        "set TRITON_INTERPRET=1: Triton decides when it is imported", allow_module_level=True
    )
pytest.importorskip("triton")

from fastalex.kernels import _configs as configs
from fastalex.kernels.conv_relu_backward import conv_relu_backward
from fastalex.kernels.lrn_max_pool import lrn_max_pool, lrn_max_pool_backward
from fastalex.kernels.max_pool import max_pool, max_pool_backward

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
HALF_AND_SINGLE = [BF16, pytest.param(F32, marks=pytest.mark.slow)]
LAYOUTS = ["nchw", "nhwc"]
LARGE = configs.ConvTile(128, 64, 0, 64, 8, 3)  # costs the interpreter least, not a GPU
INPUT_ALONE = (True, False, False)


def rectified(shape, dtype, layout):
    """A ReLU's output: about half zeros, one NaN, which lets the gradient pass as in torch."""
    x = random(shape, dtype, layout).relu_()
    x[0, -1, -1, -1] = float("nan")
    return x


def assert_masked(found, whole, x):
    assert torch.equal(found, torch.ops.aten.threshold_backward(whole, x, 0))
    assert found.stride() == whole.stride()


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", POOL_CASES, ids=str)
def test_max_pool(case, layout, dtype):
    shape, *window, ceil_mode = case
    x = rectified(shape, dtype, layout)
    y, offsets = max_pool(x, *window, ceil_mode, True)
    grad = random(tuple(y.shape), dtype, layout, seed=1)
    grad = torch.where(grad == 0, 1, grad)  # a zero would not show what is masked
    whole = max_pool_backward(grad, offsets, shape[2:], *window)
    for other in LAYOUTS:  # of the map, beside offsets in theirs
        map = like(x.clone(), random(shape, dtype, other))
        assert_masked(max_pool_backward(grad, offsets, shape[2:], *window, rectified=map), whole, x)


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", FUSED_CASES, ids=str)
def test_lrn_max_pool(case, layout, dtype):
    """The last case's window is too wide to unroll: a pass of its own masks it."""
    shape, norm, *window, ceil_mode = case
    x = rectified(shape, dtype, layout)
    y, offsets = lrn_max_pool(x, *norm, *window, ceil_mode, True)
    grad = random(tuple(y.shape), dtype, layout, seed=1)
    x.nan_to_num_(2.0)
    whole = lrn_max_pool_backward(grad, x, offsets, *norm, *window)
    assert_masked(lrn_max_pool_backward(grad, x, offsets, *norm, *window, rectified=x), whole, x)


def check_convolution(case, dtype, layout, **options):
    shape, outputs, kernel, *geometry, groups, _ = case
    x = rectified(shape, dtype, layout)
    weight = random((outputs, shape[1] // groups, *kernel), dtype, layout, seed=1)
    y = ops.conv2d_relu(x.float(), weight.float(), None, *geometry, groups).to(dtype)
    grad = like(random(tuple(y.shape), dtype, seed=2), y)
    arguments = (grad, like(y, x), x, weight, *geometry, groups, INPUT_ALONE)
    whole = conv_relu_backward(*arguments, **options)[0]
    found = conv_relu_backward(*arguments, rectified_input=True, **options)[0]
    assert_masked(found, whole, x)
    assert not torch.equal(found, whole)


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", [CONV_CASES[2], CONV_CASES[6], BLOCK_CASES[0]], ids=str)
def test_convolution(case, layout, dtype):
    """Towers, phases of a stride, and blocks of few channels, which a pass of its own masks, as all in NCHW."""
    check_convolution(case, dtype, layout, input_tile=None if case in BLOCK_CASES else LARGE)


@pytest.mark.slow
def test_every_tile_of_a_convolution():
    for tile in configs.CONV_INPUT_GRADIENT[True]:
        check_convolution(CONV_CASES[2], F16, "nhwc", input_tile=tile)


def network():
    """Two chains, of two convolutions with LRN and pool, and of one with a pool; then a convolution alone."""
    torch.manual_seed(0)
    return [
        ops.Conv2dReLU(8, 16, 3, padding=1, groups=2),
        ops.Conv2dReLU(16, 16, 1, bias=False),
        ops.LRNMaxPool2d(5, 0.3, 0.75, 2.0, groups=2),
        ops.Conv2dReLU(16, 8, 1),
        ops.MaxPool2d(3, 2, 1, ceil_mode=True),
        ops.Conv2dReLU(8, 8, 1),
    ]


def gradients(model, x, backend):
    model.zero_grad()
    x = x.clone().requires_grad_()
    with fastalex.use_backend(backend):
        y = model(x)
    y.backward(torch.linspace(-1, 1, y.numel()).view_as(y))
    return [y, x.grad, *(p.grad for p in model.parameters())]


@pytest.fixture
def known(monkeypatch):
    """What each gradient's kernel was told of its tensors, in the order of the backward pass."""
    told = []
    for op in ("conv_relu", "max_pool", "lrn_max_pool"):
        table = REGISTRY[f"{op}_backward"].kernels
        kernel = next(k for k in table.kernels if k.backend == "triton")

        def run(*args, original=kernel.run, known=(), **options):
            known = dict(known)
            told.append({k: v if isinstance(v, bool) else "map" for k, v in known.items()})
            return original(*args, known=known, **options)

        monkeypatch.setitem(kernel.__dict__, "run", run)
    return told


@pytest.mark.parametrize(
    "layout",
    [torch.channels_last, pytest.param(torch.contiguous_format, marks=pytest.mark.slow)],
    ids=str,
)
def test_layers_in_turn_mask_no_gradient_twice(known, layout):
    layers = network()
    x = torch.randn(1, 8, 7, 7).contiguous(memory_format=layout)
    chained = ops.FusedSequential(*layers).to(memory_format=layout)
    found = gradients(chained, x, "triton")
    first, last = ({"grad_is_masked": True, "rectified_input": made} for made in (False, True))
    assert known == [{}, {"rectified": "map"}, first, {"rectified": "map"}, last, first]
    del known[:]
    apart = gradients(nn.Sequential(*layers), x, "triton")
    assert known == [{}] * 6
    for ours, each in zip(found, apart, strict=True):
        assert torch.equal(ours, each)
        assert ours.stride() == each.stride()
    for ours, stock in zip(found, gradients(nn.Sequential(*layers), x, "torch"), strict=True):
        torch.testing.assert_close(ours, stock)


def test_the_functions_are_chains_too(known):
    x, w = torch.randn(1, 8, 9, 9), torch.randn(8, 8, 3, 3, requires_grad=True)
    for function, more in (
        (ops.conv2d_relu_max_pool2d, {}),
        (ops.conv2d_relu_lrn_max_pool2d, {"size": 3}),
    ):
        del known[:]
        with fastalex.use_backend("triton"):
            (found,) = torch.autograd.grad(function(x, w, **more).sum(), w)
        assert known == [
            {"rectified": "map"},
            {"grad_is_masked": True, "rectified_input": False},
        ]
        with fastalex.use_backend("torch"):
            (expected,) = torch.autograd.grad(function(x, w, **more).sum(), w)
        torch.testing.assert_close(found, expected)


def test_whoever_can_see_a_map_sees_its_whole_gradient():
    conv, pool = ops.Conv2dReLU(8, 8, 3), ops.LRNMaxPool2d(3)
    nn.init.constant_(conv.bias, -0.6)  # windows of zeros alone send their gradient to one
    x = torch.randn(1, 8, 9, 9)
    seen = []
    conv.register_full_backward_hook(lambda module, inputs, outputs: seen.append(outputs[0]))
    with fastalex.use_backend("triton"):
        y = ops.FusedSequential(conv, pool)(x.requires_grad_())
        map = ops.conv2d_relu(x, conv.weight, conv.bias)
        map.retain_grad()
        pool(map).sum().backward()
    y.sum().backward()
    assert (map.grad[map == 0] != 0).any()
    assert torch.equal(seen[0], map.grad)
