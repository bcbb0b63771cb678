"""local_response_norm on every backend, layout and dtype, against the float64 reference."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastalex import ops, reference
from fastalex.ops.lrn import LRN as OPERATOR
from fastalex.ops.lrn import LRN_BACKWARD
from tests.support import bounds
from tests.support.backends import BACKENDS, running
from tests.support.cases import (
    DTYPES,
    LAYOUTS,
    LRN,
    LRN_CASES,
    lay_out,
    random_input,
    with_specials,
)

DTYPE_IDS = [str(dtype).removeprefix("torch.") for dtype in DTYPES]


@pytest.mark.parametrize("case", LRN_CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_forward(backend, dtype, case):
    for layout in LAYOUTS:
        x = random_input(case.shape, dtype, layout)
        with running(backend):
            y = ops.local_response_norm(x, **case.arguments())
        wide = x.double()
        expected = reference.lrn(wide, *case.operator_arguments())
        assert y.dtype is dtype
        bound = bounds.lrn_bound(wide, case.operator_arguments(), dtype, backend)
        bounds.assert_within(y, expected, bound)


@pytest.mark.parametrize("case", LRN_CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_backward(backend, dtype, case):
    for layout, grad_layout in (
        ("contiguous", "contiguous"),
        ("channels_last", "channels_last"),
        ("channels_last", "contiguous"),
        ("contiguous", "channels_last"),
        ("channel_slice", "expanded"),
        ("transposed", "row_slice"),
    ):
        x = random_input(case.shape, dtype, layout)
        g = random_input(case.shape, dtype, grad_layout)
        arguments = case.operator_arguments()
        with running(backend):
            gx = LRN_BACKWARD.run(g, x, *arguments)
        expected = reference.lrn_backward(g.double(), x.double(), *arguments)
        bound = bounds.lrn_backward_bound(g.double(), x.double(), arguments, dtype, 0.0, backend)
        bounds.assert_within(gx, expected, bound + bounds.rounding(expected, dtype))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_worse_than_twice_the_stock_op(backend):
    """On AlexNet's own parameters: the largest relative error beside the stock op's largest."""
    x = torch.randn(2, 96, 55, 55) * 30
    expected = F.local_response_norm(x.double(), 5, 1e-4, 0.75, 2.0)
    stock = F.local_response_norm(x, 5, 1e-4, 0.75, 2.0)
    stock_error = ((stock.double() - expected) / expected).abs().max()
    for format in (torch.contiguous_format, torch.channels_last):
        with running(backend):
            y = ops.local_response_norm(x.contiguous(memory_format=format), 5, 1e-4, 0.75, 2.0)
        assert ((y.double() - expected) / expected).abs().max() <= 2 * stock_error


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_specials_agree_with_torch(backend, layout):
    """NaN, infinities, overflow of the squares, zeros over k = 0."""
    x = with_specials(random_input((2, 18, 5, 7), torch.float32))
    x[1] *= 1e19  # squares near the top of float32
    x[0, :, 2] *= 1e-30
    format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    x = x.contiguous(memory_format=format)
    for k in (0.0, 1.0):
        stock = F.local_response_norm(x, 5, 1e-4, 0.75, k)
        with running(backend):
            ours = ops.local_response_norm(x, 5, 1e-4, 0.75, k)
        assert torch.equal(ours.isnan(), stock.isnan())
        assert torch.equal(ours.isinf(), stock.isinf())
        finite = stock.isfinite()
        torch.testing.assert_close(ours[finite], stock[finite], rtol=1e-5, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_float16_accumulates_in_float32(backend):
    """60000 squared overflows float16 and not float32."""
    x = torch.full((1, 8, 2, 2), 60000.0, dtype=torch.float16)
    with running(backend):
        y = ops.local_response_norm(x, 5, 1e-4, 0.5, 1.0)
    assert y.isfinite().all()


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "torch"])
def test_threads_do_not_change_a_bit(backend):
    case = LRN((3, 40, 29, 31))
    for layout in ("contiguous", "channels_last"):
        x = random_input(case.shape, torch.float32, layout)
        g = random_input(case.shape, torch.float32, layout)
        results = []
        for threads in (1, 2, 3):
            before = torch.get_num_threads()
            torch.set_num_threads(threads)
            with running(backend):
                results.append(
                    (
                        OPERATOR.run(x, *case.operator_arguments()),
                        LRN_BACKWARD.run(g, x, *case.operator_arguments()),
                    )
                )
            torch.set_num_threads(before)
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_saves_the_input_alone():
    """The stock composite keeps four activations."""
    x = torch.randn(2, 16, 8, 8, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ops.local_response_norm(x, 5)
    assert [tensor.data_ptr() for tensor in saved] == [x.data_ptr()]


def test_paper_formula():
    """alpha_mode="sum" is section 3.3 as printed; torch divides alpha by n."""
    x = torch.randn(2, 16, 5, 5)
    printed = ops.local_response_norm(x, 5, 1e-4, 0.75, 2.0, alpha_mode="sum")
    torch.testing.assert_close(printed, F.local_response_norm(x, 5, 5e-4, 0.75, 2.0))


def test_groups_are_towers():
    x = torch.randn(2, 24, 5, 5)
    towers = [ops.local_response_norm(half, 5, 0.1) for half in x.chunk(2, dim=1)]
    torch.testing.assert_close(ops.local_response_norm(x, 5, 0.1, groups=2), torch.cat(towers, 1))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_bfloat16_number_is_read_and_written_exactly(layout, backend):
    """Divided by one: subnormals and both zeros included, all whose squares float32 holds."""
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    numbers = numbers[numbers.abs() < 2.0**62]
    for channels in (37, 64):
        x = lay_out(numbers[: len(numbers) // channels * channels].view(1, channels, -1, 1), layout)
        with running(backend):
            y = ops.local_response_norm(x, 5, alpha=0.0, beta=1.0, k=1.0)
        assert torch.equal(y.view(torch.int16), x.view(torch.int16))
