"""linear_relu and linear on every backend and dtype against float64; edges, layouts, weights that change, autocast."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import fastalex
from fastalex import _native, ops, reference
from fastalex.ops.linear_relu import LINEAR_RELU, LINEAR_RELU_BACKWARD
from tests.support import bounds
from tests.support.backends import BACKENDS, running
from tests.support.cases import DTYPES, LINEAR_CASES, Linear, with_specials

DTYPE_IDS = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
FUNCTIONS = {True: ops.linear_relu, False: ops.linear}


def skip_unserved(backend, dtype):
    if backend != "torch" and dtype is torch.float64:
        pytest.skip("its kernels have no float64")


def stock(relu, x, weight, bias=None):
    out = F.linear(x, weight, bias)
    return F.relu(out) if relu else out


def widened(tensors):
    return [tensor.double() for tensor in tensors]


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("case", LINEAR_CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_forward(backend, dtype, case, relu):
    skip_unserved(backend, dtype)
    tensors = case.tensors(dtype)
    with running(backend):
        y = FUNCTIONS[relu](*tensors)
    expected = stock(relu, *widened(tensors))
    magnitude = F.linear(*(tensor.abs() for tensor in widened(tensors)))
    assert y.dtype is dtype
    assert y.is_contiguous()
    bounds.assert_within(y, expected, bounds.sum_bound(magnitude, case.inputs + 1, expected, dtype))


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("case", LINEAR_CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_backward(backend, dtype, case, relu):
    skip_unserved(backend, dtype)
    x, weight, *bias = case.tensors(dtype)
    mask = [True, True, case.bias]
    y = LINEAR_RELU.run(x, weight, bias[0] if bias else None, relu)
    g = torch.randn(y.shape, dtype=torch.float64).to(dtype)
    arguments = (g, y if relu else None, x, weight)
    with running(backend):
        grads = LINEAR_RELU_BACKWARD.run(*arguments, mask)
    wide = [None if tensor is None else tensor.double() for tensor in arguments]
    expected = reference.linear_relu_backward(*wide, mask)
    sizes = (wide[0].abs(), wide[1], wide[2].abs(), wide[3].abs())
    magnitudes = reference.linear_relu_backward(*sizes, mask)
    rows = g.numel() // case.outputs
    for actual, right, magnitude, count in zip(
        grads, expected, magnitudes, (case.outputs, rows, rows), strict=True
    ):
        assert actual.dtype is dtype
        assert actual.shape == right.shape
        bounds.assert_within(actual, right, bounds.sum_bound(magnitude, count, right, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_specials_end_where_torch_has_them(backend, dtype):
    """NaN and infinities in every operand, in both passes; no sum mixes an infinity with a rounding."""
    x, weight, bias = Linear((5,), 90, 40).tensors(dtype)
    x[1], bias = with_specials(x[1]), with_specials(bias)
    weight[7] = with_specials(weight[7])
    with running(backend):
        y = ops.linear_relu(x, weight, bias)
    expected = stock(True, *widened((x, weight, bias)))
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.isinf(), expected.isinf())
    g = with_specials(torch.randn(5, 40).to(dtype))
    with running(backend):
        grads = LINEAR_RELU_BACKWARD.run(g, y, x, weight, [True] * 3)
    wide = widened((g, y, x, weight))
    for actual, right in zip(grads, reference.linear_relu_backward(*wide, [True] * 3), strict=True):
        assert torch.equal(actual.isnan(), right.isnan())
        assert torch.equal(actual.isinf(), right.isinf())


@pytest.mark.parametrize("backend", BACKENDS)
def test_mask_follows_threshold_backward(backend):
    """No gradient where the output is zero; what torch passes where it is NaN."""
    output = torch.tensor([[-0.0, 0.0, 2.0, float("nan"), float("inf")]])
    grad, eye = torch.full_like(output, 3.0), torch.eye(5)
    with running(backend):
        gx, _, gb = LINEAR_RELU_BACKWARD.run(grad, output, grad, eye, [True, False, True])
    expected = torch.ops.aten.threshold_backward(grad, output, 0)
    assert torch.equal(gx, expected)
    assert torch.equal(gb, expected[0])


@pytest.mark.parametrize("wanted", range(8))
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_not_asked_for_are_not_made(backend, wanted):
    mask = [bool(wanted & bit) for bit in (1, 2, 4)]
    x, weight, bias = Linear((6,), 20, 30).tensors(torch.float32)
    y = LINEAR_RELU.run(x, weight, bias, True)
    g = torch.randn_like(y)
    with running(backend):
        grads = LINEAR_RELU_BACKWARD.run(g, y, x, weight, mask)
        complete = LINEAR_RELU_BACKWARD.run(g, y, x, weight, [True] * 3)
    for want, grad, whole in zip(mask, grads, complete, strict=True):
        assert torch.equal(grad, whole) if want else grad.numel() == 0


def test_saves_input_weight_and_output_alone():
    """And without ReLU no output."""
    x, weight, _ = (t.requires_grad_() for t in Linear((3,), 8, 4).tensors(torch.float32))
    for relu, function in FUNCTIONS.items():
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=saved: s.append(t) or t, id):
            y = function(x, weight)
        kept = {x.data_ptr(), weight.data_ptr()} | ({y.data_ptr()} if relu else set())
        assert {t.data_ptr() for t in saved} == kept


LAYOUTS = {
    "transposed": lambda t: t.t().contiguous().t(),
    "every second row": lambda t: t.repeat_interleave(2, 0)[::2],
    "every second column": lambda t: t.repeat_interleave(2, 1)[:, ::2],
    "expanded": lambda t: t[:1].expand(t.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_operands_of_any_layout(layout):
    """A strided input is served; a strided weight goes to torch, and explain says how to mend it."""
    x, weight, bias = Linear((6,), 20, 8).tensors(torch.float32)
    for operands in ((LAYOUTS[layout](x), weight), (x, LAYOUTS[layout](weight))):
        leaves = [t.detach().requires_grad_() for t in (*operands, bias)]
        y = ops.linear_relu(*leaves)
        g = LAYOUTS[layout](torch.randn(6, 8))
        wide = [t.detach().double().requires_grad_() for t in leaves]
        expected = stock(True, *wide)
        torch.testing.assert_close(y, expected.float())
        ours = torch.autograd.grad(y, leaves, g)
        theirs = torch.autograd.grad(expected, wide, g.double())
        torch.testing.assert_close(list(ours), [t.float() for t in theirs])
    with fastalex.use_backend("cpu"), pytest.raises(fastalex.BackendError, match="contiguous"):
        ops.linear_relu(x, LAYOUTS["transposed"](weight))


def test_refuses_float64_by_name():
    with fastalex.use_backend("cpu"), pytest.raises(fastalex.BackendError, match=r"torch\.float64"):
        ops.linear_relu(*Linear((2,), 3, 4).tensors(torch.float64))


@pytest.mark.parametrize(
    ("dtype", "rows", "forward", "backward"),
    [
        (torch.float32, 1, "cpu", "torch"),
        (torch.float32, 32, "cpu", "cpu"),
        (torch.bfloat16, 1, "cpu", "torch"),
        (torch.bfloat16, 32, "torch", "torch"),
    ],
)
def test_torch_runs_what_it_does_faster(dtype, rows, forward, backward):
    """As measured; explain gives the reason, and a forced backend does not take it for an answer."""
    x, weight, bias = Linear((rows,), 20, 8).tensors(dtype)
    gradients = (x.new_ones(rows, 8), None, x, weight, [True] * 3)
    for table, call, expected in (
        (LINEAR_RELU.kernels, (x, weight, bias, True), forward),
        (LINEAR_RELU_BACKWARD.kernels, gradients, backward),
    ):
        assert table.choose(*call).backend == expected
        assert (expected == "cpu") != ("torch's own" in table.explain(*call))
        with fastalex.use_backend("cpu"):
            assert table.choose(*call).backend == "cpu"


def test_a_weight_may_change_at_every_call():
    """Nothing is kept of it: not by version, not by address."""
    layer, x = ops.LinearReLU(40, 30), torch.randn(4, 40)
    for _ in range(3):
        layer.weight.data.mul_(-1.5)  # does not move the version
        expected = stock(True, x.double(), layer.weight.double(), layer.bias.double())
        torch.testing.assert_close(layer(x), expected.float())


@pytest.mark.parametrize("isa", _native.available_isas())
def test_bitwise_equal_for_any_number_of_threads(isa):
    x, weight, bias = Linear((9,), 1100, 70).tensors(torch.float32)
    outcomes, before = [], torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        with running(f"cpu-{isa}"):
            y = LINEAR_RELU.run(x, weight, bias, True)
            outcomes.append((y, *LINEAR_RELU_BACKWARD.run(y, y, x, weight, [True] * 3)))
    torch.set_num_threads(before)
    for other in outcomes[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outcomes[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, torch.float64])
def test_autocast_is_linears(dtype, given):
    x, weight, bias = Linear((3,), 20, 8).tensors(torch.float32)
    with torch.autocast("cpu", dtype=dtype):
        if given is torch.float64:  # left alone
            weight, bias = weight.double(), bias.double()
        expected = F.linear(x.to(given), weight, bias)
        y = ops.linear(x.to(given), weight, bias)
    assert y.dtype is expected.dtype
    torch.testing.assert_close(y, expected, rtol=0.02, atol=0.02)


def test_autocast_gradients_reach_float32_parameters():
    layer, x = ops.LinearReLU(20, 8), torch.randn(3, 20, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    y.sum().backward()
    for tensor in (x, layer.weight, layer.bias):
        assert tensor.grad.dtype is torch.float32
    assert torch.equal(layer.bias.grad, (y > 0).sum(0).float())


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=lambda function: function.__name__)
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1.0], torch.ones(1, 1)), TypeError, "input must be a Tensor"),
        ((torch.ones(2, 3), [[1.0]]), TypeError, "weight must be a Tensor"),
        ((torch.ones(2, 3, dtype=torch.int64), torch.ones(4, 3)), TypeError, "torch.int64"),
        ((torch.ones(2, 3), torch.ones(4, 3).double()), TypeError, "they must agree"),
        ((torch.ones(2, 3), torch.ones(4, 3), torch.ones(4).half()), TypeError, "must agree"),
        ((torch.ones(2, 3), torch.ones(3)), ValueError, r"must be \[O, I\]"),
        ((torch.ones(2, 3), torch.ones(4, 2)), ValueError, r"takes \[\.\.\., 2\]"),
        ((torch.tensor(1.0), torch.ones(4, 1)), ValueError, r"input is \(\)"),
        ((torch.ones(2, 3), torch.ones(4, 3), torch.ones(3)), ValueError, r"must be \(4,\)"),
        ((torch.ones(2, 3), torch.ones(4, 3, device="meta")), ValueError, "on meta"),
    ],
)
def test_errors(function, arguments, error, message):
    with pytest.raises(error, match=message) as caught:
        function(*arguments)
    assert str(caught.value).startswith(function.__name__)
