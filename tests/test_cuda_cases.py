"""The case table of every backend, through the GPU backends: `cuda` on the host runtime anywhere, all of them on a GPU.

The checks are those of the operators' own tests: all layouts, float64 oracle, derived bounds, gradients.
"""

from __future__ import annotations

import pytest
import torch

from fastalex import _cuda_native, ops
from fastalex.ops._operator import REGISTRY
from tests import test_conv_relu, test_linear_relu, test_lrn, test_lrn_max_pool, test_max_pool
from tests.support import cuda_host
from tests.support.backends import running
from tests.support.cases import (
    CONV_CASES,
    LAYOUTS,
    LINEAR_CASES,
    LRN_CASES,
    POOL_CASES,
    random_input,
)

pytestmark = [
    pytest.mark.usefixtures("where"),
    pytest.mark.skipif(cuda_host.unavailable() is not None, reason=str(cuda_host.unavailable())),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel"),
]
HOST = "cuda-host"
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU is visible")
every_backend = pytest.mark.parametrize(
    "backend",
    [
        HOST,
        *(
            pytest.param(name, marks=[pytest.mark.gpu, NO_GPU])
            for name in ("cuda", "triton", "cupy")
        ),
    ],
)
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


@pytest.fixture
def where(request):
    """Makes the backend's device the default one, and float32 IEEE: what the bounds are derived for."""
    callspec = getattr(request.node, "callspec", None)
    backend = callspec.params["backend"] if callspec else HOST
    conv, matmul = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = conv.fp32_precision, matmul.fp32_precision
    conv.fp32_precision = matmul.fp32_precision = "ieee"
    with torch.device("cpu" if backend == HOST else "cuda"):
        yield
    conv.fp32_precision, matmul.fp32_precision = before


@every_backend
@every_dtype
@pytest.mark.parametrize("case", LRN_CASES, ids=str)
def test_lrn_cases(case, dtype, backend):
    test_lrn.test_forward(backend, dtype, case)
    test_lrn.test_backward(backend, dtype, case)


@every_backend
@every_dtype
@pytest.mark.parametrize("case", POOL_CASES, ids=str)
def test_max_pool_cases(case, dtype, backend):
    test_max_pool.test_forward_and_indices(backend, dtype, case)
    test_max_pool.test_backward(backend, dtype, case)


@every_backend
@pytest.mark.parametrize("case", POOL_CASES, ids=str)
def test_max_pool_chooses_as_torch_does(case, backend):
    test_max_pool.test_ties_and_specials_choose_as_torch_does(backend, case)


@every_backend
@every_dtype
@pytest.mark.parametrize(("lrn", "pool"), FUSED_CASES, ids=str)
def test_lrn_max_pool_cases(lrn, pool, dtype, backend):
    test_lrn_max_pool.test_forward_equals_the_pair(backend, dtype, lrn, pool)
    test_lrn_max_pool.test_backward(backend, dtype, lrn, pool)


@every_backend
@every_dtype
@pytest.mark.parametrize("case", CONV_CASES, ids=str)
def test_conv_relu_cases(case, dtype, backend):
    test_conv_relu.test_forward(backend, "highest", dtype, case)
    if case in test_conv_relu.OPERATOR_CASES:
        test_conv_relu.test_backward(backend, "highest", dtype, case)


@every_backend
@every_dtype
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("case", [case for case in LINEAR_CASES if case.inputs], ids=str)
def test_linear_relu_cases(case, relu, dtype, backend):
    test_linear_relu.test_forward(backend, dtype, case, relu)
    if case.rows:
        test_linear_relu.test_backward(backend, dtype, case, relu)


@every_backend
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_specials_agree_with_torch(layout, backend):
    test_lrn.test_specials_agree_with_torch(backend, layout)
    test_conv_relu.test_nan_and_infinities_agree_with_torch(backend, torch.float32, layout)


CALLS = {
    "lrn": lambda x: (x, 5, 0.1, 0.75, 2.0, 1),
    "max_pool": lambda x: (x, (3, 3), (2, 2), (1, 1), (1, 1), False, True),
    "lrn_max_pool": lambda x: (x, 5, 0.1, 0.75, 2.0, 1, (3, 3), (2, 2), (1, 1), False, True),
    "conv_relu": lambda x: (
        x, torch.ones(4, x.shape[1], 3, 3, dtype=x.dtype), None, (1, 1), (1, 1), (1, 1), 1,
    ),
}  # fmt: skip


@every_backend
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("shape", [(2, 8, 6, 7), (1, 1, 5, 5), (2, 8, 3, 1), (0, 4, 5, 5)])
def test_results_lie_as_the_fakes_promise(name, layout, shape, backend):
    arguments = CALLS[name](random_input(shape, torch.float16, layout))
    promised = REGISTRY[name].dispatch(*[_cuda_native._shadow(argument) for argument in arguments])
    with running(backend):
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
