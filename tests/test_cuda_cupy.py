"""NVRTC through CuPy with no driver: kernels compile, and the planner equals the launchers."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import pytest
import torch

from fastalex import _cupy
from tests.support import cuda_extension, cuda_host, cuda_ledger, cuda_planner
from tests.support.cuda_cases import DTYPES, FORMATS, draw

needs_host = pytest.mark.skipif(
    cuda_host.unavailable() is not None, reason=str(cuda_host.unavailable())
)


@pytest.fixture
def planned(monkeypatch):
    """What fastalex._cupy would launch, instead of launching it."""
    launches: list[_cupy.PlannedLaunch] = []
    monkeypatch.setattr(_cupy, "planner", cuda_planner.load)
    monkeypatch.setattr(_cupy, "launch", lambda planned, tensor: launches.append(planned))
    return launches


def calls(dtype, layout):
    """(operator, arguments) of AlexNet's shapes and of ones that need the slow paths."""
    lrn, conv2 = (5, 0.02, 0.75, 2.0, 2), ((1, 1), (2, 2), (1, 1), 2)
    for channels, side in ((96, 27), (12, 7)):
        x = draw((2, channels, side, side), dtype, layout)
        pooled = draw((2, channels, side // 2, side // 2), dtype, layout)
        offsets = torch.zeros_like(pooled, dtype=torch.uint8)
        pool = ((3, 3), (2, 2), (0, 0))
        yield "lrn", (x, *lrn)
        yield "lrn", (x, 3, 0.1, 0.5, 1.0, 1)
        yield "lrn_backward", (x, x, *lrn)
        yield "max_pool", (x, *pool, (1, 1), False, True)
        yield "max_pool_backward", (pooled, offsets, (side, side), *pool, (1, 1))
        yield "lrn_max_pool", (x, *lrn, *pool, False, False)
        yield "lrn_max_pool_backward", (pooled, x, offsets, *lrn, *pool)
        weight = draw((32, channels // 2, 5, 5), dtype, layout)
        y = draw((2, 32, side, side), dtype, layout)
        yield "conv_relu", (x, weight, weight[:, 0, 0, 0].clone(), *conv2)
        yield "conv_relu_backward", (y, y, x, weight, *conv2, (True, True, True))


def assert_same_plan(ours: bytes, theirs: bytes) -> None:
    """Equal but for addresses: words of 8 bytes that differ are pointers on both sides."""
    assert len(ours) == len(theirs)
    for a, b in zip(struct.iter_unpack("<q", ours), struct.iter_unpack("<q", theirs), strict=True):
        assert a == b or min(a[0], b[0]) > 1 << 32, (a, b)


@needs_host
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_the_planner_asks_for_what_the_launchers_launch(planned, dtype, layout):
    host = cuda_host.host_cuda()
    host.launches()
    host.lib.host_cuda_dry_run(True)
    try:
        for name, arguments in calls(dtype, layout):
            planned.clear()
            getattr(_cupy, name)(*arguments)
            getattr(host, name)(*arguments)
            launched = host.launches()
            assert [p.kernel.decode() for p in planned] == [one.kernel for one in launched], name
            for ours, theirs in zip(planned, launched, strict=True):
                assert (ours.blocks, ours.threads) == (theirs.blocks, theirs.threads)
                assert ours.shared_bytes == theirs.shared_bytes
                assert_same_plan(bytes(ours.plan[: ours.plan_bytes]), theirs.plan)
    finally:
        host.lib.host_cuda_dry_run(False)


def test_planner_errors_become_exceptions(planned):
    x = torch.empty(1 << 17, dtype=torch.float16).as_strided((1, 1, 1 << 16, 1 << 15), (0, 0, 1, 1))
    with pytest.raises(RuntimeError, match=r"exceeds 2\^31 - 1"):
        _cupy.lrn(x, 5, 1e-4, 0.75, 1.0, 1)


def test_refusals_say_why():
    x = torch.ones(1, 8, 3, 3)
    assert "not on a CUDA device" in str(_cupy.refuse(x))
    if not torch.cuda.is_available():
        assert "install a driver" in str(_cupy.refusal())


def nvrtc(expressions: list[str]) -> tuple[bytes, dict[str, str]]:
    """A cubin for sm_90 and the kernels' names in it; needs no driver."""
    compiler = pytest.importorskip("cupy.cuda.compiler", reason="pip install cupy-cuda13x")
    program = compiler._NVRTCProgram(
        '#include "kernels.cuh"\n', "kernels.cu", name_expressions=expressions, method="cubin"
    )
    include = f"-I{cuda_host.cuda_include()}"
    return program.compile(("-arch=sm_90", *_cupy.compile_options(), include))


FEW = [
    "lrn_channels_last<__half, 8, 5>",
    "lrn_backward_channels_first<float, 4, 5, false>",
    "max_pool<__nv_bfloat16, 8, true, 3>",
    "lrn_max_pool_channels_last<__half, 8, 5, 3, true>",
    "conv_relu<HalfMath<__half>, ConvTile<64, 64, 32, 32, 4, 4>, GatherCopier, 16>",
    "pack_weight<float>",
]


@pytest.mark.skipif(cuda_host.cuda_include() is None, reason="no CUDA headers")
def test_some_kernels_compile_with_nvrtc(tmp_path):
    cubin, names = nvrtc(FEW)
    assert cubin[:4] == b"\x7fELF"
    assert sorted(names) == sorted(FEW)


@pytest.mark.slow
@pytest.mark.skipif(
    bool(cuda_extension.unavailable() or cuda_ledger.unavailable()), reason="needs nvcc and tools"
)
def test_every_kernel_compiles_with_nvrtc_and_uses_nvcc_s_registers(tmp_path: Path):
    expected = cuda_ledger.resources(cuda_extension.build())
    kernels = sorted(expected)
    for start in range(0, len(kernels), 24):
        cubin, _ = nvrtc(kernels[start : start + 24])
        path = tmp_path / f"{start}.cubin"
        path.write_bytes(cubin)
        for name, row in cuda_ledger.resources(path).items():
            assert row["stack"] == 0 or re.search("direct|<.*, 0", name), name
            assert abs(row["registers"] - expected[name]["registers"]) <= 10, name
