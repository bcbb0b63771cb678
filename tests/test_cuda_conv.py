"""csrc/cuda's convolution and its gradients, executed on the host against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastalex import reference
from tests.support import cuda_host
from tests.support.cuda_cases import FORMATS, assert_within, draw, rounding, sum_bound

pytestmark = pytest.mark.skipif(
    cuda_host.unavailable() is not None, reason=str(cuda_host.unavailable())
)

# (input shape, output channels, kernel, stride, padding, dilation, groups); a reason each
CASES = {
    "partial tiles": ((1, 32, 9, 9), 48, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "groups, several images a tile": ((2, 32, 9, 7), 48, (3, 3), (1, 1), (1, 1), (1, 1), 2),
    "conv1": ((1, 3, 23, 23), 32, (11, 11), (4, 4), (0, 0), (1, 1), 1),
    "three channels, padding": ((1, 3, 24, 24), 24, (5, 5), (2, 2), (2, 2), (1, 1), 1),
    "dilation": ((2, 8, 11, 10), 16, (3, 3), (2, 2), (1, 1), (2, 2), 1),
    "odd everything": ((1, 6, 8, 9), 10, (3, 2), (2, 1), (1, 0), (1, 2), 2),
    "one tap and two columns of tiles": ((1, 64, 5, 5), 130, (1, 1), (1, 1), (0, 0), (1, 1), 1),
    "split depth": ((1, 256, 5, 5), 64, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "stride past the filter": ((1, 16, 9, 9), 8, (2, 2), (3, 3), (0, 0), (1, 1), 1),
    "filter larger than the image": ((1, 8, 3, 3), 8, (5, 5), (1, 1), (2, 2), (1, 1), 1),
}
MATHS = {
    "float32": (torch.float32, False),
    "tf32": (torch.float32, True),
    "float16": (torch.float16, False),
    "bfloat16": (torch.bfloat16, False),
}
each = pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
every_math = pytest.mark.parametrize("math", MATHS.values(), ids=list(MATHS))
every_layout = pytest.mark.parametrize("layout", FORMATS)


@pytest.fixture
def host():
    library = cuda_host.host_cuda()
    library.schedule("forward")
    yield library
    library.schedule("forward")
    library.tf32 = False
    library.launches()


def operands(case, dtype, layout):
    shape, out, kernel, *geometry = case
    x = draw(shape, dtype, layout)
    fan_in = shape[1] // geometry[-1] * kernel[0] * kernel[1]
    weight = draw((out, shape[1] // geometry[-1], *kernel), dtype, layout, 1, fan_in**-0.5)
    return x, weight, draw((out,), dtype, seed=2), fan_in


def input_error(tf32: bool) -> float:
    """Relative error of a product of two operands rounded to TF32's 11 significant bits."""
    return 2 * 2.0**-11 + 2.0**-22 if tf32 else 0.0


@each
@every_layout
@every_math
def test_conv_relu(host, case, layout, math):
    dtype, host.tf32 = math
    x, weight, bias, fan_in = operands(case, dtype, layout)
    geometry = case[3:]
    y = host.conv_relu(x, weight, bias, *geometry)
    exact = F.conv2d(x.double(), weight.double(), bias.double(), *geometry).relu()
    absolute = F.conv2d(x.double().abs(), weight.double().abs(), bias.double().abs(), *geometry)
    bound = sum_bound(absolute, fan_in + 1) + absolute * input_error(host.tf32)
    assert_within(y, exact, bound + rounding(exact, dtype))


@each
@every_layout
@every_math
def test_conv_relu_backward(host, case, layout, math):
    dtype, host.tf32 = math
    x, weight, bias, _ = operands(case, dtype, layout)
    geometry = case[3:]
    y = reference.conv_relu(x.double(), weight.double(), bias.double(), *geometry).to(dtype)
    grad = draw(y.shape, dtype, layout, seed=3)
    got = host.conv_relu_backward(grad, y, x, weight, *geometry, (True, True, True))
    wide = [t.double() for t in (grad, y, x, weight)]
    exact = reference.conv_relu_backward(*wide, *geometry, (True, True, True))
    magnitudes = [wide[0].abs(), wide[1], wide[2].abs(), wide[3].abs()]
    absolute = reference.conv_relu_backward(*magnitudes, *geometry, (True, True, True))
    taps = case[2][0] * case[2][1]
    pixels = y.shape[0] * y.shape[2] * y.shape[3]
    terms = (taps * weight.shape[0], pixels + 16, pixels + 16)  # 16: splits added afterwards
    for i, (one, truth, size, count) in enumerate(zip(got, exact, absolute, terms, strict=True)):
        product = 0.0 if i == 2 else input_error(host.tf32)
        assert_within(one, truth, sum_bound(size, count) + size * product + rounding(truth, dtype))


@every_math
def test_each_gradient_can_be_left_out(host, math):
    dtype, host.tf32 = math
    x, weight, bias, _ = operands(CASES["groups, several images a tile"], dtype, "nhwc")
    geometry = CASES["groups, several images a tile"][3:]
    y = host.conv_relu(x, weight, bias, *geometry)
    whole = host.conv_relu_backward(y, y, x, weight, *geometry, (True, True, True))
    for i in range(3):
        mask = tuple(j == i for j in range(3))
        part = host.conv_relu_backward(y, y, x, weight, *geometry, mask)
        assert torch.equal(part[i], whole[i])
        assert all(part[j].numel() == 0 for j in range(3) if j != i)


