"""The Triton backend on a GPU: the operators run, captured in a graph, on any device."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from fastalex.kernels.conv_relu import conv_relu
from fastalex.kernels.conv_relu_backward import conv_relu_backward
from fastalex.kernels.lrn import lrn, lrn_backward
from fastalex.kernels.lrn_max_pool import lrn_max_pool, lrn_max_pool_backward
from fastalex.kernels.max_pool import max_pool

from tests.support import triton_oracle as oracle
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


def test_a_graph_replays_what_it_captured():
    x = on_gpu((2, 96, 55, 55), torch.float16, True)
    lrn_max_pool(x, *NORM, *WINDOW, False, False)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, _ = lrn_max_pool(x, *NORM, *WINDOW, False, False)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(y, lrn_max_pool(x, *NORM, *WINDOW, False, False)[0])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU is visible")
def test_a_tensor_on_another_device_than_the_current_one():
    x = on_gpu((2, 96, 13, 13), torch.float16, True, "cuda:1")
    assert_within(lrn(x, *NORM).cpu(), oracle.lrn(x.double(), *NORM).cpu(), 5 + FUNCTIONS)
