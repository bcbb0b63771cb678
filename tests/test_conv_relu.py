"""conv2d_relu on every backend, layout and dtype, against float64, and what each refuses."""

from __future__ import annotations

import functools
import subprocess
import sys
import zlib

import pytest
import torch
import torch.nn.functional as F

import fastalex
from fastalex import ops, reference
from fastalex._geometry import in_layout_of
from fastalex.ops.conv_relu import CONV_RELU, CONV_RELU_BACKWARD
from tests.support import bounds
from tests.support.backends import BACKENDS, conv_precision, running, with_precisions
from tests.support.cases import (
    CONV_CASES,
    DTYPES,
    Conv,
    conv_layer,
    lay_out,
    random_input,
    with_specials,
)

DTYPE_IDS = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
LAYOUTS = ("contiguous", "channels_last", "channel_slice", "row_slice", "expanded", "transposed")


pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


def backends_of(operator) -> list[str]:
    """The names for :func:`running` of every backend that has the operator."""
    names = [kernel.backend for kernel in operator.kernels.kernels]
    return [name for name in BACKENDS if name.partition("-")[0] in names]


def skip_unserved(backend, dtype):
    if backend.startswith("cpu") and dtype is torch.float64:
        pytest.skip("the engine leaves float64 to torch")


def conv_input(case: Conv, dtype, layout):
    if len(case.shape) == 4:
        return random_input(case.shape, dtype, layout)
    return random_input((1, *case.shape), dtype, layout).squeeze(0)


def stock(case: Conv, x, weight, bias):
    return F.relu(F.conv2d(x, weight, bias, **case.arguments()))


@functools.cache
def forward_problem(case: Conv, dtype, layout):
    """Inputs, and what float64 makes of them and of their magnitudes; made once for all backends."""
    torch.manual_seed(zlib.crc32(repr((case, dtype, layout)).encode()))
    weight, bias = case.parameters(dtype)
    x = conv_input(case, dtype, layout)
    wide = [None if t is None else t.double() for t in (x, weight, bias)]
    expected = stock(case, *wide)
    magnitude = F.conv2d(*(None if t is None else t.abs() for t in wide), **case.arguments())
    return (x, weight, bias), expected, magnitude


