"""Convolutions by Hopper's warpgroups, executed on the host against float64; when they are chosen, and when not."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F

from fastalex import _cuda_native, _tuning, reference
from fastalex._cuda_native import Instruction
from fastalex.ops import _cuda as ops_cuda
from fastalex.ops._operator import REGISTRY
from tests import test_conv_relu, test_linear_relu
from tests.support import cuda_host
from tests.support.cases import LINEAR_CASES
from tests.support.cuda_cases import assert_within, draw, rounding, sum_bound
from tests.test_cuda_backend import fake, on_gpu
from tests.test_cuda_conv import ALEXNET, CASES, operands

needs_host = pytest.mark.skipif(
    cuda_host.unavailable() is not None, reason=str(cuda_host.unavailable())
)
both_dtypes = pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16], ids=lambda dtype: str(dtype)[6:]
)
# (input shape, output channels, kernel, stride, padding, dilation, groups); a reason each
MORE = {
    "192 columns": ((1, 16, 6, 6), 192, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "more stages than the ring": ((1, 64, 12, 12), 40, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "two tiles of rows, two of columns": ((2, 8, 12, 12), 200, (1, 1), (1, 1), (0, 0), (1, 1), 1),
}
ALL = {**CASES, **MORE}


@pytest.fixture
def host():
    library = cuda_host.host_cuda()
    library.schedule("forward")
    library.wgmma = True
    library.launches()
    yield library
    library.wgmma = False
    library.schedule("forward")


def served(case) -> bool:
    return case[0][1] // case[-1] % 8 == 0


def check_forward(host, case, dtype):
    x, weight, bias, fan_in = operands(case, dtype, "nhwc")
    geometry = case[3:]
    y = host.conv_relu(x, weight, bias, *geometry)
    assert any("WgmmaMath" in launch.kernel for launch in host.launches())
    exact = F.conv2d(x.double(), weight.double(), bias.double(), *geometry).relu()
    absolute = F.conv2d(x.double().abs(), weight.double().abs(), bias.double().abs(), *geometry)
    assert_within(y, exact, sum_bound(absolute, fan_in + 1) + rounding(exact, dtype))


@needs_host
@both_dtypes
@pytest.mark.parametrize("name", [name for name in ALL if served(ALL[name])])
def test_forward(host, name, dtype):
    check_forward(host, ALL[name], dtype)


@needs_host
@pytest.mark.slow
@both_dtypes
@pytest.mark.parametrize("name", [name for name in ALEXNET if served(ALEXNET[name])])
def test_alexnet_layers_at_full_size(host, name, dtype):
    check_forward(host, ALEXNET[name], dtype)


@needs_host
@both_dtypes
@pytest.mark.parametrize("name", ALL)
def test_gradient_of_the_input(host, name, dtype):
    """Of every shape: the masked gradient is aligned whatever the channels are."""
    x, weight, bias, _ = operands(ALL[name], dtype, "nhwc")
    geometry = ALL[name][3:]
    y = reference.conv_relu(x.double(), weight.double(), bias.double(), *geometry).to(dtype)
    grad = draw(y.shape, dtype, "nhwc", seed=3)
    got, *_ = host.conv_relu_backward(grad, y, x, weight, *geometry, (True, False, False))
    assert any("WgmmaMath" in launch.kernel for launch in host.launches())
    wide = [t.double() for t in (grad, y, x, weight)]
    magnitudes = [wide[0].abs(), wide[1], wide[2].abs(), wide[3].abs()]
    exact, absolute = (
        reference.conv_relu_backward(*some, *geometry, (True, False, False))[0]
        for some in (wide, magnitudes)
    )
    terms = ALL[name][2][0] * ALL[name][2][1] * weight.shape[0]
    assert_within(got, exact, sum_bound(absolute, terms) + rounding(exact, dtype))


@needs_host
@pytest.mark.parametrize("schedule", [s for s in cuda_host.SCHEDULES if s != "forward"])
@pytest.mark.parametrize("name", ["more stages than the ring", "split depth", "192 columns"])
def test_every_schedule_gives_the_same_bits(host, name, schedule):
    geometry = ALL[name][3:]
    x, weight, bias, _ = operands(ALL[name], torch.float16, "nhwc")
    results = []
    for kind in ("forward", schedule):
        host.schedule(kind, seed=5)
        results.append(host.conv_relu(x, weight, bias, *geometry))
    assert torch.equal(*results)


@needs_host
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_one_bad_pixel_reaches_exactly_the_outputs_of_torch(host, value):
    x, weight, bias, _ = operands(CASES["dilation"], torch.float16, "nhwc")
    x[0, 1, x.shape[2] // 2, x.shape[3] // 2] = value
    geometry = CASES["dilation"][3:]
    y = host.conv_relu(x, weight, bias, *geometry)
    expected = F.conv2d(x.float(), weight.float(), bias.float(), *geometry).relu()
    assert torch.equal(y.isfinite(), expected.isfinite())
    assert torch.equal(y.isnan(), expected.isnan())


@pytest.fixture
def wherever_it_serves(monkeypatch):
    """The backend `cuda` takes wgmma for every call that has no reason against it."""

    def options(op, backend, args):
        refused = ops_cuda.refuse_wgmma(op, args, backend)
        return {} if refused else {"instruction": Instruction(wgmma=True)}

    monkeypatch.setattr(_tuning, "options", options)


@needs_host
@both_dtypes
@pytest.mark.usefixtures("wherever_it_serves")
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("case", test_conv_relu.OPERATOR_CASES, ids=str)
def test_case_table_of_convolutions(case, dtype):
    """The case table of every backend."""
    test_conv_relu.test_forward("cuda-host", "highest", dtype, case)
    test_conv_relu.test_backward("cuda-host", "highest", dtype, case)


@needs_host
@both_dtypes
@pytest.mark.usefixtures("wherever_it_serves")
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("case", [c for c in LINEAR_CASES if c.inputs and c.rows], ids=str)
def test_case_table_of_layers(case, relu, dtype):
    test_linear_relu.test_forward("cuda-host", dtype, case, relu)
    test_linear_relu.test_backward("cuda-host", dtype, case, relu)


# --- when it is chosen -----------------------------------------------------------------------------


def convolution(channels=8, dtype=torch.float16, last=True, make=fake):
    """The operator's arguments."""
    order = torch.channels_last if last else torch.contiguous_format
    x = make(2, channels, 9, 9, dtype=dtype).to(memory_format=order)
    return x, make(16, channels, 3, 3, dtype=dtype), None, (1, 1), (1, 1), (1, 1), 1