@pytest.mark.parametrize("padding", [0, 4])
@pytest.mark.parametrize("math", ["float32", "tf32", "float16", "bfloat16"])
def test_padded_rows_serve_conv1_by_windows(host, math, padding):
    """Rows of 24 pixels for 23: copies are asynchronous, and the NaN in the padding stays there."""
    dtype, host.tf32 = MATHS[math]
    pitched = draw((1, 3, 23, 24), dtype, "nhwc")
    pitched[..., 23:] = float("nan")
    x = pitched[..., :23] if padding == 0 else draw((1, 3, 23, 24), dtype, "nhwc")
    weight = draw((96, 3, 11, 11), dtype, "nchw", 1, 363**-0.5)
    y = host.conv_relu(x, weight, None, (4, 4), (padding, padding), (1, 1), 1)
    assert any("WindowCopier" in launch.kernel for launch in host.launches())
    exact = F.conv2d(x.double(), weight.double(), None, 4, padding).relu()
    absolute = F.conv2d(x.double().abs(), weight.double().abs(), None, 4, padding)
    bound = sum_bound(absolute, 363) + absolute * input_error(host.tf32)
    assert_within(y, exact, bound + rounding(exact, dtype))


@every_layout
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["partial tiles", "conv1", "dilation", "odd everything"])
def test_one_bad_pixel_reaches_exactly_the_outputs_of_torch(host, name, layout, value):
    for dtype in (torch.float32, torch.float16):
        x, weight, bias, _ = operands(CASES[name], dtype, layout)
        x[0, 1, x.shape[2] // 2, x.shape[3] // 2] = value
        geometry = CASES[name][3:]
        y = host.conv_relu(x, weight, bias, *geometry)
        expected = F.conv2d(x.float(), weight.float(), bias.float(), *geometry).relu()
        assert torch.equal(y.isfinite(), expected.isfinite())
        assert torch.equal(y.isnan(), expected.isnan())


def test_a_nan_output_passes_its_gradient_as_torch_does(host):
    x, weight, _, _ = operands(CASES["partial tiles"], torch.float32, "nhwc")
    y = torch.full((1, 48, 9, 9), float("nan")).contiguous(memory_format=torch.channels_last)
    geometry = CASES["partial tiles"][3:]
    got = host.conv_relu_backward(torch.ones_like(y), y, x, weight, *geometry, (False, False, True))
    assert torch.equal(
        got[2], torch.ops.aten.threshold_backward(torch.ones_like(y), y, 0).sum((0, 2, 3))
    )


@pytest.mark.parametrize("schedule", [s for s in cuda_host.SCHEDULES if s != "forward"])
@pytest.mark.parametrize("name", ["partial tiles", "split depth", "odd everything"])
@every_math
def test_every_schedule_gives_the_same_bits(host, name, schedule, math):
    dtype, host.tf32 = math
    geometry = CASES[name][3:]
    for layout in FORMATS:
        x, weight, bias, _ = operands(CASES[name], dtype, layout)
        results = []
        for kind in ("forward", schedule):
            host.schedule(kind, seed=5)
            y = host.conv_relu(x, weight, bias, *geometry)
            gradients = host.conv_relu_backward(y, y, x, weight, *geometry, (True, True, True))
            results.append((y, *gradients))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("math", ["float16", "tf32"])
def test_many_pixels_choose_the_wide_tiles(host, math):
    dtype, host.tf32 = MATHS[math]
    x = draw((4, 64, 27, 27), dtype, "nhwc")
    weight = draw((256, 64, 3, 3), dtype, "nhwc", 1, 576**-0.5)
    y = host.conv_relu(x, weight, None, (1, 1), (1, 1), (1, 1), 1)
    exact = F.conv2d(x.double(), weight.double(), None, 1, 1).relu()
    absolute = F.conv2d(x.double().abs(), weight.double().abs(), None, 1, 1)
    bound = sum_bound(absolute, 576) + absolute * input_error(host.tf32)
    assert_within(y, exact, bound + rounding(exact, dtype))


ALEXNET = {
    "conv1": ((1, 3, 227, 228), 96, (11, 11), (4, 4), (0, 0), (1, 1), 1),
    "conv2": ((1, 96, 27, 27), 256, (5, 5), (1, 1), (2, 2), (1, 1), 2),
    "conv3": ((1, 256, 13, 13), 384, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "conv4": ((1, 384, 13, 13), 384, (3, 3), (1, 1), (1, 1), (1, 1), 2),
    "conv5": ((1, 384, 13, 13), 256, (3, 3), (1, 1), (1, 1), (1, 1), 2),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ALEXNET)
@every_math
def test_alexnet_layers_at_full_size(host, name, math):
    dtype, host.tf32 = math
    case = ALEXNET[name]
    x, weight, bias, fan_in = operands(case, dtype, "nhwc")
    y = host.conv_relu(x, weight, bias, *case[3:])
    exact = F.conv2d(x.double(), weight.double(), bias.double(), *case[3:]).relu()
    absolute = F.conv2d(x.double().abs(), weight.double().abs(), bias.double().abs(), *case[3:])
    bound = sum_bound(absolute, fan_in + 1) + absolute * input_error(host.tf32)
    assert_within(y, exact, bound + rounding(exact, dtype))
