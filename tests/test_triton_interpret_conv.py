"""Convolution kernels of the Triton backend, run in Triton's interpreter against float64."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from tests.support import triton_oracle as oracle
from tests.support.triton_inputs import LAYOUTS, like, placed, random
from tests.support.triton_tables import BLOCK_CASES, LINEAR_CASES
from tests.support.triton_tables import CONV_CASES as CASES
from tests.support.triton_tolerance import assert_within

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip(
        "set TRITON_INTERPRET=1: Triton decides when it is imported", allow_module_level=True
    )
pytest.importorskip("triton")

from fastalex.kernels import _configs as configs
from fastalex.kernels._conv import forward_scheme, geometry
from fastalex.kernels._conv_image_gradient import by_blocks
from fastalex.kernels._layout import strides
from fastalex.kernels.conv_relu import conv_relu
from fastalex.kernels.conv_relu_backward import conv_relu_backward
from fastalex.kernels.linear_relu import linear_relu, linear_relu_backward

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
ONE = (1, 1)
ALL = (True, True, True)


# what costs the interpreter least, not a GPU: large tiles, and the pixels in two parts
FEW_PROGRAMS = configs.ConvTile(128, 64, 0, 64, 8, 3), configs.ConvTile(64, 64, 0, 128, 8, 3, 2)
HALF_AND_SINGLE = [BF16, pytest.param(F32, marks=pytest.mark.slow)]


def tensors(case, dtype, layout, weight_layout=None, seed=0):
    shape, outputs, kernel, *_, groups, _ = case
    x = random(shape, dtype, layout, seed)
    weight = random(
        (outputs, shape[1] // groups, *kernel), dtype, (weight_layout or layout)[:4], seed + 1
    )
    return x, weight, random((1, outputs, 1, 1), dtype, seed=seed + 2).flatten()


def few_programs(x, weight, *geometry_arguments):
    """The largest tile, with its products split: what costs the interpreter least, not a GPU."""
    scheme = forward_scheme(geometry(x.shape[2:], weight, *geometry_arguments), strides(x), 2)
    return replace(configs.CONV_FORWARD[scheme][0], split=1 if scheme == "rows" else 2)


def check_forward(x, weight, bias, *geometry_arguments, **options):
    y = conv_relu(x, weight, bias, *geometry_arguments, **options)
    wide = [None if t is None else t.double() for t in (x, weight, bias)]
    expected = oracle.conv_relu(*wide, *geometry_arguments)
    magnitude = oracle.conv_relu(
        *(None if t is None else t.abs() for t in wide), *geometry_arguments
    )
    assert_within(y, expected, weight[0].numel() + 2, magnitude)
    assert y.stride() == like(y, x).stride()
    return y


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward(case, layout, dtype):
    x, weight, bias = tensors(case, dtype, layout)
    if layout == "nhwc" and dtype == BF16:
        assert forward_scheme(geometry(x.shape[2:], weight, *case[3:7]), strides(x), 2) == case[7]
    check_forward(x, weight, bias, *case[3:7], tile=few_programs(x, weight, *case[3:7]))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_forward_reads_every_layout_in_place(layout):
    case = CASES[2]
    x, weight, _ = tensors(case, F16, layout, weight_layout="nchw")
    check_forward(x, weight, None, *case[3:7])


@pytest.mark.parametrize("pitch", [0, 1, 5])
def test_forward_takes_any_row_pitch(pitch):
    case = CASES[0]
    x, weight, bias = tensors(case, F16, "nhwc")
    memory = torch.full((1, 23, 43 + pitch, 3), float("nan"), dtype=F16)
    memory[:, :, :43] = x.permute(0, 2, 3, 1)
    pitched = memory[:, :, :43].permute(0, 3, 1, 2)
    y = check_forward(pitched, weight, bias, *case[3:7])
    assert torch.equal(y, conv_relu(x, weight, bias, *case[3:7]))


def test_forward_keeps_nan_and_infinity():
    values = torch.randn(1, 8, 5, 5)
    values[0, 2, 1, 1], values[0, 3, 4, 4] = float("nan"), -float("inf")
    for layout in ("nchw", "nhwc"):
        x, weight = placed(values, layout), random((16, 8, 3, 3), F32, layout)
        check_forward(x, weight, None, ONE, ONE, ONE, 1)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("case", [CASES[0], CASES[2], CASES[5]], ids=str)
def test_every_forward_tile(case, layout):
    x, weight, bias = tensors(case, F16, layout)
    conv = geometry(x.shape[2:], weight, *case[3:7])
    scheme = forward_scheme(conv, strides(x), 2)
    for tile in configs.CONV_FORWARD[scheme]:
        check_forward(x, weight, bias, *case[3:7], tile=tile)


def test_ieee_float32():
    case = CASES[3]
    x, weight, bias = tensors(case, F32, "nhwc")
    check_forward(x, weight, bias, *case[3:7], precision="ieee")


def test_split_products_add_up_in_order():
    case = CASES[5]
    x, weight, bias = tensors(case, F16, "nhwc")
    conv = geometry(x.shape[2:], weight, *case[3:7])
    tile = configs.conv_tiles(conv, "taps", 1, F16, "tf32")[0]
    assert tile.split > 1
    first = check_forward(x, weight, bias, *case[3:7])
    assert torch.equal(first, conv_relu(x, weight, bias, *case[3:7]))


def check_backward(x, weight, *arguments, **options):
    stride, padding, dilation, groups = arguments
    y = like(oracle.conv_relu(x.float(), weight.float(), None, *arguments).to(x.dtype), x)
    y[0, 0, 0, 0] = float("nan")  # torch's ReLU lets the gradient pass there
    grad = random(tuple(y.shape), x.dtype, seed=9)
    dz = torch.ops.aten.threshold_backward(grad, y, 0)
    found = conv_relu_backward(grad, y, x, weight, *arguments, ALL, **options)
    bias = torch.zeros(weight.shape[0])

    def conv(a, b, c):
        return F.conv2d(a, b, c, stride, padding, dilation, groups)

    expected = oracle.gradients(conv, dz, x, weight, bias)
    magnitude = oracle.gradients(conv, dz.abs(), x.abs(), weight.abs(), bias)
    pixels = dz[:, 0].numel()
    summands = (weight[:, 0].numel(), pixels, pixels)
    for result, wanted, count, most in zip(found, expected, summands, magnitude, strict=True):
        assert_within(result, wanted, count, most)
    assert found[0].stride() == like(found[0], x).stride()
    assert found[1].stride() == torch.empty_like(weight).stride()
    return grad, y, found


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_backward(case, layout, dtype):
    x, weight, _ = tensors(case, dtype, layout)
    tiles = {"input_tile": FEW_PROGRAMS[0], "weight_tile": FEW_PROGRAMS[1]}
    check_backward(x, weight, *case[3:7], **tiles)


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("case", BLOCK_CASES, ids=str)
def test_the_gradient_of_few_channels_goes_by_blocks(case, layout, dtype):
    x, weight, _ = tensors(case, dtype, layout)
    assert by_blocks(geometry(x.shape[2:], weight, *case[3:7]))
    check_backward(x, weight, *case[3:7])


@pytest.mark.parametrize("layout", ["nhwc-slice", "nhwc-pitch", "nchw-pitch"])
def test_backward_reads_every_layout_in_place(layout):
    case = CASES[3]
    x, weight, _ = tensors(case, F16, layout, weight_layout="nchw")
    check_backward(x, weight, *case[3:7])


@pytest.mark.parametrize("pitch", [0, 1])
def test_weight_gradient_reads_past_a_row_only_into_its_pitch(pitch):
    """Kernel rows of 33 values are taken 36 at a time: the three too many are NaN, or another
    row's, and unused.
    """
    memory = torch.full((1, 15, 15 + pitch, 3), float("nan"), dtype=F16)
    memory[:, :, :15] = torch.randn(1, 15, 15, 3)
    x = memory[:, :, :15].permute(0, 3, 1, 2)
    weight = random((24, 3, 11, 11), F16, "nhwc")
    check_backward(x, weight, (4, 4), (0, 0), ONE, 1)


@pytest.mark.slow
def test_every_gradient_tile():
    case = CASES[2]
    x, weight, _ = tensors(case, F16, "nhwc")
    for tile in configs.CONV_INPUT_GRADIENT[True]:
        check_backward(x, weight, *case[3:7], input_tile=tile)
    for tile in configs.CONV_WEIGHT_GRADIENT[True]:
        check_backward(x, weight, *case[3:7], weight_tile=tile)
    x, weight, _ = tensors(case, F16, "nchw")
    for tile in configs.CONV_INPUT_GRADIENT[False]:
        check_backward(x, weight, *case[3:7], input_tile=tile)
    for tile in configs.CONV_WEIGHT_GRADIENT[False]:
        check_backward(x, weight, *case[3:7], weight_tile=tile)


def test_backward_is_the_same_every_run_and_asks_for_no_more_than_wanted():
    case = CASES[3]
    x, weight, _ = tensors(case, F16, "nhwc")
    grad, y, found = check_backward(x, weight, *case[3:7])
    again = conv_relu_backward(grad, y, x, weight, *case[3:7], ALL)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    for i in range(3):
        mask = tuple(i == j for j in range(3))
        parts = conv_relu_backward(grad, y, x, weight, *case[3:7], mask)
        assert [p.numel() > 0 for p in parts] == list(mask)
        if i < 2:
            assert torch.equal(parts[i], found[i])


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("case", [CASES[0], CASES[2]], ids=str)
def test_a_first_layers_weight_gradient_masks_at_load(case, dtype, layout):
    """Bit for bit what the pass gives, NaN outputs and gradients of another layout included."""
    x, weight, _ = tensors(case, dtype, layout)
    y = like(oracle.conv_relu(x.float(), weight.float(), None, *case[3:7]).to(dtype), x)
    y[0, 0, 0, 0] = float("nan")
    for grad_layout in ("nchw", "nhwc"):
        grad = random(tuple(y.shape), dtype, grad_layout, seed=9)
        dz = torch.ops.aten.threshold_backward(grad, y, 0)
        wanted = (False, True, True)
        found = conv_relu_backward(grad, y, x, weight, *case[3:7], wanted)
        given = conv_relu_backward(dz, y, x, weight, *case[3:7], wanted, grad_is_masked=True)
        assert all(torch.equal(a, b) for a, b in zip(found, given, strict=True))


def test_ieee_gradients():
    case = CASES[3]
    x, weight, _ = tensors(case, F32, "nhwc")
    check_backward(x, weight, *case[3:7], precision="ieee")


@pytest.mark.parametrize("relu", [True, False], ids=["relu", "plain"])
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("case", LINEAR_CASES, ids=str)
def test_linear(case, dtype, relu):
    """Forward and gradients, on the convolution's tiles; rows of NaN lie between those of x."""
    rows, inputs, outputs = case
    x = torch.full((*rows, inputs + 3), float("nan"), dtype=dtype)[..., :inputs]
    x.copy_(torch.randn(*rows, inputs))
    weight, bias = random((1, 1, outputs, inputs), dtype)[0, 0], torch.randn(outputs).to(dtype)
    y = linear_relu(x, weight, bias, relu)
    wide = [t.double() for t in (x, weight, bias)]
    expected, magnitude = F.linear(*wide), F.linear(*(t.abs() for t in wide))
    assert_within(y, expected.relu() if relu else expected, inputs + 2, magnitude)
    assert y.is_contiguous()
    y.view(-1)[0] = float("nan")  # torch's ReLU lets the gradient pass there
    grad = torch.randn(y.shape).to(dtype)
    dz = torch.ops.aten.threshold_backward(grad, y, 0) if relu else grad
    found = linear_relu_backward(grad, y if relu else None, x, weight, ALL)
    wanted = oracle.gradients(F.linear, dz, x, weight, bias)
    most = oracle.gradients(F.linear, dz.abs(), x.abs(), weight.abs(), bias)
    count = x[..., 0].numel()
    for result, want, summands, at_most in zip(
        found, wanted, (outputs, count, count), most, strict=True
    ):
        assert_within(result, want, summands, at_most)
    for i in range(3):
        mask = tuple(i == j for j in range(3))
        parts = linear_relu_backward(grad, y if relu else None, x, weight, mask)
        assert [p.numel() > 0 for p in parts] == list(mask)


