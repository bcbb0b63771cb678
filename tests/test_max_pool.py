"""max_pool2d on every backend, layout and dtype: equal to torch's bit for bit, indices included."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastalex import ops, reference
from fastalex.ops.max_pool import MAX_POOL, MAX_POOL_BACKWARD, pool_geometry
from tests.support import bounds
from tests.support.backends import BACKENDS, running
from tests.support.cases import (
    DTYPES,
    LAYOUTS,
    POOL_CASES,
    Pool,
    random_input,
    with_specials,
)

DTYPE_IDS = [str(dtype).removeprefix("torch.") for dtype in DTYPES]


def geometry(case: Pool):
    shape = torch.Size(case.shape)
    sizes = (case.kernel_size, case.stride, case.padding, case.dilation)
    return pool_geometry(shape, *sizes, case.ceil_mode, "max_pool2d")


def has_empty_windows(case: Pool) -> bool:
    """torch's index of a window of padding alone lies outside the plane."""
    return case.dilation == 4


@pytest.mark.parametrize("case", POOL_CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_and_indices(backend, dtype, case):
    for layout in LAYOUTS:
        x = random_input(case.shape, dtype, layout)
        with running(backend):
            y, indices = ops.max_pool2d(x, **case.arguments(), return_indices=True)
            alone = ops.max_pool2d(x, **case.arguments())
        expected, expected_indices = F.max_pool2d(x, **case.arguments(), return_indices=True)
        assert y.dtype is dtype
        assert torch.equal(y, expected)
        assert torch.equal(alone, expected)
        if not has_empty_windows(case):
            assert torch.equal(indices, expected_indices)


@pytest.mark.parametrize("case", POOL_CASES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_and_specials_choose_as_torch_does(backend, case):
    """The first of equals; the last NaN; a window of all -inf has a winner; -0 and 0 are equal."""
    if has_empty_windows(case) or 0 in case.shape:
        return
    ties = torch.randint(-2, 3, case.shape).float()
    all_minus_inf = torch.full(case.shape, -float("inf"))
    for values in (ties, with_specials(ties), all_minus_inf):
        for format in (torch.contiguous_format, torch.channels_last):
            x = values.contiguous(memory_format=format)
            with running(backend):
                y, indices = ops.max_pool2d(x, **case.arguments(), return_indices=True)
            expected, expected_indices = F.max_pool2d(x, **case.arguments(), return_indices=True)
            assert torch.equal(indices, expected_indices)
            torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("case", POOL_CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_backward(backend, dtype, case):
    """Against autograd through torch's own pool in float64; each element sums at most one term a window."""
    kernel, stride, padding, dilation = geometry(case)
    for layout, grad_layout in (
        ("contiguous", "contiguous"),
        ("channels_last", "channels_last"),
        ("channels_last", "contiguous"),
        ("contiguous", "channels_last"),
        ("channel_slice", "expanded"),
    ):
        x = random_input(case.shape, dtype, layout)
        with running(backend):
            y, offsets = MAX_POOL.run(x, kernel, stride, padding, dilation, case.ceil_mode, True)
            g = random_input(tuple(y.shape), dtype, grad_layout)
            gx = MAX_POOL_BACKWARD.run(g, offsets, x.shape[-2:], kernel, stride, padding, dilation)
        arguments = (offsets, x.shape[-2:], kernel, stride, padding, dilation)
        expected = reference.max_pool_backward(g.double(), *arguments)
        magnitude = reference.max_pool_backward(g.double().abs(), *arguments)
        summands = kernel[0] * kernel[1]
        bounds.assert_within(gx, expected, bounds.sum_bound(magnitude, summands, expected, dtype))
        if not has_empty_windows(case) and dtype is torch.float64 and x.numel():
            wide = x.double().detach().requires_grad_()
            F.max_pool2d(wide, **case.arguments()).backward(g)
            torch.testing.assert_close(expected, wide.grad)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_window_of_padding_alone_has_no_gradient(backend):
    x = torch.randn(1, 2, 3, 9, requires_grad=True)
    for format in (torch.contiguous_format, torch.channels_last):
        with running(backend):
            y = ops.max_pool2d(x.contiguous(memory_format=format), 2, 1, padding=1, dilation=4)
            y.nan_to_num(neginf=0).sum().backward()
        assert (y == -float("inf")).all()
        assert not x.grad.any()


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "torch"])
def test_threads_do_not_change_a_bit(backend):
    case = Pool((3, 19, 41, 43), padding=1)
    for layout in ("contiguous", "channels_last"):
        x = random_input(case.shape, torch.float32, layout)
        results = []
        for threads in (1, 2, 3):
            before = torch.get_num_threads()
            torch.set_num_threads(threads)
            with running(backend):
                y, offsets = MAX_POOL.run(x, *geometry(case), False, True)
                gx = MAX_POOL_BACKWARD.run(y, offsets, x.shape[-2:], *geometry(case))
            torch.set_num_threads(before)
            results.append((y, offsets, gx))
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_saves_one_byte_an_output():
    x = torch.randn(2, 16, 9, 9, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = ops.max_pool2d(x, 3, 2)
    assert sum(tensor.numel() * tensor.element_size() for tensor in saved) == y.numel()


def test_integers_run_on_torch():
    x = torch.randint(-9, 9, (1, 2, 5, 5))
    assert torch.equal(ops.max_pool2d(x, 3, 2), F.max_pool2d(x, 3, 2))


def test_unbatched():
    x = torch.randn(3, 9, 9)
    y, indices = ops.max_pool2d(x, 3, 2, return_indices=True)
    expected, expected_indices = F.max_pool2d(x, 3, 2, return_indices=True)
    assert torch.equal(y, expected)
    assert torch.equal(indices, expected_indices)