@pytest.mark.parametrize("case", CONV_CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize(("backend", "precision"), with_precisions(backends_of(CONV_RELU)))
def test_forward(backend, precision, dtype, case):
    skip_unserved(backend, dtype)
    for layout in LAYOUTS:
        arguments, expected, magnitude = forward_problem(case, dtype, layout)
        with running(backend), conv_precision(precision):
            y = ops.conv2d_relu(*arguments, **case.arguments())
        assert y.dtype is dtype
        if precision != "highest":
            bounds.assert_precision(y, expected, precision)
            continue
        summands = arguments[1][0].numel() + 1
        bounds.assert_within(y, expected, bounds.sum_bound(magnitude, summands, expected, dtype))


# Cases whose padding the operator takes as a pair: 'same' and unbatched inputs end in these.
OPERATOR_CASES = [c for c in CONV_CASES if not isinstance(c.padding, str) and len(c.shape) == 4]


def operator_arguments(case: Conv):
    pairs = (
        (v, v) if isinstance(v, int) else v for v in (case.stride, case.padding, case.dilation)
    )
    return (*pairs, case.groups)


GRADIENT_LAYOUTS = (
    ("contiguous", "contiguous"),
    ("channels_last", "channels_last"),
    ("channels_last", "contiguous"),
    ("contiguous", "channels_last"),
    ("channel_slice", "expanded"),
    ("transposed", "row_slice"),
)


@functools.cache
def backward_problem(case: Conv, dtype, layout, grad_layout):
    """As forward_problem: (grad, output, input, weight, ...), the gradients, those of the magnitudes."""
    torch.manual_seed(zlib.crc32(repr((case, dtype, layout, grad_layout)).encode()))
    weight, bias = case.parameters(dtype)
    x = random_input(case.shape, dtype, layout)
    y = in_layout_of(x, stock(case, x.double(), weight.double(), None).to(dtype))
    g = random_input(tuple(y.shape), dtype, grad_layout)
    rest = (*operator_arguments(case), [True, True, bias is not None])
    wide = [tensor.double() for tensor in (g, y, x, weight)]
    expected = reference.conv_relu_backward(*wide, *rest)
    magnitudes = reference.conv_relu_backward(
        wide[0].abs(), wide[1], wide[2].abs(), wide[3].abs(), *rest
    )
    return (g, y, x, weight, *rest), expected, magnitudes


@pytest.mark.parametrize("case", OPERATOR_CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize(("backend", "precision"), with_precisions(backends_of(CONV_RELU_BACKWARD)))
def test_backward(backend, precision, dtype, case):
    skip_unserved(backend, dtype)
    for layouts in GRADIENT_LAYOUTS:
        arguments, expected, magnitudes = backward_problem(case, dtype, *layouts)
        with running(backend), conv_precision(precision):
            grads = CONV_RELU_BACKWARD.run(*arguments)
        y, weight = arguments[1], arguments[3]
        pixels = y[:, 0].numel()
        summands = (weight[:, 0].numel() // case.groups, pixels, pixels)
        for actual, right, magnitude, count in zip(
            grads, expected, magnitudes, summands, strict=True
        ):
            assert actual.dtype is dtype
            assert actual.shape == right.shape
            if precision != "highest":
                bounds.assert_precision(actual, right, precision)
                continue
            bounds.assert_within(actual, right, bounds.sum_bound(magnitude, count, right, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("case", [case for case in OPERATOR_CASES if case.bias][:4], ids=str)
@pytest.mark.parametrize("backend", backends_of(CONV_RELU_BACKWARD))
def test_the_bias_gradient_by_itself(backend, case, dtype):
    """Frozen weights ask for it: no weight gradient is made, and threads change no bit."""
    skip_unserved(backend, dtype)
    for layouts in GRADIENT_LAYOUTS:
        arguments, expected, magnitudes = backward_problem(case, dtype, *layouts)
        results, before = [], torch.get_num_threads()
        for threads in (1, 3):
            torch.set_num_threads(threads)
            with running(backend):
                grads = CONV_RELU_BACKWARD.run(*arguments[:-1], [False, False, True])
            torch.set_num_threads(before)
            assert [g.numel() for g in grads[:2]] == [0, 0]
            results.append(grads[2])
        assert backend == "torch" or torch.equal(*results)
        pixels = arguments[1][:, 0].numel()
        bound = bounds.sum_bound(magnitudes[2], pixels, expected[2], dtype)
        bounds.assert_within(results[0], expected[2], bound)


@pytest.mark.parametrize("backend", backends_of(CONV_RELU))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
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


# --- refusals, threads, precision, padding modes ----------------------------------------------------


def test_cpu_refuses_float64():
    layer, x = conv_layer(torch.float64)
    with fastalex.use_backend("cpu"), pytest.raises(fastalex.BackendError, match=r"torch\.float64"):
        layer(x)


def test_cpu_refuses_what_only_torch_defines():
    x, weight = torch.randn(2, 3, 0, 5), torch.randn(4, 3, 1, 1)
    with fastalex.use_backend("cpu"):
        with pytest.raises(fastalex.BackendError, match="only the batch can be empty"):
            CONV_RELU.run(x, weight, None, (1, 1), (1, 1), (1, 1), 1)
        with pytest.raises(fastalex.BackendError, match="one is larger"):
            ops.conv2d_relu(torch.randn(1, 3, 5, 5), weight, stride=1 << 40)
    assert ops.conv2d_relu(torch.randn(1, 3, 5, 5), weight, stride=1 << 40).shape[-1] == 1


@pytest.mark.parametrize("isa", [name for name in BACKENDS if name.startswith("cpu")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_number_of_threads_changes_no_bit(isa, dtype):
    before = torch.get_num_threads()
    results = []
    for case in OPERATOR_CASES:
        weight, bias = case.parameters(dtype)
        x = random_input(case.shape, dtype, "channels_last")
        arguments = operator_arguments(case)
        runs = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            with running(isa):
                y = CONV_RELU.run(x, weight, bias, *arguments)
                grads = CONV_RELU_BACKWARD.run(y, y, x, weight, *arguments, [True, True, True])
            runs.append((y, *grads))
        results.append(runs)
    torch.set_num_threads(before)
    for runs in results:
        for other in runs[1:]:
            assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


FORKED = """
import os, torch
from fastalex import ops
weight, x = torch.randn(16, 16, 3, 3), torch.randn(1, 16, 20, 20)
expected = ops.conv2d_relu(x, weight)
child = os.fork()
if child == 0:
    torch.set_num_threads(1)  # torch's own threads do not survive a fork
    os._exit(0 if torch.equal(ops.conv2d_relu(x, weight), expected) else 1)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_forked_child_computes():
    subprocess.run([sys.executable, "-c", FORKED], check=True, timeout=60)


def test_precision_is_checked_and_kept():
    assert fastalex.get_conv_precision() == "high"
    with pytest.raises(ValueError, match="highest, high, medium"):
        fastalex.set_conv_precision("low")
    with conv_precision("medium"):
        assert fastalex.get_conv_precision() == "medium"


def test_explain_shows_the_engines_plan(capsys):
    x, weight = torch.randn(8, 64, 13, 13), torch.randn(96, 64, 3, 3)
    with conv_precision("high"):
        fastalex.explain("conv_relu", x, weight, padding=1)
    tiles = capsys.readouterr().out
    with conv_precision("highest"):
        fastalex.explain("conv_relu", x, weight, padding=1)
    sums = capsys.readouterr().out
    assert "winograd F(" in tiles
    assert "predicted" in tiles
    assert "packed weights" in tiles
    assert "direct, bands" in sums


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