@pytest.fixture
def gpu(monkeypatch):
    """A function that gives the machine a GPU of one capability and a library for some architectures."""

    def given(capability, built="80,90a,120+PTX"):
        class Library:
            architectures = staticmethod(lambda: built)

        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(_cuda_native, "library", lambda: Library)
        for cached in (_cuda_native.wgmma_error, _cuda_native.wgmma_library_error):
            cached.cache_clear()

    yield given
    for cached in (_cuda_native.wgmma_error, _cuda_native.wgmma_library_error):
        cached.cache_clear()


def offered(op, args, backend):
    kernels = {kernel.backend: kernel for kernel in REGISTRY[op].kernels.kernels}
    return kernels[backend].candidates(*args)


@pytest.mark.parametrize("backend", ["cuda", "cupy"])
def test_hopper_measures_both_instructions_and_mma_sync_is_first(gpu, backend):
    gpu((9, 0))
    both = {"instruction": (Instruction(wgmma=False), Instruction(wgmma=True))}
    assert offered("conv_relu", convolution(make=on_gpu), backend) == both
    x, weight = on_gpu(4, 64), on_gpu(8, 64)
    assert offered("linear_relu", (x, weight, None, True), backend) == both


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (10, 0), (12, 0)])
def test_no_other_gpu_is_offered_it(gpu, capability):
    gpu(capability)
    arguments = convolution(make=on_gpu)
    assert offered("conv_relu", arguments, "cuda") == {}
    reason = ops_cuda.refuse_wgmma("conv_relu", arguments, "cuda")
    assert reason.startswith(f"this GPU has compute capability {capability[0]}.{capability[1]}")


