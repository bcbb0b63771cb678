"""The case table of every backend, run through the backend `cuda`: registration and kernels on the host runtime.

The checks are those of the operators' own tests: all layouts, float64 oracle, derived bounds, gradients.
"""

from __future__ import annotations

import pytest
import torch

from fastalex import _cuda_native, ops
from fastalex.ops._operator import REGISTRY
from tests import test_conv_relu, test_lrn, test_lrn_max_pool, test_max_pool
from tests.support import cuda_host
from tests.support.backends import running
from tests.support.cases import CONV_CASES, LAYOUTS, LRN_CASES, POOL_CASES, random_input

pytestmark = [
    pytest.mark.skipif(cuda_host.unavailable() is not None, reason=str(cuda_host.unavailable())),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel"),
]
HOST = "cuda-host"
FUSED_CASES = test_lrn_max_pool.CASES
every_dtype = pytest.mark.parametrize(
    "dtype",
    [
        torch.float16,
        pytest.param(torch.float32, marks=pytest.mark.slow),
        pytest.param(torch.bfloat16, marks=pytest.mark.slow),
    ],
    ids=lambda dtype: str(dtype)[6:],
)


@every_dtype
@pytest.mark.parametrize("case", LRN_CASES, ids=str)
def test_lrn_cases(case, dtype):
    test_lrn.test_forward(HOST, dtype, case)
    test_lrn.test_backward(HOST, dtype, case)


@every_dtype
@pytest.mark.parametrize("case", POOL_CASES, ids=str)
def test_max_pool_cases(case, dtype):
    test_max_pool.test_forward_and_indices(HOST, dtype, case)
    test_max_pool.test_backward(HOST, dtype, case)


@pytest.mark.parametrize("case", POOL_CASES, ids=str)
def test_max_pool_chooses_as_torch_does(case):
    test_max_pool.test_ties_and_specials_choose_as_torch_does(HOST, case)


@every_dtype
@pytest.mark.parametrize(("lrn", "pool"), FUSED_CASES, ids=str)
def test_lrn_max_pool_cases(lrn, pool, dtype):
    test_lrn_max_pool.test_forward_equals_the_pair(HOST, dtype, lrn, pool)
    test_lrn_max_pool.test_backward(HOST, dtype, lrn, pool)


@every_dtype
@pytest.mark.parametrize("case", CONV_CASES, ids=str)
def test_conv_relu_cases(case, dtype):
    test_conv_relu.test_forward(HOST, dtype, case)
    if case in test_conv_relu.OPERATOR_CASES:
        test_conv_relu.test_backward(HOST, dtype, case)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_specials_agree_with_torch(layout):
    test_lrn.test_specials_agree_with_torch(HOST, layout)
    test_conv_relu.test_nan_and_infinities_agree_with_torch(HOST, torch.float32, layout)


CALLS = {
    "lrn": lambda x: (x, 5, 0.1, 0.75, 2.0, 1),
    "max_pool": lambda x: (x, (3, 3), (2, 2), (1, 1), (1, 1), False, True),
    "lrn_max_pool": lambda x: (x, 5, 0.1, 0.75, 2.0, 1, (3, 3), (2, 2), (1, 1), False, True),
    "conv_relu": lambda x: (
        x, torch.ones(4, x.shape[1], 3, 3, dtype=x.dtype), None, (1, 1), (1, 1), (1, 1), 1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("shape", [(2, 8, 6, 7), (1, 1, 5, 5), (2, 8, 3, 1), (0, 4, 5, 5)])
def test_results_lie_as_the_fakes_promise(name, layout, shape):
    arguments = CALLS[name](random_input(shape, torch.float16, layout))
    promised = REGISTRY[name].dispatch(*[_cuda_native._shadow(argument) for argument in arguments])
    with running(HOST):
        made = REGISTRY[name].run(*arguments)
    pairs = zip(made, promised, strict=True) if isinstance(made, tuple) else [(made, promised)]
    for ours, fake in pairs:
        assert (ours.shape, ours.dtype, ours.stride()) == (fake.shape, fake.dtype, fake.stride())


def test_autograd_runs_on_the_host_kernels():
    """Forward and backward through the public functions, without a call of the reference."""
    x = torch.randn(2, 16, 9, 9).contiguous(memory_format=torch.channels_last).requires_grad_()
    weight = torch.randn(16, 8, 3, 3, requires_grad=True)
    results = []
    for backend in (HOST, "torch"):
        with running(backend):
            y = ops.lrn_max_pool2d(ops.conv2d_relu(x, weight, None, 1, 1, 1, 2), 5)
            results.append(torch.autograd.grad(y.square().sum(), (x, weight)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
