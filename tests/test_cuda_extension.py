"""nvcc builds the library with no GPU; it loads, has the schemas, refuses with reasons."""

from __future__ import annotations

import re

import pytest
import torch

from tests.support import cuda_extension, cuda_ledger

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        cuda_extension.unavailable() is not None, reason=str(cuda_extension.unavailable())
    ),
]
needs_tools = pytest.mark.skipif(
    cuda_ledger.unavailable() is not None, reason=str(cuda_ledger.unavailable())
)

LRN = "int size, float scale, float beta, float k, int groups"
POOL = "int[2] kernel_size, int[2] stride, int[2] padding"
CONV = "int[2] stride, int[2] padding, int[2] dilation, int groups"
SCHEMAS = {
    "lrn": f"(Tensor input, {LRN}) -> Tensor",
    "lrn_backward": f"(Tensor grad, Tensor input, {LRN}) -> Tensor",
    "max_pool": f"(Tensor input, {POOL}, int[2] dilation, bool ceil_mode, bool save_offsets) -> "
    "(Tensor output, Tensor offsets)",
    "max_pool_backward": f"(Tensor grad, Tensor offsets, int[2] input_size, {POOL}, "
    "int[2] dilation) -> Tensor",
    "lrn_max_pool": f"(Tensor input, {LRN}, {POOL}, bool ceil_mode, bool save_offsets) -> "
    "(Tensor output, Tensor offsets)",
    "lrn_max_pool_backward": "(Tensor grad, Tensor input, Tensor offsets, "
    f"{LRN}, {POOL}) -> Tensor",
    "conv_relu": f"(Tensor input, Tensor weight, Tensor? bias, {CONV}) -> Tensor",
    "conv_relu_backward": f"(Tensor grad, Tensor output, Tensor input, Tensor weight, {CONV}, "
    "bool[3] output_mask) -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)",
}


@pytest.fixture(scope="module")
def library():
    path = cuda_extension.build()
    torch.ops.load_library(path)
    return path


@pytest.mark.parametrize("name", SCHEMAS)
def test_schema(library, name):
    schema = str(getattr(torch.ops.fastalex_cuda, name).default._schema)
    assert schema == f"fastalex_cuda::{name}{SCHEMAS[name]}"


def test_schemas_are_the_operators_own(library):
    import fastalex.ops  # noqa: F401

    for name in SCHEMAS:
        ours = str(getattr(torch.ops.fastalex_cuda, name).default._schema)
        theirs = str(getattr(torch.ops.fastalex, name).default._schema)
        arguments, returns = ours.removeprefix("fastalex_cuda::").split(" -> ")
        unnamed = re.sub(r"Tensor \w+", "Tensor", returns)
        assert f"fastalex::{arguments} -> {unnamed}" == theirs


def test_a_cpu_tensor_is_refused_with_a_reason_and_a_mend(library):
    with pytest.raises(RuntimeError, match=r"`input` is not on a CUDA device: move it with \.cuda"):
        torch.ops.fastalex_cuda.lrn(torch.ones(1, 8, 3, 3), 5, 1e-4, 0.75, 1.0, 1)
    conv = (torch.ones(1, 8, 3, 3), torch.ones(8, 8, 1, 1), None, [1, 1], [0, 0], [1, 1], 1)
    with pytest.raises(RuntimeError, match="not on a CUDA device"):
        torch.ops.fastalex_cuda.conv_relu(*conv)


@needs_tools
def test_ledger(library):
    """Registers, spills and instruction counts stay within five per cent of the ledger."""
    expected, found = cuda_ledger.load()["sm_90"], cuda_ledger.facts(library)
    assert found.keys() == expected.keys()
    moved = [
        f"{name} {key}: {expected[name][key]} became {value}"
        for name, row in found.items()
        for key, value in row.items()
        if abs(value - expected[name].get(key, 0)) > max(2, 0.05 * expected[name].get(key, 0))
    ]
    assert not moved, "\n".join(moved)


@needs_tools
def test_no_kernel_spills_and_tensor_kernels_use_what_they_should(library):
    for name, row in cuda_ledger.facts(library).items():
        assert row["spill"] == 0, name
        tensor = "conv_relu<" in name or "conv_weight_grad<" in name
        if tensor and "FmaMath" not in name:
            assert row["mma"] > 0, name
        if tensor and "Tf32Math" not in name and "FmaMath" not in name:
            assert row["ldmatrix"] > 0, name
        if "PixelCopier" in name or "WindowCopier" in name:
            assert row["async_copy"] > 0, name
            assert row["global_wide"] > 0, name
        if ", 8, " in name or "<float, 4, " in name:
            assert row["global_wide"] > 0, name
