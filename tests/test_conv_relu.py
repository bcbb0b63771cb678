"""conv2d_relu on every backend, layout and dtype, against float64; packed weights; autocast."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F

import fastalex
from fastalex import ops, reference
from fastalex.ops import _onednn
from fastalex.ops.conv_relu import CONV_RELU, CONV_RELU_BACKWARD
from tests.support import bounds
from tests.support.backends import BACKENDS, running
from tests.support.cases import CONV_CASES, DTYPES, Conv, lay_out, random_input, with_specials

DTYPE_IDS = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
LAYOUTS = ("contiguous", "channels_last", "channel_slice", "row_slice", "expanded", "transposed")


pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


def backends_of(operator) -> list[str]:
    """The names for :func:`running` of every backend that has the operator."""
    names = [kernel.backend for kernel in operator.kernels.kernels]
    return [name for name in (*BACKENDS, "onednn") if name.partition("-")[0] in names]


@pytest.fixture
def any_size(monkeypatch):
    """oneDNN leaves small convolutions to others; here it takes them."""
    monkeypatch.setattr(_onednn, "_SMALLEST", 0)


def skip_unserved(backend, dtype):
    if backend == "onednn":
        probe = torch.empty(1, 1, 1, 1, dtype=dtype)
        reason = _onednn.refuse(probe, probe)
        if reason:
            pytest.skip(reason)


def conv_input(case: Conv, dtype, layout):
    if len(case.shape) == 4:
        return random_input(case.shape, dtype, layout)
    return random_input((1, *case.shape), dtype, layout).squeeze(0)


def stock(case: Conv, x, weight, bias):
    return F.relu(F.conv2d(x, weight, bias, **case.arguments()))


@pytest.mark.parametrize("case", CONV_CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("backend", backends_of(CONV_RELU))
@pytest.mark.usefixtures("any_size")
def test_forward(backend, dtype, case):
    skip_unserved(backend, dtype)
    weight, bias = case.parameters(dtype)
    wide_bias = None if bias is None else bias.double()
    summands = weight[0].numel() + 1
    for layout in LAYOUTS:
        x = conv_input(case, dtype, layout)
        with running(backend):
            y = ops.conv2d_relu(x, weight, bias, **case.arguments())
        expected = stock(case, x.double(), weight.double(), wide_bias)
        magnitude = F.conv2d(
            x.double().abs(),
            weight.double().abs(),
            None if bias is None else wide_bias.abs(),
            **case.arguments(),
        )
        assert y.dtype is dtype
        bounds.assert_within(y, expected, bounds.sum_bound(magnitude, summands, expected, dtype))


# Cases whose padding the operator takes as a pair: 'same' and unbatched inputs end in these.
OPERATOR_CASES = [c for c in CONV_CASES if not isinstance(c.padding, str) and len(c.shape) == 4]


def operator_arguments(case: Conv):
    pairs = (
        (v, v) if isinstance(v, int) else v for v in (case.stride, case.padding, case.dilation)
    )
    return (*pairs, case.groups)


@pytest.mark.parametrize("case", OPERATOR_CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("backend", backends_of(CONV_RELU_BACKWARD))
def test_backward(backend, dtype, case):
    weight, bias = case.parameters(dtype)
    arguments = operator_arguments(case)
    mask = [True, True, case.bias]
    for layout, grad_layout in (
        ("contiguous", "contiguous"),
        ("channels_last", "channels_last"),
        ("channels_last", "contiguous"),
        ("contiguous", "channels_last"),
        ("channel_slice", "expanded"),
        ("transposed", "row_slice"),
    ):
        x = random_input(case.shape, dtype, layout)
        y = CONV_RELU.run(x, weight, bias, *arguments)
        g = random_input(tuple(y.shape), dtype, grad_layout)
        with running(backend):
            grads = CONV_RELU_BACKWARD.run(g, y, x, weight, *arguments, mask)
        wide = [tensor.double() for tensor in (g, y, x, weight)]
        expected = reference.conv_relu_backward(*wide, *arguments, mask)
        magnitudes = reference.conv_relu_backward(
            wide[0].abs(), wide[1], wide[2].abs(), wide[3].abs(), *arguments, mask
        )
        pixels = y[:, 0].numel()
        summands = (weight[:, 0].numel() // case.groups, pixels, pixels)
        for actual, right, magnitude, count in zip(
            grads, expected, magnitudes, summands, strict=True
        ):
            assert actual.dtype is dtype
            assert actual.shape == right.shape
            bounds.assert_within(actual, right, bounds.sum_bound(magnitude, count, right, dtype))


@pytest.mark.parametrize("backend", backends_of(CONV_RELU))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.usefixtures("any_size")
def test_nan_and_infinities_agree_with_torch(backend, dtype, layout):
    """A NaN pixel makes NaN wherever a window holds it, and not zero: torch's ReLU keeps NaN."""
    skip_unserved(backend, dtype)
    case = Conv((2, 18, 9, 9), 24, padding=1)
    weight, bias = case.parameters(dtype)
    x = torch.randn(case.shape, dtype=torch.float32)
    x[0, 3, 2, 2] = float("nan")
    x[0, 5, 6, 7] = float("inf")
    x[1, 1, 4, 4] = -float("inf")
    x = lay_out(x.to(dtype), layout)
    with running(backend):
        y = ops.conv2d_relu(x, weight, bias, **case.arguments())
    expected = stock(case, x.double(), weight.double(), bias.double())
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.isinf(), expected.isinf())


