"""How calls reach the backends `cuda` and `cupy`: every refusal and its mend, what explain plans; needs no GPU."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fastalex
from fastalex import BackendError, _cuda_native, _cupy, _tuning, ops
from fastalex._explain import explanation
from fastalex.ops import _cuda as ops_cuda
from fastalex.ops._operator import REGISTRY

CALLS = {"lrn": (5,), "max_pool": (3, 2), "lrn_max_pool": (5,)}
OPERATORS = [
    f"{name}{way}" for name in (*CALLS, "conv_relu", "linear_relu") for way in ("", "_backward")
]


def fake(*shape, dtype=torch.float16, device="cuda"):
    with FakeTensorMode():
        return torch.empty(shape, dtype=dtype, device=device)


def verdicts(op, *args, **kwargs) -> dict[str, str]:
    """What explain prints of each backend."""
    lines = explanation(op, *args, **kwargs).splitlines()[1:]
    return dict(line.strip().split(maxsplit=1) for line in lines)


@pytest.fixture
def built(monkeypatch):
    """As on a machine whose fastalex has both libraries, and CuPy."""
    monkeypatch.setattr(_cuda_native, "library_error", lambda: None)
    monkeypatch.setattr(_cupy, "missing", lambda: None)


class Real(torch.Tensor):
    """A tensor that says it is on a GPU."""

    device = torch.device("cuda", 0)


def on_gpu(*shape, dtype=torch.float16):
    return torch.zeros(shape, dtype=dtype).as_subclass(Real)


def refusal(backend: str, *args) -> str | None:
    kernels = {kernel.backend: kernel for kernel in REGISTRY["lrn"].kernels.kernels}
    return kernels[backend].refuse(*args, 5, 1e-4, 0.75, 2.0, 1)


@pytest.mark.parametrize("op", OPERATORS)
@pytest.mark.parametrize("backend", ["cuda", "cupy"])
def test_every_operator_has_both_backends(op, backend):
    assert backend in [kernel.backend for kernel in REGISTRY[op].kernels.kernels]


@pytest.mark.parametrize("op", CALLS)
def test_auto_prefers_the_library_then_triton_then_cupy(op, built, monkeypatch):
    text = explanation(op, fake(2, 96, 55, 55), *CALLS[op])
    assert text.startswith(f"{op}: runs on cuda\n")
    order = list(verdicts(op, fake(2, 96, 55, 55), *CALLS[op]))
    assert [name for name in order if name in ("cuda", "triton", "cupy")] == [
        "cuda",
        "triton",
        "cupy",
    ]


def test_a_convolution_runs_there_when_forced_or_measured_faster(built, monkeypatch):
    call = ("conv_relu", fake(2, 8, 9, 9), fake(4, 8, 3, 3))
    monkeypatch.setattr(_tuning, "recorded", lambda op, args: None)
    assert explanation(*call).startswith("conv_relu: runs on torch\n")
    assert "not measured against cuDNN" in verdicts(*call)["cuda"]
    for backend in ("cuda", "cupy"):
        with fastalex.use_backend(backend):
            assert explanation(*call).startswith(f"conv_relu: runs on {backend} (forced)\n")
        monkeypatch.setattr(_tuning, "recorded", lambda op, args, b=backend: _tuning.Choice(b))
        assert explanation(*call).startswith(f"conv_relu: runs on {backend}\n")
        monkeypatch.setattr(_tuning, "recorded", lambda op, args: None)


# --- what explain plans ----------------------------------------------------------------------------


def test_explain_names_kernel_grid_and_shared_memory(built):
    x = fake(128, 96, 27, 27).to(memory_format=torch.channels_last)
    told = verdicts("lrn_max_pool", x, 5, groups=2)
    assert told["cuda"] == (
        "chosen; lrn_max_pool_channels_last<__half, 8, 5, 3, false> (640 x 256, 15 KB)"
    )
    weight = fake(256, 48, 5, 5)
    told = verdicts("conv_relu", x, weight, None, 1, 2, 1, 2)
    assert "pack_weight<__half> (1200 x 256), then conv_relu<HalfMath<__half>" in told["cuda"]


def test_explain_follows_torch_s_setting_of_float32(built, monkeypatch):
    x, weight = fake(2, 8, 9, 9, dtype=torch.float32), fake(4, 8, 3, 3, dtype=torch.float32)
    for rounded, kernel in ((True, "Tf32Math"), (False, "FmaMath")):
        monkeypatch.setattr(ops_cuda, "float32_in_tf32", lambda op, rounded=rounded: rounded)
        assert kernel in verdicts("conv_relu", x, weight)["cuda"]


def test_float32_precision_is_torch_s():
    conv = torch.backends.cudnn.conv
    before = conv.fp32_precision
    try:
        for told, rounded in (("tf32", True), ("ieee", False)):
            conv.fp32_precision = told
            assert ops_cuda.float32_in_tf32("conv_relu") is rounded
    finally:
        conv.fp32_precision = before


def test_a_fully_connected_layer_is_a_convolution_of_one_tap(built):
    told = verdicts("linear_relu", fake(128, 9216), fake(4096, 9216), fake(4096))["cuda"]
    assert "conv_relu<HalfMath<__half>" in told
    assert "pack_weight" not in told  # the weight is read as it lies
    told = verdicts("linear_relu", fake(128, 0), fake(4096, 0))["cuda"]
    assert "nothing to multiply" in told


def test_explain_without_the_planner_still_answers(built, monkeypatch):
    monkeypatch.setattr(
        _cuda_native, "planner_error", lambda: "the CUDA launch planner was not built"
    )
    assert "the CUDA launch planner was not built" in verdicts("lrn", fake(1, 8, 3, 3), 5)["cuda"]


# --- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["cuda", "cupy"])
def test_a_cpu_tensor_is_refused(backend):
    with (
        fastalex.use_backend(backend),
        pytest.raises(BackendError, match="runs on CUDA tensors, and this one is on cpu"),
    ):
        ops.local_response_norm(torch.zeros(1, 2, 3, 3), 5)


@pytest.mark.parametrize("backend", ["cuda", "cupy"])
def test_other_dtypes_are_refused(backend, built):
    told = verdicts("lrn", fake(1, 8, 3, 3, dtype=torch.float64), 5)[backend]
    assert told == "no: it takes float32, float16 and bfloat16, and this tensor is torch.float64"
    told = verdicts("max_pool", fake(1, 8, 3, 3, dtype=torch.int32), 3, 2)[backend]
    assert told.endswith("this tensor is torch.int32")


def test_a_library_that_was_not_built_is_refused_with_how_to(monkeypatch):
    _cuda_native.library_error.cache_clear()
    monkeypatch.setattr(_cuda_native._native, "__file__", "/nowhere/_native.py")
    try:
        told = verdicts("lrn", fake(1, 8, 3, 3), 5)["cuda"]
    finally:
        _cuda_native.library_error.cache_clear()
    assert told.startswith("no: the CUDA library was not built: install the CUDA toolkit (nvcc)")
    assert "FASTALEX_BUILD=cuda" in told


def test_a_gpu_that_is_too_old_is_refused(built, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    _cuda_native.gpu_error.cache_clear()
    try:
        for backend in ("cuda", "cupy"):
            assert "compute capability 7.5, and the kernels need 8.0" in refusal(
                backend, on_gpu(1, 8, 3, 3)
            )
    finally:
        _cuda_native.gpu_error.cache_clear()


def test_a_missing_driver_is_refused(built, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    _cuda_native.gpu_error.cache_clear()
    try:
        for backend in ("cuda", "cupy"):
            assert "no NVIDIA driver answers here" in refusal(backend, on_gpu(1, 8, 3, 3))
    finally:
        _cuda_native.gpu_error.cache_clear()


@pytest.mark.parametrize(
    ("library", "gpu", "served"),
    [
        ("80,86,90+PTX", (9, 0), True),
        ("80,86,90+PTX", (8, 9), True),  # machine code of 8.6 runs on 8.9
        ("80,86,90+PTX", (12, 0), True),  # by way of PTX
        ("86", (8, 0), False),
        ("80,90", (10, 0), False),
        ("90", (8, 0), False),
        ("80,90a", (9, 0), True),
        ("80,90a", (8, 6), True),
        ("90a,100", (12, 0), False),  # Hopper's own code runs on no other GPU,
        ("90a+PTX", (10, 0), False),  # by way of PTX neither
    ],
)
def test_a_library_for_other_gpus_is_refused(monkeypatch, library, gpu, served):
    class Library:
        architectures = staticmethod(lambda: library)

    monkeypatch.setattr(_cuda_native, "library", lambda: Library)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: gpu)
    reason = _cuda_native.architecture_error.__wrapped__(0)
    assert (reason is None) is served
    if not served:
        assert f"built for {library} and this GPU is {gpu[0]}{gpu[1]}: reinstall" in reason


def test_a_tensor_off_its_elements_is_refused(built):
    buffer = torch.zeros(8 * 9 * 2 + 1, dtype=torch.uint8)
    x = torch.frombuffer(buffer.numpy(), dtype=torch.float16, offset=1, count=72)
    assert "clone() it" in refusal("cuda", x.view(1, 8, 3, 3).as_subclass(Real))


def test_an_image_past_31_bits_is_refused(built):
    assert "exceeds 2^31 - 1" in verdicts("lrn", fake(1, 8, 1 << 15, 1 << 14), 5)["cuda"]
    x, weight = fake(1 << 20, 8, 1 << 6, 1 << 6), fake(4, 8, 1, 1)
    assert "exceeds 2^31 - 1" in verdicts("conv_relu", x, weight)["cuda"]
    assert "able" in verdicts("lrn", fake(9, 8, 1 << 15, 1 << 12), 5)["cupy"]  # the batch is free


def test_tensors_on_two_devices_are_refused(built):
    y = fake(1, 8, 3, 3)
    other = fake(1, 8, 3, 3, device="cuda:1")
    kernels = {k.backend: k for k in REGISTRY["lrn_backward"].kernels.kernels}
    reason = kernels["cuda"].refuse(y, other, 5, 1e-4, 0.75, 2.0, 1)
    assert reason == "one tensor is on cuda:0 and one on cuda:1: move them to one"


def test_without_cupy_the_reason_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(_cupy.importlib.util, "find_spec", lambda name: None)
    _cupy.missing.cache_clear()
    try:
        assert _cupy.missing() == "CuPy is not installed: pip install fastalex[cuda13]"
    finally:
        _cupy.missing.cache_clear()


def test_without_the_toolkit_s_headers_the_reason_says_how_to_get_them(monkeypatch):
    monkeypatch.setattr(_cupy.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(_cupy, "cuda_include", lambda: None)
    assert "pip install nvidia-cuda-runtime" in _cupy.missing.__wrapped__()


def test_calls_on_the_cpu_import_no_cupy_and_load_no_library():
    code = (
        "import sys; sys.modules['cupy'] = None\n"
        "import torch, fastalex\n"
        "from fastalex import _cuda_native\n"
        "x = torch.randn(1, 8, 9, 9)\n"
        "fastalex.ops.conv2d_relu(x, torch.randn(4, 8, 3, 3))\n"
        "fastalex.explain('lrn', x, 5)\n"
        "assert not _cuda_native.library_error.cache_info().currsize\n"
        "assert not _cuda_native.planner_error.cache_info().currsize\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
