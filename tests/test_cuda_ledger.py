"""What the ledger of nvcc's machine code must show, whatever it was made from; test_cuda_extension.py makes it anew."""

from __future__ import annotations

import pytest
import torch

from tests.support import cuda_ledger, static_ledger

LEDGER = static_ledger.read(cuda_ledger.LEDGER)
KERNELS = {name.partition("/")[2]: facts for name, facts in LEDGER.items()}
TENSOR = [name for name in KERNELS if name.startswith(("conv_relu<", "conv_weight_grad<"))]


def test_no_kernel_spills():
    assert len(KERNELS) > 100
    assert not [name for name, facts in KERNELS.items() if facts["spills"]]


def test_products_of_halves_and_tf32_run_on_tensor_cores():
    assert not [n for n in TENSOR if ("FmaMath" in n) == bool(KERNELS[n]["mma"])]


def test_hopper_s_kernels_multiply_by_warpgroups():
    names = [name for name in TENSOR if "WgmmaMath" in name]
    assert len(names) == 4
    for name in names:
        assert all(op.startswith("HGMMA.64x") for op in KERNELS[name]["mma"]), name
        assert KERNELS[name]["warps"] == 8
        assert KERNELS[name]["occupancy"] == 0.25, name  # two blocks an SM


def test_aligned_convolutions_copy_wide_and_asynchronously():
    """But for the bias, loads of 4 bytes at most are an odd output's, and never of the main loop."""
    for name in TENSOR:
        facts = KERNELS[name]
        if "PixelCopier" in name:
            assert set(facts["async_loads"]) == {"16"}, name
            assert "16" in facts["stores"], name
        if "WindowCopier" in name:
            assert "8" in facts["async_loads"] or "16" in facts["async_loads"], name


@pytest.mark.parametrize("width", ["__half, 8", "__nv_bfloat16, 8", "float, 4"])
def test_memory_bound_kernels_have_wide_accesses(width):
    names = [n for n in KERNELS if n not in TENSOR and f"<{width}, " in n]
    assert len(names) > 5
    for name in names:
        assert "16" in KERNELS[name]["stores"], name
        assert "16" in KERNELS[name]["loads"], name


def test_every_kernel_of_the_network_is_in_the_ledger():
    assert set(cuda_ledger.shared_bytes()) <= set(KERNELS)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_convolutions_of_the_network_keep_their_occupancy(dtype):
    """Two blocks of four warps an SM: what registers and the ring of stages leave, on every layer."""
    for row, op, arguments in cuda_ledger.calls(dtype, True, False):
        if row.startswith("conv_relu"):
            launch = cuda_ledger.main_launch(op, arguments)
            assert KERNELS[launch.kernel]["occupancy"] >= 0.125, (row, launch)