def test_an_empty_batch():
    x, weight = torch.empty(0, 4, 5, 5), torch.randn(6, 4, 3, 3)
    y = conv_relu(x, weight, None, ONE, ONE, ONE, 1)
    assert y.shape == (0, 6, 5, 5)
    gx, gw, gb = conv_relu_backward(y, y, x, weight, ONE, ONE, ONE, 1, ALL)
    assert gx.shape == x.shape
    assert torch.equal(gw, torch.zeros_like(weight))
    assert torch.equal(gb, torch.zeros(6))
    x, weight = torch.empty(0, 5), torch.randn(6, 5)
    y = linear_relu(x, weight, None, True)
    assert y.shape == (0, 6)
    gx, gw, gb = linear_relu_backward(y, y, x, weight, ALL)
    assert gx.shape == (0, 5)
    assert torch.equal(gw, torch.zeros_like(weight))
    assert torch.equal(gb, torch.zeros(6))


def test_offsets_beyond_32_bits():
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        memory = torch.empty(2**31 + 2**16, dtype=F16)
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = True
    x = memory.as_strided((2, 64, 4, 4), (2**31 + 64, 1, 256, 64)).copy_(torch.randn(2, 64, 4, 4))
    dense, weight = (
        x.contiguous(memory_format=torch.channels_last),
        random((16, 64, 3, 3), F16, "nhwc"),
    )
    y = conv_relu(x, weight, None, ONE, ONE, ONE, 1)
    assert torch.equal(y, conv_relu(dense, weight, None, ONE, ONE, ONE, 1))
    far = conv_relu_backward(y, y, x, weight, ONE, ONE, ONE, 1, ALL)
    near = conv_relu_backward(y, y, dense, weight, ONE, ONE, ONE, 1, ALL)
    assert all(torch.equal(a, b) for a, b in zip(far, near, strict=True))