@pytest.mark.parametrize("backend", backends_of(CONV_RELU))
def test_nan_in_weight_and_bias_stays(backend):
    weight, bias = torch.randn(32, 16, 3, 3), torch.randn(32)
    weight[3, 2, 1, 1] = float("nan")
    bias[5] = float("nan")
    x = torch.randn(2, 16, 20, 20)
    with running(backend):
        y = ops.conv2d_relu(x, weight, bias, padding=1)
    assert y[:, 5].isnan().all()
    assert y[:, 3].isnan().any()
    assert not y[:, 6].isnan().any()


def test_mask_follows_threshold_backward():
    """No gradient where the output is zero; what torch passes where it is NaN."""
    output = torch.tensor([-0.0, 0.0, 2.0, float("nan"), float("inf")]).view(1, 1, 1, 5)
    grad = torch.full_like(output, 3.0)
    weight = torch.ones(1, 1, 1, 1)
    arguments = ((1, 1), (0, 0), (1, 1), 1, [True, False, False])
    for backend in backends_of(CONV_RELU_BACKWARD):
        with running(backend):
            gx, _, _ = CONV_RELU_BACKWARD.run(grad, output, grad, weight, *arguments)
        assert torch.equal(gx, torch.ops.aten.threshold_backward(grad, output, 0))


@pytest.mark.parametrize("backend", backends_of(CONV_RELU))
@pytest.mark.parametrize("case", OPERATOR_CASES, ids=str)
@pytest.mark.usefixtures("any_size")
def test_layout_of_the_output_is_the_inputs(backend, case):
    weight, bias = case.parameters(torch.float32)
    for format in (torch.contiguous_format, torch.channels_last):
        for weight_format in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(case.shape).contiguous(memory_format=format)
            filters = weight.clone(memory_format=weight_format).requires_grad_()
            with running(backend):
                y = ops.conv2d_relu(x, filters.detach(), bias, **case.arguments())
            # Without elements every layout is contiguous.
            assert y.is_contiguous(memory_format=format) or not y.numel()
            leaf = x.detach().requires_grad_()
            with running("torch"):
                ops.conv2d_relu(leaf, filters, bias, **case.arguments()).sum().backward()
            assert leaf.grad.is_contiguous(memory_format=format) or not y.numel()
            assert filters.grad.is_contiguous(memory_format=weight_format)


