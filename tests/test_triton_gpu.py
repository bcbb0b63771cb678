"""The Triton backend on a GPU: the operators run, captured in a graph, on any device."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from fastalex.kernels.conv_relu import candidates_conv_relu, conv_relu
from fastalex.kernels.conv_relu_backward import conv_relu_backward
from fastalex.kernels.conv_relu_max_pool import (
    candidates_conv_relu_max_pool,
    conv_relu_max_pool,
)
from fastalex.kernels.linear_relu import linear_relu, linear_relu_backward
from fastalex.kernels.lrn import lrn, lrn_backward
from fastalex.kernels.lrn_max_pool import lrn_max_pool, lrn_max_pool_backward
from fastalex.kernels.max_pool import max_pool, max_pool_backward

import fastalex
from fastalex import _tuning
from tests.support import triton_oracle as oracle
from tests.support.triton_tables import (
    BLOCK_CASES,
    CONV_CASES,
    FUSED_CASES,
    LINEAR_CASES,
    LRN_CASES,
    POOL_CASES,
)
from tests.support.triton_tolerance import FUNCTIONS, assert_within

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU is visible"),
]
NORM, WINDOW, ONE = (5, 2e-5, 0.75, 2.0, 2), ((3, 3), (2, 2), (0, 0)), (1, 1)
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def on_gpu(shape, dtype, last, device="cuda"):
    order = torch.channels_last if last else torch.contiguous_format
    return torch.randn(shape, device=device).to(dtype).contiguous(memory_format=order)


@pytest.mark.parametrize("last", [True, False], ids=["nhwc", "nchw"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm_and_pooling(dtype, last):
    x = on_gpu((4, 96, 55, 55), dtype, last)
    y = lrn(x, *NORM)
    assert_within(y.cpu(), oracle.lrn(x.double(), *NORM).cpu(), 5 + FUNCTIONS)
    gx = lrn_backward(y, x, *NORM)
    (expected,) = oracle.gradients(lambda a: oracle.lrn(a, *NORM), y, x)
    magnitude = oracle.lrn_gradient_magnitude(x, y, *NORM)
    assert_within(gx.cpu(), expected.cpu(), 10 + 2 * FUNCTIONS, magnitude.cpu())
    pair, taps = max_pool(y, *WINDOW, ONE, False, True)
    fused, offsets = lrn_max_pool(x, *NORM, *WINDOW, False, True)
    assert torch.equal(fused, pair)
    assert torch.equal(offsets, taps)
    assert torch.equal(pair, torch.nn.functional.max_pool2d(y, 3, 2))
    first = lrn_max_pool_backward(fused, x, offsets, *NORM, *WINDOW)
    assert torch.equal(first, lrn_max_pool_backward(fused, x, offsets, *NORM, *WINDOW))


@pytest.mark.parametrize("last", [True, False], ids=["nhwc", "nchw"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "outputs", "kernel", "stride", "padding", "groups"),
    [((2, 3, 227, 227), 96, 11, 4, 0, 1), ((2, 96, 27, 27), 256, 5, 1, 2, 2),
     ((2, 256, 13, 13), 384, 3, 1, 1, 1), ((2, 384, 13, 13), 256, 3, 1, 1, 2)],
)  # fmt: skip
def test_convolution(shape, outputs, kernel, stride, padding, groups, dtype, last):
    x = on_gpu(shape, dtype, last)
    weight = on_gpu((outputs, shape[1] // groups, kernel, kernel), dtype, last)
    arguments = ((stride, stride), (padding, padding), ONE, groups)
    y = conv_relu(x, weight, None, *arguments, precision="ieee")
    expected = oracle.conv_relu(x.double(), weight.double(), None, *arguments)
    magnitude = oracle.conv_relu(x.double().abs(), weight.double().abs(), None, *arguments)
    assert_within(y.cpu(), expected.cpu(), weight[0].numel(), magnitude.cpu())
    found = conv_relu_backward(y, y, x, weight, *arguments, (True,) * 3, precision="ieee")
    again = conv_relu_backward(y, y, x, weight, *arguments, (True,) * 3, precision="ieee")
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    wanted = torch.ops.aten.convolution_backward(
        y.double(), x.double(), weight.double(), [outputs], *arguments[:3], False, (0, 0), groups,
        (True,) * 3,
    )  # fmt: skip
    pixels = y[:, 0].numel()
    for result, want, count in zip(
        found, wanted, (outputs * kernel**2, pixels, pixels), strict=True
    ):
        most = want.abs().max().expand_as(want)
        assert_within(result.cpu(), want.cpu(), count, most.cpu())


@pytest.mark.parametrize("last", [True, False], ids=["nhwc", "nchw"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_interpreters_table_of_normalisation_and_pooling(dtype, last):
    for shape, size, beta, k, groups in LRN_CASES:
        x, norm = on_gpu(shape, dtype, last), (size, 0.3, beta, k, groups)
        y = lrn(x, *norm)
        assert_within(y.cpu(), oracle.lrn(x.double(), *norm).cpu(), size + FUNCTIONS)
        gx = lrn_backward(y, x, *norm)
        (expected,) = oracle.gradients(lambda a, norm=norm: oracle.lrn(a, *norm), y, x)
        magnitude = oracle.lrn_gradient_magnitude(x, y, *norm)
        assert_within(gx.cpu(), expected.cpu(), 2 * size + 2 * FUNCTIONS, magnitude.cpu())
    for shape, *window, ceil_mode in POOL_CASES:
        x = on_gpu(shape, dtype, last).mul(2).round()  # ties
        y, taps = max_pool(x, *window, ceil_mode, True)
        expected, wanted = oracle.max_pool(x.contiguous(), *window, ceil_mode)
        assert torch.equal(y, expected)
        assert torch.equal(taps.long(), wanted)
        gx = max_pool_backward(y, taps, shape[2:], *window)
        assert torch.equal(gx, max_pool_backward(y, taps, shape[2:], *window))
        (expected,) = oracle.gradients(
            lambda a, w=window, c=ceil_mode: oracle.max_pool(a, *w, c)[0], y, x
        )
        most = expected.abs().max().expand_as(expected)
        assert_within(gx.cpu(), expected.cpu(), window[0][0] * window[0][1], most.cpu())
    for shape, norm, *window, ceil_mode in FUSED_CASES:
        x = on_gpu(shape, dtype, last)
        fused, offsets = lrn_max_pool(x, *norm, *window, ceil_mode, True)
        pair, taps = max_pool(lrn(x, *norm), *window, ONE, ceil_mode, True)
        assert torch.equal(fused, pair)
        assert torch.equal(offsets, taps)


@pytest.mark.parametrize("last", [True, False], ids=["nhwc", "nchw"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_interpreters_table_of_convolutions(dtype, last):
    """Every tile that can be chosen: eight-warp ones have been miscompiled elsewhere."""
    for shape, outputs, kernel, stride, padding, dilation, groups, _ in CONV_CASES:
        x = on_gpu(shape, dtype, last)
        weight = on_gpu((outputs, shape[1] // groups, *kernel), dtype, last)
        call = (x, weight, None, stride, padding, dilation, groups)
        expected = oracle.conv_relu(x.double(), weight.double(), *call[2:])
        magnitude = oracle.conv_relu(x.double().abs(), weight.double().abs(), *call[2:])
        # a float32 product in TF32 keeps ten bits of each factor
        summands = weight[0].numel() * (2**13 if dtype == torch.float32 else 1)
        for tile in candidates_conv_relu(*call)["tile"]:
            y = conv_relu(*call, tile=tile)
            assert_within(y.cpu(), expected.cpu(), summands + 2, magnitude.cpu())


@pytest.mark.parametrize("last", [True, False], ids=["nhwc", "nchw"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_first_layers_gradients(dtype, last):
    """Of images, by blocks of pixels; and of weights, the mask taken at load or in a pass before."""
    for shape, outputs, kernel, stride, padding, dilation, groups, _ in BLOCK_CASES:
        x = on_gpu(shape, dtype, last)
        weight = on_gpu((outputs, shape[1] // groups, *kernel), dtype, last)
        geometry = (stride, padding, dilation, groups)
        y = conv_relu(x, weight, None, *geometry, precision="ieee")
        grad = torch.randn_like(y)
        call = (grad, y, x, weight, *geometry)
        gx, gw, gb = conv_relu_backward(*call, (True,) * 3, precision="ieee")
        alone = conv_relu_backward(*call, (False, True, True), precision="ieee")
        assert torch.equal(alone[1], gw)
        assert torch.equal(alone[2], gb)
        dz = torch.ops.aten.threshold_backward(grad, y, 0)
        wanted, most = (
            torch.nn.grad.conv2d_input(x.shape, w, d, stride, padding, dilation, groups)
            for w, d in (
                (weight.double(), dz.double()),
                (weight.double().abs(), dz.double().abs()),
            )
        )
        assert_within(gx.cpu(), wanted.cpu(), weight[:, 0].numel(), most.cpu())


@pytest.mark.parametrize("last", [True, False], ids=["nhwc", "nchw"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_convolution_with_its_pool(dtype, last):
    """conv1 of CaffeNet, on every tile that can be chosen: of whole numbers, whose sums are exact, the pair exactly."""
    x, weight = on_gpu((2, 3, 227, 227), dtype, last), on_gpu((96, 3, 11, 11), dtype, last)
    x, weight = x.round().clamp(-2, 2), weight.round().clamp(-2, 2)
    call = (x, weight, None, (4, 4), (0, 0), ONE, 1)
    expected = max_pool(conv_relu(*call), *WINDOW, ONE, False, False)[0]
    tiles = candidates_conv_relu_max_pool(*call, *WINDOW, False)["tile"]
    for tile in tiles:
        assert torch.equal(conv_relu_max_pool(*call, *WINDOW, False, tile=tile), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", LINEAR_CASES, ids=str)
def test_linear(case, dtype):
    rows, inputs, outputs = case
    x = torch.randn(*rows, inputs, device="cuda").to(dtype)
    weight = torch.randn(outputs, inputs, device="cuda").to(dtype)
    y = linear_relu(x, weight, None, False, precision="ieee")
    expected, magnitude = x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T
    assert_within(y.cpu(), expected.cpu(), inputs + 2, magnitude.cpu())
    gx, gw, gb = linear_relu_backward(y, None, x, weight, (True,) * 3, precision="ieee")
    flat = y.double().flatten(0, -2)
    most = flat.abs() @ weight.double().abs()
    found = gx.flatten(0, -2)
    assert_within(found.cpu(), (flat @ weight.double()).cpu(), outputs, most.cpu())
    most = flat.abs().T @ x.double().abs().flatten(0, -2)
    wanted = flat.T @ x.double().flatten(0, -2)
    assert_within(gw.cpu(), wanted.cpu(), flat.shape[0], most.cpu())
    assert_within(gb.cpu(), flat.sum(0).cpu(), flat.shape[0], flat.abs().sum(0).cpu())


def small_network():
    return torch.nn.Sequential(
        fastalex.ops.Conv2dReLU(8, 64, 3, padding=1),
        fastalex.ops.LRNMaxPool2d(5, kernel_size=3, stride=2),
        fastalex.ops.Conv2dReLU(64, 32, 3),
        fastalex.ops.MaxPool2d(3, 2),
    ).to("cuda", torch.float16, memory_format=torch.channels_last)


def step(model, x):
    y = model(x)
    return [y, *torch.autograd.grad(y.sum(), list(model.parameters()))]


def test_a_graph_replays_what_it_captured():
    """Forward and backward: no launch, allocation or copy escapes the capture."""
    model, x = small_network(), on_gpu((2, 8, 19, 19), torch.float16, True)
    with fastalex.use_backend("triton"):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step(model, x)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step(model, x)
        x.copy_(torch.randn_like(x))
        graph.replay()
        for ours, again in zip(captured, step(model, x), strict=True):
            assert torch.equal(ours, again)


def test_launches_join_the_current_stream():
    """A long kernel before, on the same side stream, is waited for."""
    x = torch.zeros(4, 96, 55, 55, device="cuda", dtype=torch.float16)
    expected = lrn(torch.ones_like(x), *NORM)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)
        x.fill_(1)
        y = lrn(x, *NORM)
    side.synchronize()
    assert torch.equal(y, expected)


def test_a_compiled_network_gives_the_eager_one_bit_for_bit():
    model, x = small_network(), on_gpu((2, 8, 19, 19), torch.float16, True)
    with fastalex.use_backend("triton"):
        eager = step(model, x)
        compiled = step(torch.compile(model, fullgraph=True), x)
    assert all(torch.equal(a, b) for a, b in zip(eager, compiled, strict=True))


def test_the_choice_is_never_slower_than_what_it_was_measured_against(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTALEX_CACHE_DIR", str(tmp_path))
    _tuning.forget()
    found = fastalex.tune(small_network(), on_gpu((2, 8, 19, 19), torch.float16, True))
    _tuning.forget()
    assert found
    assert all(line.milliseconds <= line.stock_milliseconds for line in found)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU is visible")
def test_a_tensor_on_another_device_than_the_current_one():
    x = on_gpu((2, 96, 13, 13), torch.float16, True, "cuda:1")
    assert_within(lrn(x, *NORM).cpu(), oracle.lrn(x.double(), *NORM).cpu(), 5 + FUNCTIONS)
