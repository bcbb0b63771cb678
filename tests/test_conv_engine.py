"""The CPU convolution engine against float64, on every instruction set this machine has.

Direct results must lie within (terms + 2) roundings of the sum of absolute products, element by
element.  Winograd's contract is the documented one of its precision level: 1e-5 of the norm and
5e-5 of the largest output at "high", ten times that at "medium".
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.support.conv_library import SOURCES, Plan, Shape, available_isas, library

ISAS = available_isas()
LAYOUTS = {"nhwc": torch.channels_last, "nchw": torch.contiguous_format}
EPS = torch.finfo(torch.float32).eps
NORM_LIMIT = {"high": 1e-5, "medium": 1e-4}
MAX_LIMIT = {"high": 5e-5, "medium": 5e-4}

# What each case is there for.
CASES = {
    "alexnet conv1: space to depth, one exact tiling": Shape((2, 3, 67, 67), 96, (11, 11), (4, 4)),
    "alexnet conv2: 5x5, groups": Shape((2, 96, 27, 27), 64, (5, 5), padding=(2, 2), groups=2),
    "alexnet conv3: 13 = 5 + 4 + 4": Shape((3, 64, 13, 13), 96, padding=(1, 1)),
    "tails of channels and filters": Shape((2, 19, 12, 17), 35, padding=(1, 1)),
    "more channels than one pass": Shape((1, 300, 9, 10), 33, padding=(1, 1)),
    "resnet stem: 7x7 stride 2": Shape((2, 3, 38, 46), 16, (7, 7), (2, 2), (3, 3)),
    "5x5 stride 2, channels": Shape((1, 24, 21, 21), 32, (5, 5), (2, 2), (2, 2)),
    "pointwise": Shape((3, 30, 11, 7), 48, (1, 1)),
    "pointwise, stride 2": Shape((2, 17, 11, 8), 20, (1, 1), (2, 2)),
    "smallest map": Shape((2, 16, 2, 3), 16, padding=(1, 1)),
    "one output": Shape((2, 8, 3, 3), 5),
    "one column": Shape((2, 8, 9, 1), 5, (3, 1), padding=(1, 0)),
    "rectangular, strided, dilated": Shape((2, 6, 20, 21), 10, (3, 5), (2, 1), (2, 3), (2, 1), 2),
    "dilated": Shape((2, 16, 15, 15), 16, padding=(2, 2), dilation=(2, 2)),
    "stride beyond the kernel": Shape((2, 8, 13, 12), 8, (2, 2), (3, 4)),
    "more padding than the kernel needs": Shape((1, 8, 7, 7), 16, padding=(4, 3)),
    "depthwise": Shape((2, 12, 14, 14), 12, padding=(1, 1), groups=12),
    "2x2": Shape((2, 16, 9, 10), 16, (2, 2)),
    "4x4": Shape((2, 16, 14, 11), 16, (4, 4), padding=(1, 1)),
}


def tensors(shape: Shape, layout: torch.memory_format, dtype: torch.dtype = torch.float32):
    x = torch.randn(shape.input).to(dtype).contiguous(memory_format=layout)
    terms = shape.weight_shape[1] * shape.kernel[0] * shape.kernel[1]
    weight = (torch.randn(shape.weight_shape) * terms**-0.5).to(dtype)
    return x, weight, torch.randn(shape.filters).to(dtype)


def empty(shape: tuple[int, ...], like: Tensor, layout: torch.memory_format) -> Tensor:
    return torch.full(shape, float("nan"), dtype=like.dtype).contiguous(memory_format=layout)


def convolve(shape: Shape, x: Tensor, weight: Tensor, bias: Tensor | None, **options) -> Tensor:
    layout = torch.contiguous_format if x.is_contiguous() else torch.channels_last
    plan = Plan(shape, dtype=x.dtype, **options)
    plan.pack(weight)
    out = empty(shape.output_shape, x, layout)
    plan.forward(x, weight, bias, out)
    plan.assert_canaries()
    return out


def assert_direct(actual: Tensor, expected: Tensor, magnitude: Tensor, terms: int) -> None:
    """Within one rounding per term, and one of the result in its own type."""
    bound = (terms + 2) * EPS * magnitude + torch.finfo(actual.dtype).eps * expected.abs() + 1e-37
    excess = ((actual.double() - expected).abs() - bound).max().item()
    assert excess <= 0, f"exceeds the bound by {excess:.3g}"


def assert_winograd(actual: Tensor, expected: Tensor, precision: str = "high") -> None:
    error = actual.double() - expected
    assert error.norm() <= NORM_LIMIT[precision] * expected.norm()
    assert error.abs().max() <= MAX_LIMIT[precision] * expected.abs().max()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("engine", ["direct", "winograd"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_forward(isa: str, engine: str, layout: str, case: str) -> None:
    shape = CASES[case]
    x, weight, bias = tensors(shape, LAYOUTS[layout])
    actual = convolve(shape, x, weight, bias, isa=isa, engine=engine)
    x, weight, bias = x.double(), weight.double(), bias.double()
    expected = F.conv2d(x, weight, bias, **shape.arguments).relu()
    if Plan(shape, isa=isa, engine=engine).chosen == "winograd":
        assert_winograd(actual, expected)
    else:
        magnitude = F.conv2d(x.abs(), weight.abs(), bias.abs(), **shape.arguments)
        assert_direct(actual, expected, magnitude, weight[0].numel())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("engine", ["direct", "winograd"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_gradients(isa: str, engine: str, layout: str, case: str) -> None:
    shape = CASES[case]
    x, weight, _ = tensors(shape, LAYOUTS[layout])
    output = torch.randn(shape.output_shape).contiguous(memory_format=LAYOUTS[layout])
    grad = torch.randn(shape.output_shape).contiguous(memory_format=LAYOUTS[layout])
    dz = torch.where(output > 0, grad, 0).double()

    def backward(dz: Tensor, x: Tensor, weight: Tensor):
        sizes = (shape.stride, shape.padding, shape.dilation, False, [0, 0], shape.groups)
        return torch.ops.aten.convolution_backward(
            dz, x, weight, [shape.filters], *sizes, [True, True, True]
        )

    expected = backward(dz, x.double(), weight.double())
    magnitude = backward(dz.abs(), x.double().abs(), weight.double().abs())

    data = Plan(shape, direction="input_gradient", isa=isa, engine=engine)
    data.pack(weight)
    grad_x = empty(shape.input, x, LAYOUTS[layout])
    data.input_gradient(grad, output, weight, grad_x)
    data.assert_canaries()
    weights = Plan(shape, direction="weight_gradient", isa=isa, engine=engine)
    grad_weight, grad_bias = torch.full_like(weight, torch.nan), torch.empty(shape.filters)
    weights.weight_gradient(grad, output, x, grad_weight, grad_bias)
    weights.assert_canaries()

    pixels = dz[:, 0].numel()
    taps = shape.filters // shape.groups * shape.kernel[0] * shape.kernel[1]
    if "winograd" in data.explain():
        assert_winograd(grad_x, expected[0])
    else:
        assert_direct(grad_x, expected[0], magnitude[0], taps)
    if weights.chosen == "winograd":
        assert_winograd(grad_weight, expected[1])
    else:
        assert_direct(grad_weight, expected[1], magnitude[1], pixels)
    assert_direct(grad_bias, expected[2], magnitude[2], pixels)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("engine", ["direct", "winograd"])
def test_half_types_round_once(isa: str, dtype: torch.dtype, layout: str, engine: str) -> None:
    """Float32 inside: the error is one rounding of the result, plus float32's own."""
    shape = Shape((2, 24, 13, 14), 40, padding=(1, 1))
    x, weight, bias = tensors(shape, LAYOUTS[layout], dtype)
    actual = convolve(shape, x, weight, bias, isa=isa, engine=engine)
    expected = F.conv2d(x.double(), weight.double(), bias.double(), padding=1).relu()
    bound = 0.5001 * torch.finfo(dtype).eps * expected.abs() + 1e-5 * expected.abs().max()
    assert ((actual.double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("engine", ["direct", "winograd"])
@pytest.mark.parametrize("weights", LAYOUTS)
def test_strided_views(engine: str, weights: str) -> None:
    """Row pitch, a slice of channels, a slice of the output: taken as they are."""
    shape = Shape((2, 32, 13, 13), 32, padding=(1, 1))
    wide = torch.randn(2, 48, 13, 16).contiguous(memory_format=torch.channels_last)
    x = wide[:, 8:40, :, :13]
    _, weight, bias = tensors(shape, torch.channels_last)
    weight = weight.contiguous(memory_format=LAYOUTS[weights])
    whole = torch.full((2, 40, 13, 13), 7.0).contiguous(memory_format=torch.channels_last)
    plan = Plan(shape, engine=engine, isa=ISAS[-1])
    plan.pack(weight)
    plan.forward(x, weight, bias, whole[:, 4:36])
    expected = F.conv2d(x.double(), weight.double(), bias.double(), padding=1).relu()
    assert_winograd(whole[:, 4:36], expected)
    assert (whole[:, :4] == 7).all()
    assert (whole[:, 36:] == 7).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("case", list(CASES)[:8])
def test_bitwise_equal_for_any_number_of_threads(isa: str, case: str) -> None:
    shape = replace(CASES[case], input=(5, *CASES[case].input[1:]))
    x, weight, bias = tensors(shape, torch.channels_last)
    grad = torch.randn(shape.output_shape).contiguous(memory_format=torch.channels_last)
    results = []
    for threads in (1, 2, 3):
        library().conv_set_threads(threads)
        out = convolve(shape, x, weight, bias, isa=isa, threads=threads)
        plan = Plan(shape, direction="weight_gradient", isa=isa, threads=threads)
        grad_weight, grad_bias = torch.empty_like(weight), torch.empty(shape.filters)
        plan.weight_gradient(grad, out, x, grad_weight, grad_bias)
        data = Plan(shape, direction="input_gradient", isa=isa, threads=threads)
        data.pack(weight)
        grad_x = torch.empty_like(x)
        data.input_gradient(grad, out, weight, grad_x)
        results.append((out, grad_weight, grad_bias, grad_x))
    library().conv_set_threads(2)
    for other in results[1:]:
        for first, second in zip(results[0], other, strict=True):
            assert torch.equal(first, second)


SPECIALS = [torch.nan, torch.inf, -torch.inf, 3e38]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("special", SPECIALS)
@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("fold", [False, True])
def test_nan_and_infinity_stay_where_torch_has_them(
    isa: str, layout: str, special: float, many: bool, fold: bool
) -> None:
    """Winograd would spread them over a tile; `many` is past the count it mends tile by tile."""
    shape = Shape((4, 16, 26, 26), 40, padding=(1, 1))
    if fold:
        shape = Shape((4, 3, 50, 50), 40, (7, 7), (2, 2), (3, 3))
    x, weight, bias = tensors(shape, LAYOUTS[layout])
    for image in range(4 if many else 1):
        for pixel in range(2, shape.input[2], 3 if many else 30):
            x[image, 1, pixel, (5 * pixel) % shape.input[3]] = special
    actual = convolve(shape, x, weight, bias, isa=isa, engine="winograd", tile=4)
    expected = F.conv2d(x, weight, bias, **shape.arguments).relu()
    assert torch.equal(actual.isnan(), expected.isnan())
    assert torch.equal(actual.isinf(), expected.isinf())
    finite = expected.isfinite() & (expected.abs() < 1e30)
    assert finite.any()
    torch.testing.assert_close(actual[finite], expected[finite], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("isa", ISAS)
def test_nan_in_the_weight_gradient(isa: str) -> None:
    shape = Shape((2, 16, 13, 13), 24, padding=(1, 1))
    x, weight, _ = tensors(shape, torch.channels_last)
    x[1, 3, 6, 6] = torch.inf
    grad = torch.randn(shape.output_shape).abs().contiguous(memory_format=torch.channels_last)
    plan = Plan(shape, direction="weight_gradient", isa=isa, engine="winograd")
    grad_weight, grad_bias = torch.empty_like(weight), torch.empty(24)
    plan.weight_gradient(grad, None, x, grad_weight, grad_bias)
    expected = torch.nn.grad.conv2d_weight(x, weight.shape, grad, padding=1)
    assert torch.equal(grad_weight.isinf(), expected.isinf())
    assert torch.equal(grad_weight.isnan(), expected.isnan())


def image_like(shape: Shape) -> Tensor:
    """Pixels of a 1/f spectrum, as photographs have, around a mean."""
    n, c, h, w = shape.input
    frequency = torch.fft.fftfreq(h)[:, None].hypot(torch.fft.fftfreq(w)[None])
    frequency[0, 0] = 1 / h
    spectrum = torch.fft.fft2(torch.randn(n, c, h, w)) / frequency
    pixels = torch.fft.ifft2(spectrum).real
    return pixels / pixels.std() * 60 + 120


DATA = {
    "random": lambda s: torch.randn(s.input),
    "rectified": lambda s: torch.randn(s.input).relu(),
    "image-like": image_like,
    "constant": lambda s: torch.full(s.input, 3.0),
    "tiny": lambda s: torch.randn(s.input) * 1e-30,
    "huge": lambda s: torch.randn(s.input) * 1e30,
    "alternating signs": lambda s: torch.randn(s.input).abs() * (-1.0) ** torch.arange(s.input[3]),
    "a few large": lambda s: torch.randn(s.input) * torch.where(torch.rand(s.input) > 0.99, 1e4, 1),
}
TILES = [
    (3, 3, "high"),
    (3, 4, "high"),
    (3, 5, "high"),
    (3, 6, "high"),
    (3, 7, "medium"),
    (5, 3, "high"),
    (5, 4, "high"),
    (5, 5, "medium"),
    (4, 3, "high"),
    (4, 4, "high"),
    (2, 3, "high"),
    (2, 4, "high"),
]


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize(("taps", "tile", "precision"), TILES)
def test_accuracy_of_every_tile(taps: int, tile: int, precision: str, data: str) -> None:
    size = 3 * tile + 2 * (tile - 1) + taps - 1
    shape = Shape((2, 128, size, size), 32, (taps, taps))
    _, weight, _ = tensors(shape, torch.channels_last)
    x = DATA[data](shape).contiguous(memory_format=torch.channels_last)
    plan = Plan(shape, engine="winograd", tile=tile, precision=precision, relu=False, isa=ISAS[-1])
    assert plan.chosen == "winograd"
    plan.pack(weight)
    actual = empty(shape.output_shape, x, torch.channels_last)
    plan.forward(x, weight, None, actual)
    assert_winograd(actual, F.conv2d(x.double(), weight.double()), precision)


def test_precision_chooses_among_tiles() -> None:
    shape = Shape((32, 256, 13, 13), 384, padding=(1, 1))
    assert Plan(shape, precision="highest", isa=ISAS[-1]).chosen == "direct"
    assert "F(7,3)" not in Plan(shape, precision="high", isa=ISAS[-1]).explain()
    forced = Plan(shape, precision="medium", engine="winograd", tile=7, isa=ISAS[-1])
    assert "F(7,3)" in forced.explain()


def test_empty_batch_has_zero_weight_gradients() -> None:
    shape = Shape((0, 8, 9, 9), 16, padding=(1, 1))
    x, weight, bias = tensors(shape, torch.channels_last)
    assert convolve(shape, x, weight, bias, isa=ISAS[-1]).shape == (0, 16, 9, 9)
    plan = Plan(shape, direction="weight_gradient", isa=ISAS[-1])
    grad_weight, grad_bias = torch.full_like(weight, torch.nan), torch.full((16,), torch.nan)
    plan.weight_gradient(torch.empty(0, 16, 9, 9), None, x, grad_weight, grad_bias)
    assert not grad_weight.any()
    assert not grad_bias.any()


@st.composite
def shapes(draw) -> Shape:
    groups = draw(st.integers(1, 3))
    kernel = (draw(st.integers(1, 5)), draw(st.integers(1, 5)))
    dilation = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    padding = (draw(st.integers(0, 3)), draw(st.integers(0, 3)))
    size = [
        draw(st.integers(max(1, d * (k - 1) + 1 - 2 * p), 24))
        for k, d, p in zip(kernel, dilation, padding, strict=True)
    ]
    return Shape(
        (draw(st.integers(1, 3)), groups * draw(st.integers(1, 20)), *size),
        groups * draw(st.integers(1, 40)),
        kernel,
        (draw(st.integers(1, 4)), draw(st.integers(1, 4))),
        padding,
        dilation,
        groups,
    )


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    shape=shapes(),
    isa=st.sampled_from(ISAS),
    layout=st.sampled_from(list(LAYOUTS)),
    engine=st.sampled_from(["auto", "direct", "winograd"]),
)
def test_any_shape(shape: Shape, isa: str, layout: str, engine: str) -> None:
    x, weight, bias = tensors(shape, LAYOUTS[layout])
    actual = convolve(shape, x, weight, bias, isa=isa, engine=engine)
    expected = F.conv2d(x.double(), weight.double(), bias.double(), **shape.arguments).relu()
    scale = F.conv2d(x.abs(), weight.abs(), bias.abs(), **shape.arguments).max()
    assert (actual.double() - expected).abs().max() <= 5e-5 * scale
    grad = torch.randn(shape.output_shape).contiguous(memory_format=LAYOUTS[layout])
    data = Plan(shape, direction="input_gradient", isa=isa, engine=engine)
    data.pack(weight)
    grad_x = empty(shape.input, x, LAYOUTS[layout])
    data.input_gradient(grad, None, weight, grad_x)
    sizes = (shape.stride, shape.padding, shape.dilation, False, [0, 0], shape.groups)
    expected = torch.ops.aten.convolution_backward(
        grad.double(), x.double(), weight.double(), None, *sizes, [True, False, False]
    )[0]
    assert (grad_x.double() - expected).abs().max() <= 5e-5 * max(1.0, expected.abs().max())


def test_generated_transforms_are_up_to_date() -> None:
    script = SOURCES / "generate_transforms.py"
    subprocess.run([sys.executable, str(script), "--check"], check=True)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("engine", ["direct", "winograd"])
@pytest.mark.parametrize("case", list(CASES)[:5])
@pytest.mark.parametrize("special", [None, torch.nan])
def test_image_by_image(isa: str, engine: str, case: str, special: float | None) -> None:
    """A sink receives the bits that the output tensor would."""
    shape = replace(CASES[case], input=(3, *CASES[case].input[1:]))
    x, weight, bias = tensors(shape, torch.channels_last)
    if special is not None:
        x[1, 0, 3, 3] = special
    whole = convolve(shape, x, weight, bias, isa=isa, engine=engine)
    by_image = convolve(shape, x, weight, bias, isa=isa, engine=engine, by_image=True)
    torch.testing.assert_close(by_image, whole, rtol=0, atol=0, equal_nan=True)