@pytest.mark.parametrize("wanted", range(8))
@pytest.mark.parametrize("backend", backends_of(CONV_RELU_BACKWARD))
def test_gradients_not_asked_for_are_not_made(backend, wanted):
    mask = [bool(wanted & bit) for bit in (1, 2, 4)]
    x, weight = torch.randn(2, 4, 6, 6), torch.randn(8, 4, 3, 3)
    geometry = ((1, 1), (1, 1), (1, 1), 1)
    y = CONV_RELU.run(x, weight, None, *geometry)
    g = torch.randn_like(y)
    with running(backend):
        grads = CONV_RELU_BACKWARD.run(g, y, x, weight, *geometry, mask)
        complete = CONV_RELU_BACKWARD.run(g, y, x, weight, *geometry, [True] * 3)
    for want, grad, whole in zip(mask, grads, complete, strict=True):
        if want:
            torch.testing.assert_close(grad, whole)
        else:
            assert grad.numel() == 0


def test_saves_input_weight_and_output_alone():
    """The stock pair keeps the convolution's output too, where ReLU is not in place."""
    x = torch.randn(2, 8, 9, 9, requires_grad=True)
    weight = torch.randn(16, 8, 3, 3, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = ops.conv2d_relu(x, weight)
    assert {t.data_ptr() for t in saved} == {x.data_ptr(), weight.data_ptr(), y.data_ptr()}


# --- oneDNN: refusals and packed weights ---------------------------------------------------------


def big(dtype=torch.float32):
    """A layer and an input that oneDNN takes."""
    layer = ops.Conv2dReLU(16, 32, 3, padding=1).to(dtype)
    return layer, torch.randn(2, 16, 20, 20).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_onednn_refuses_dtypes(dtype):
    layer, x = big(dtype)
    name = str(dtype).replace(".", r"\.")
    with fastalex.use_backend("onednn"), pytest.raises(fastalex.BackendError, match=name):
        layer(x)


def test_onednn_refuses_small_convolutions():
    with fastalex.use_backend("onednn"), pytest.raises(fastalex.BackendError, match="so small"):
        ops.conv2d_relu(torch.randn(1, 1, 5, 5), torch.randn(1, 1, 3, 3))


def test_onednn_refuses_when_switched_off():
    layer, x = big()
    with (
        torch.backends.mkldnn.flags(enabled=False),
        fastalex.use_backend("onednn"),
        pytest.raises(fastalex.BackendError, match=r"mkldnn\.enabled"),
    ):
        layer(x)


def assert_current(layer, x):
    """Asserts that the layer on oneDNN computes what its present weights say, in each mode."""
    expected = F.relu(F.conv2d(x, layer.weight, layer.bias, padding=1)).detach()
    with fastalex.use_backend("onednn"):
        with torch.no_grad():
            torch.testing.assert_close(layer(x), expected)
        torch.testing.assert_close(layer(x).detach(), expected)


def double_in_place(layer, x):
    with torch.no_grad():
        layer.weight.mul_(2)


def write_through_a_view(layer, x):
    with torch.no_grad():
        layer.weight[3].fill_(0.5)


def replace_data(layer, x):
    layer.weight.data = torch.randn_like(layer.weight)


def optimiser_step(layer, x):
    layer(x).sum().backward()
    torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9).step()


def fused_optimiser_step(layer, x):
    layer(x).sum().backward()
    torch.optim.SGD(layer.parameters(), lr=0.1, fused=True).step()


def load_state_dict(layer, x):
    layer.load_state_dict(big()[0].state_dict())


def assign_state_dict(layer, x):
    layer.load_state_dict(big()[0].state_dict(), assign=True)


def new_parameter(layer, x):
    layer.weight = torch.nn.Parameter(torch.randn_like(layer.weight))


