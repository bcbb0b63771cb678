"""torch's own sample and error inputs of the operators that ours stand in for."""

from __future__ import annotations

import copy
import functools
import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing._internal.common_methods_invocations import op_db

from fastalex import ops, reference
from fastalex.ops._arguments import pair
from tests.support import bounds
from tests.support.backends import BACKENDS, running

SAMPLES_EACH = 60
OPINFO = {info.name: info for info in op_db if info.name.startswith("nn.functional.")}


@functools.cache
def samples(name: str) -> list[Any]:
    """A fixed draw of torch's samples, with gradients wanted: a stride would favour some combinations."""
    info = OPINFO[f"nn.functional.{name}"]
    every = list(info.sample_inputs("cpu", torch.float32, requires_grad=True))
    return random.Random(2012).sample(every, min(SAMPLES_EACH, len(every)))


def tensors_of(sample: Any) -> list[Tensor]:
    """The input, and whatever other arguments are tensors."""
    given = itertools.chain([sample.input], sample.args, sample.kwargs.values())
    return [value for value in given if isinstance(value, Tensor)]


def both_passes(function: Callable[..., Any], sample: Any) -> tuple[Tensor, list[Tensor], Any]:
    """Output, gradients for a cotangent of fixed values, and the indices where asked for."""
    result = function(sample.input, *sample.args, **sample.kwargs)
    output, indices = result if isinstance(result, tuple) else (result, None)
    cotangent = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view(output.shape)
    grads = torch.autograd.grad(output, tensors_of(sample), cotangent.to(output.dtype))
    return output.detach(), list(grads), indices


@pytest.mark.parametrize("backend", BACKENDS)
def test_max_pool2d(backend):
    """Outputs and indices equal; gradients sum up to a window's worth of cotangents, none above one."""
    for sample in samples("max_pool2d"):
        with running(backend):
            y, (gx,), indices = both_passes(ops.max_pool2d, sample)
        expected, (expected_gx,), expected_indices = both_passes(F.max_pool2d, sample)
        assert torch.equal(y, expected), sample
        assert (indices is None) == (expected_indices is None)
        assert indices is None or torch.equal(indices, expected_indices), sample
        rows, columns = pair(sample.kwargs["kernel_size"], "kernel_size", 1)
        summands = rows * columns  # each rounded by both sides, no partial sum above their number
        bound = 2 * summands * summands * bounds.eps(torch.float32)
        torch.testing.assert_close(gx, expected_gx, rtol=0, atol=bound)


@pytest.mark.parametrize("backend", BACKENDS)
def test_local_response_norm(backend):
    def arguments(size, alpha=1e-4, beta=0.75, k=1.0):
        return size, alpha / size, beta, k, 1

    for sample in samples("local_response_norm"):
        with running(backend):
            y, (gx,), _ = both_passes(ops.local_response_norm, sample)
        wide = sample.input.detach().double()
        operands = arguments(*sample.args, **sample.kwargs)
        bound = bounds.lrn_bound(wide, operands, torch.float32)
        bounds.assert_within(y, reference.lrn(wide, *operands), bound)
        bounds.assert_within(y, F.local_response_norm(wide, *sample.args, **sample.kwargs), bound)
        g = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).float().double().view(y.shape)
        expected = reference.lrn_backward(g, wide, *operands)
        bound = bounds.lrn_backward_bound(g, wide, operands, torch.float32)
        bounds.assert_within(gx, expected, bound + bounds.rounding(expected, torch.float32))


def stock_conv2d_relu(*args: Any, **kwargs: Any) -> Tensor:
    return F.relu(F.conv2d(*args, **kwargs))


def in_float64(sample: Any, absolute: bool = False) -> Any:
    """The sample on wide leaves of their own; of its magnitudes if ``absolute``."""

    def widened(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        wide = value.detach().double()
        return (wide.abs() if absolute else wide).requires_grad_()

    return sample.transform(widened)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_conv2d(backend, layout):
    """Against stock in float64; the draw is seeded, and none of its sums is within rounding of ReLU's kink."""
    for sample in samples("conv2d"):
        sample = copy.copy(sample)
        if layout == "channels_last" and sample.input.dim() == 4:
            x = sample.input.detach().contiguous(memory_format=torch.channels_last)
            sample.input = x.requires_grad_()
        with running(backend):
            y, grads, _ = both_passes(ops.conv2d_relu, sample)
            with torch.no_grad():
                alone = ops.conv2d_relu(sample.input, *sample.args, **sample.kwargs)
        expected, expected_grads, _ = both_passes(stock_conv2d_relu, in_float64(sample))
        magnitude, magnitude_grads = magnitudes(in_float64(sample, absolute=True))
        # No sum has more terms than the weight has elements, or the output (a gradient of a weight).
        summands = sample.args[0].numel() + y.numel()
        triples = [
            (y, expected, magnitude),
            (alone, expected, magnitude),
            *zip(grads, expected_grads, magnitude_grads, strict=True),
        ]
        for ours, exact, magnitude in triples:
            assert ours.dtype is torch.float32
            bound = bounds.sum_bound(magnitude, summands, exact, torch.float32)
            bounds.assert_within(ours, exact, bound)


def magnitudes(sample: Any) -> tuple[Tensor, list[Tensor]]:
    """Sums of the terms' magnitudes: the convolution and its gradients for cotangents of one."""
    output = F.conv2d(sample.input, *sample.args, **sample.kwargs)
    return output.detach(), list(torch.autograd.grad(output.sum(), tensors_of(sample)))


@pytest.mark.parametrize(
    ("name", "function", "stock"),
    [
        ("max_pool2d", ops.max_pool2d, F.max_pool2d),
        ("conv2d", ops.conv2d_relu, F.conv2d),
    ],
)
def test_error_inputs(name, function, stock):
    """What torch refuses we refuse, each with an error that a wrong argument deserves."""
    errors = list(OPINFO[f"nn.functional.{name}"].error_inputs("cpu"))
    assert errors
    for error in errors:
        sample = error.sample_input
        for call in (stock, function):
            with pytest.raises((RuntimeError, ValueError, TypeError)):
                call(sample.input, *sample.args, **sample.kwargs)