def test_a_library_without_hopper_s_code_is_refused_and_cupy_needs_none(gpu):
    gpu((9, 0), built="80,90,120+PTX")
    arguments = convolution(make=on_gpu)
    reason = ops_cuda.refuse_wgmma("conv_relu", arguments, "cuda")
    assert reason.endswith("reinstall with FASTALEX_CUDA_ARCH=90a")
    assert ops_cuda.refuse_wgmma("conv_relu", arguments, "cupy") is None


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (convolution(dtype=torch.float32), "float16 and bfloat16 alone"),
        (convolution(channels=6), "needs a channels_last input"),
        (convolution(last=False), "needs a channels_last input"),
    ],
)
def test_other_calls_are_refused_with_a_reason(arguments, reason):
    assert reason in ops_cuda.refuse_wgmma("conv_relu", arguments, "cuda")


def test_a_gradient_of_the_weight_alone_has_no_use_for_it():
    x, weight, _, *geometry = convolution()
    y = fake(2, 16, 9, 9).to(memory_format=torch.channels_last)
    for mask, refused in (((True, True, True), False), ((False, True, True), True)):
        arguments = (y, y, x, weight, *geometry, mask)
        reason = ops_cuda.refuse_wgmma("conv_relu_backward", arguments, "cuda")
        assert (reason is not None) is refused


def test_asking_for_it_where_it_cannot_serve_is_an_error():
    x, weight, bias, *geometry = convolution(channels=6)
    with pytest.raises(RuntimeError, match=r"wgmma needs a channels_last input.*conv_relu float16"):
        _cuda_native.planned("conv_relu", (x, weight, bias, *geometry, False, True))


def test_what_was_measured_is_what_runs_and_what_explain_says(monkeypatch):
    x, weight, bias, *geometry = convolution()
    plain, *_ = ops_cuda._note("conv_relu", (x, weight, bias, *geometry), "cuda").split("; wgmma: ")
    assert "HalfMath" in plain
    assert "WgmmaMath" not in plain
    choice = _tuning.Choice("cuda", {"instruction": Instruction(wgmma=True)})
    monkeypatch.setattr(_tuning, "recorded", lambda op, args: choice)
    told = ops_cuda._note("conv_relu", (x, weight, bias, *geometry), "cuda")
    assert re.search(r"conv_relu<WgmmaMath<__half>.*; wgmma was measured faster", told)


def test_the_choice_survives_the_file(tmp_path):
    entries = {"a call": _tuning.Choice("cuda", {"instruction": Instruction(wgmma=True)})}
    _tuning.save(tmp_path / "tuning.json", entries)
    assert _tuning.load(tmp_path / "tuning.json") == entries


@pytest.mark.parametrize(
    ("pixels", "channels", "columns"), [(93312, 128, 128), (21632, 192, 192), (128, 4096, 128)]
)
def test_tiles_follow_the_layer(pixels, channels, columns):
    """conv2's groups, conv4's, and fc7 at batch 128."""
    x = fake(1, 64, 1, pixels).to(memory_format=torch.channels_last)
    arguments = (x, fake(channels, 64, 1, 1), None, (1, 1), (0, 0), (1, 1), 1, False, True)
    *_, launch = (
        one for one in _cuda_native.planned("conv_relu", arguments) if "conv_relu" in one.kernel
    )
    assert f"ConvTile<128, {columns}, 16, {columns}," in launch.kernel
    assert launch.threads == 256
    assert launch.shared_bytes <= (228 << 10) // 2 - 1024  # two blocks an SM