@pytest.mark.parametrize(
    "change",
    [
        double_in_place,
        write_through_a_view,
        replace_data,
        optimiser_step,
        fused_optimiser_step,
        load_state_dict,
        assign_state_dict,
        new_parameter,
    ],
)
def test_packed_weights_follow_the_weight(change):
    layer, x = big()
    assert_current(layer, x)
    change(layer, x)
    assert_current(layer, x)
    change(layer, x)
    change(layer, x)
    assert_current(layer, x)


def test_packed_weights_follow_the_geometry():
    layer, x = big()
    for size in (20, 24, 20):
        assert_current(layer, torch.randn(2, 16, size, size))
    assert_current(layer, x.contiguous(memory_format=torch.channels_last))


def test_packed_weights_under_inference_mode():
    layer, x = big()
    with torch.inference_mode():
        assert_current(layer, x)
        frozen = copy.deepcopy(layer)
        assert_current(frozen, x)
        frozen.weight.mul_(2)
        assert_current(frozen, x)


def test_a_deep_copy_packs_its_own():
    layer, x = big()
    assert_current(layer, x)
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        twin.weight.neg_()
    assert_current(twin, x)
    assert_current(layer, x)


def test_packed_weights_go_with_the_weight():
    _onednn._weights.clear()
    layer, x = big()
    assert_current(layer, x)
    assert layer.weight in _onednn._weights._packed
    gone = weakref.ref(layer.weight)
    del layer
    gc.collect()
    assert gone() is None
    assert len(_onednn._weights._packed) == 0


# --- autocast ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, torch.float64])
def test_autocast_dtypes_are_conv2ds(dtype, given):
    """Every combination that conv2d takes under autocast gives the dtype it gives."""
    weight, bias, x = torch.randn(8, 4, 3, 3), torch.randn(8), torch.randn(2, 4, 9, 9)
    with torch.autocast("cpu", dtype=dtype):
        if given is torch.float64:  # left alone
            weight, bias = weight.double(), bias.double()
        expected = F.relu(F.conv2d(x.to(given), weight, bias))
        y = ops.conv2d_relu(x.to(given), weight, bias)
    assert y.dtype is expected.dtype
    torch.testing.assert_close(y, expected, rtol=0.02, atol=0.02)


def test_autocast_gradients_reach_float32_parameters():
    layer, x = big()
    x.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype is torch.bfloat16
    y.sum().backward()
    for tensor in (x, layer.weight, layer.bias):
        assert tensor.grad.dtype is torch.float32
    narrow = [t.detach().bfloat16().double() for t in (x, layer.weight, layer.bias)]
    leaves = [t.requires_grad_() for t in narrow]
    wide = F.relu(F.conv2d(*leaves, padding=1))
    wide.sum().backward()
    # A sum of 800 ones is exact in float32; the masks differ only where the sum rounds to zero.
    same_mask = (y > 0) == (wide > 0)
    assert same_mask.float().mean() > 0.999
    torch.testing.assert_close(
        layer.bias.grad.double(), leaves[2].grad, rtol=bounds.eps(torch.bfloat16), atol=1
    )


def test_autocast_agrees_with_its_own_cast():
    """Under autocast: exactly the call with everything cast by hand."""
    layer, x = big()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = layer(x)
    by_hand = ops.conv2d_relu(
        x.bfloat16(), layer.weight.bfloat16(), layer.bias.bfloat16(), padding=1
    )
    assert torch.equal(inside, by_hand)


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_padding_modes_of_the_layer(mode):
    fused = ops.Conv2dReLU(3, 5, 3, padding=1, padding_mode=mode)
    layer = torch.nn.Conv2d(3, 5, 3, padding=1, padding_mode=mode)
    layer.load_state_dict(fused.state_dict())
    x = torch.randn(2, 3, 7, 7)
    torch.testing.assert_close(fused(x), F.relu(layer(x)))


def test_specials_in_the_input_do_not_crash():
    x = with_specials(torch.randn(1, 4, 9, 9))
    weight = torch.randn(3, 4, 3, 3)
    assert torch.equal(ops.conv2d_relu(x, weight).isnan(), F.conv2d(x, weight).isnan())
