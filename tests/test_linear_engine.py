"""Linear + bias + ReLU on the micro-kernel against float64, within one rounding per term."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.support.conv_library import LinearPlan, available_isas, library

ISAS = available_isas()
EPS = torch.finfo(torch.float32).eps
# rows, inputs, outputs: one row, tails in every dimension, more than one job in each
SIZES = [(1, 64, 64), (5, 300, 33), (14, 17, 1000), (40, 2100, 70), (3, 1, 1), (131, 33, 7)]


def assert_within(actual: Tensor, expected: Tensor, magnitude: Tensor, terms: int) -> None:
    kind = torch.finfo(actual.dtype)
    bound = (terms + 2) * EPS * magnitude + kind.eps * expected.abs()
    subnormal = kind.smallest_normal * kind.eps
    assert ((actual.double() - expected).abs() <= bound + subnormal).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", SIZES)
def test_forward_and_backward(isa: str, dtype: torch.dtype, size: tuple[int, int, int]) -> None:
    rows, inputs, outputs = size
    x, weight = torch.randn(rows, inputs).to(dtype), torch.randn(outputs, inputs).to(dtype)
    bias, grad = torch.randn(outputs).to(dtype), torch.randn(rows, outputs).to(dtype)
    plan = LinearPlan(rows, inputs, outputs, isa=isa, dtype=dtype)
    out = torch.full((rows, outputs), torch.nan, dtype=dtype)
    plan.forward(x, weight, bias, out)
    results = tuple(torch.full_like(t, torch.nan) for t in (x, weight, bias))
    plan.backward(grad, out, x, weight, results)
    plan.assert_canaries()

    x, weight, bias, grad = x.double(), weight.double(), bias.double(), grad.double()
    expected = F.linear(x, weight, bias).relu()
    assert_within(out, expected, F.linear(x.abs(), weight.abs(), bias.abs()), inputs)
    dz = torch.where(out > 0, grad, 0)
    size = dz.abs()
    assert_within(results[0], dz @ weight, size @ weight.abs(), outputs)
    assert_within(results[1], dz.T @ x, size.T @ x.abs(), rows)
    assert_within(results[2], dz.sum(0), size.sum(0), rows)


@pytest.mark.parametrize("isa", ISAS)
def test_bitwise_equal_for_any_number_of_threads(isa: str) -> None:
    x, weight, grad = torch.randn(9, 600), torch.randn(130, 600), torch.randn(9, 130)
    outcomes = []
    for threads in (1, 3):
        library().conv_set_threads(threads)
        plan = LinearPlan(9, 600, 130, isa=isa, threads=threads)
        out = torch.empty(9, 130)
        plan.forward(x, weight, None, out)
        results = (torch.empty_like(x), torch.empty_like(weight), torch.empty(130))
        plan.backward(grad, out, x, weight, results)
        outcomes.append((out, *results))
    library().conv_set_threads(2)
    for first, second in zip(*outcomes, strict=True):
        assert torch.equal(first, second)


def test_nan_passes_through_relu() -> None:
    plan = LinearPlan(2, 8, 8, isa=ISAS[-1])
    weight, out = torch.ones(8, 8), torch.empty(2, 8)
    plan.forward(torch.full((2, 8), torch.nan), weight, None, out)
    assert out.isnan().all()
