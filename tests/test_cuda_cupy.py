"""NVRTC through CuPy with no driver: kernels compile, the disk is not trusted, launches reach CuPy as planned."""

from __future__ import annotations

import ctypes
import re
import struct
from pathlib import Path

import pytest
import torch

from fastalex import _cuda_native, _cupy
from tests.support import cuda_extension, cuda_host, static_ledger
from tests.support.cuda_cases import DTYPES, FORMATS, draw

needs_host = pytest.mark.skipif(
    cuda_host.unavailable() is not None, reason=str(cuda_host.unavailable())
)
needs_cupy = pytest.mark.skipif(_cupy.missing() is not None, reason=str(_cupy.missing()))


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


#: Addresses lie above it, also in a Python linked at fixed ones; sizes and strides of these calls below.
_LOWEST = 1 << 22


def assert_same_plan(ours: bytes, theirs: bytes) -> None:
    """Equal but for addresses: words of 8 bytes that differ are pointers on both sides."""
    assert len(ours) == len(theirs)
    for a, b in zip(struct.iter_unpack("<q", ours), struct.iter_unpack("<q", theirs), strict=True):
        assert a == b or min(a[0], b[0]) > _LOWEST, (a, b)


@needs_host
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_the_planner_asks_for_what_the_launchers_launch(dtype, layout):
    host = cuda_host.host_cuda()
    host.launches()
    host.lib.host_cuda_dry_run(True)
    try:
        for name, arguments in calls(dtype, layout):
            planned: list[_cuda_native.Launch] = []
            flags = (False, False) if name.startswith("conv") else ()  # tf32, wgmma
            _cuda_native.call(name, (*arguments, *flags), planned.append)
            getattr(host, name)(*arguments)
            launched = host.launches()
            assert [str(one) for one in planned] == [str(one) for one in launched], name
            for ours, theirs in zip(planned, launched, strict=True):
                assert ours.kernel == theirs.kernel
                assert_same_plan(ours.plan, theirs.plan)
    finally:
        host.lib.host_cuda_dry_run(False)


def test_planner_errors_become_exceptions():
    x = torch.empty(1 << 17, dtype=torch.float16).as_strided((1, 1, 1 << 16, 1 << 15), (0, 0, 1, 1))
    with pytest.raises(RuntimeError, match=r"up to 2\^31 - 1: split the batch \[fastalex::lrn"):
        _cuda_native.planned("lrn", (x, 5, 1e-4, 0.75, 1.0, 1))


def test_a_planned_launch_without_a_caller_is_an_error():
    grid, shapes = r"\(1 blocks of 256 threads, .*", r"\[fastalex::lrn float32\[1, 8, 3, 3\]"
    words = f"lrn_channels_first<float, 1, 5> did not start: .*{grid}{shapes}"
    with pytest.raises(RuntimeError, match=words):
        torch.ops.fastalex_cuda_plan.lrn(torch.ones(1, 8, 3, 3), 5, 1e-4, 0.75, 1.0, 1)


def test_what_fails_at_a_launch_is_what_the_caller_raised():
    def start(launch):
        raise KeyError("no such kernel")

    with pytest.raises(KeyError, match="no such kernel") as failed:
        _cuda_native.call("lrn", (torch.ones(1, 8, 3, 3), 5, 1e-4, 0.75, 1.0, 1), start)
    assert "1 blocks of 256 threads" in str(failed.value.__cause__)
    assert "[fastalex::lrn float32[1, 8, 3, 3]" in str(failed.value.__cause__)


# --- what CuPy is given, on a driver that is not there --------------------------------------------


class Driver:
    """Stands in for cupy.cuda.driver: keeps what it was asked for."""

    CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8

    class CUDADriverError(RuntimeError):
        pass

    def __init__(self) -> None:
        self.loaded: list[bytes] = []
        self.launches: list[tuple] = []
        self.shared: list[tuple[int, int]] = []
        self.failing = False

    def moduleLoadData(self, code):
        self.loaded.append(code)
        return len(self.loaded)

    def moduleGetFunction(self, module, name):
        return module * 100

    def funcSetAttribute(self, function, attribute, value):
        self.shared.append((attribute, value))

    def launchKernel(self, function, *numbers):
        if self.failing:
            raise self.CUDADriverError("CUDA_ERROR_INVALID_VALUE: invalid argument")
        (plan,) = (ctypes.c_void_p * 1).from_address(numbers[-2])
        self.launches.append((function, numbers[:-2], plan))


@pytest.fixture
def driver(monkeypatch, tmp_path):
    """A GPU of capability 9.0 whose driver only listens."""
    import cupy.cuda

    class Stream:
        cuda_stream = 4096

    fake = Driver()
    monkeypatch.setenv("FASTALEX_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(cupy.cuda, "driver", fake)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: Stream)
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
    _cupy._function.cache_clear()
    yield fake
    _cupy._function.cache_clear()


def launch_of(kernel: str, shared_bytes: int = 0) -> _cuda_native.Launch:
    return _cuda_native.Launch(kernel, 7, 256, shared_bytes, b"plan" * 10)


SMALL = "fastalex::reduce_splits<float>"


@needs_cupy
def test_a_launch_reaches_the_driver_as_planned(driver):
    _cupy.start(launch_of(SMALL, 64 << 10), 0)
    ((function, numbers, _),) = driver.launches
    assert numbers == (7, 1, 1, 256, 1, 1, 64 << 10, 4096)
    assert driver.shared == [(8, 64 << 10)]
    assert driver.loaded[0][:4] == b"\x7fELF"
    _cupy.start(launch_of(SMALL), 0)
    assert len(driver.loaded) == 1  # compiled and loaded once
    assert driver.launches[1][0] == function


@needs_cupy
def test_a_failed_launch_names_kernel_and_grid(driver):
    driver.failing = True
    with pytest.raises(
        RuntimeError, match=r"reduce_splits<float> \(7 x 256\) did not start: CUDA_ERR"
    ):
        _cupy.start(launch_of(SMALL), 0)


@needs_cupy
def test_a_kernel_is_compiled_once_a_machine(driver, monkeypatch):
    _cupy.start(launch_of(SMALL), 0)
    _cupy._function.cache_clear()  # as a new process

    def never(*args):
        raise AssertionError("compiled again")

    monkeypatch.setattr(_cupy, "compile_kernels", never)
    _cupy.start(launch_of(SMALL), 0)
    assert driver.loaded[0] == driver.loaded[1]


# --- the disk --------------------------------------------------------------------------------------


@pytest.fixture
def kept(monkeypatch, tmp_path) -> tuple[str, Path]:
    """A key with code in the cache, and its file."""
    monkeypatch.setenv("FASTALEX_CACHE_DIR", str(tmp_path))
    _cupy.save("a key", b"code" * 100, "name")
    assert _cupy.load("a key") == (b"code" * 100, "name")
    return "a key", _cupy.cache_file("a key")


def test_what_is_not_there_is_no_news(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTALEX_CACHE_DIR", str(tmp_path / "nowhere"))
    assert _cupy.load("a key") is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1],
        lambda data: data[:20],
        lambda data: b"",
        lambda data: data.replace(b"code", b"evil", 1),
        lambda data: data.replace(b'"a key"', b'"other"'),
        lambda data: b"\x80\x04]." + data,
        lambda data: b"[1, 2]\n" + data,
    ],
)
def test_a_damaged_file_is_ignored_with_a_warning(kept, damage):
    key, path = kept
    path.write_bytes(damage(path.read_bytes()))
    with pytest.warns(UserWarning, match=r"\.bin is ignored"):
        assert _cupy.load(key) is None


def test_a_folder_that_cannot_be_written_costs_no_call(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("FASTALEX_CACHE_DIR", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="could not be kept"):
        _cupy.save("a key", b"code", "name")


@needs_cupy
def test_the_key_names_all_that_code_depends_on():
    from cupy.cuda import nvrtc

    options, binary = _cupy.options_for(90)
    assert binary == "cubin"
    keys = {
        _cupy.cache_key("kernel", options),
        _cupy.cache_key("other", options),
        _cupy.cache_key("kernel", _cupy.options_for(80)[0]),
    }
    assert len(keys) == 3
    assert all(_cupy._source_digest() in key for key in keys)
    assert all(str(list(nvrtc.getVersion())) in key for key in keys)


@needs_cupy
@pytest.mark.parametrize(
    ("gpu", "option", "binary"),
    [
        (86, "sm_86", "cubin"),
        (90, "sm_90a", "cubin"),
        (120, "sm_120", "cubin"),
        (199, "compute_", "ptx"),
    ],
)
def test_a_gpu_that_the_compiler_does_not_know_gets_ptx(gpu, option, binary):
    options, kind = _cupy.options_for(gpu)
    assert option in options[0]
    assert kind == binary


# --- the compiler ----------------------------------------------------------------------------------

FEW = [
    "lrn_channels_last<__half, 8, 5>",
    "max_pool<__nv_bfloat16, 8, true, 3>",
    "conv_relu<HalfMath<__half>, ConvTile<64, 64, 32, 32, 4, 4>, GatherCopier, 16>",
    "conv_relu<WgmmaMath<__half>, ConvTile<128, 128, 16, 128, 6, 2>, PixelCopier, 16>",
]


@needs_cupy
def test_some_kernels_compile_with_nvrtc():
    code, names = _cupy.compile_kernels(FEW, *_cupy.options_for(90))
    assert code[:4] == b"\x7fELF"
    (headers,), (size, count) = (
        struct.unpack_from("<Q", code, 32),
        struct.unpack_from("<HH", code, 54),
    )
    assert headers + size * count == len(code)  # its program headers come last: the file is whole
    assert [kernel.partition("<")[0] in names[kernel] for kernel in FEW] == [True] * len(FEW)


@needs_cupy
def test_the_compilers_words_reach_the_user():
    with pytest.raises(RuntimeError, match=r"NVRTC cannot compile no_such<float>.*\n(?s:.*)error"):
        _cupy.compile_kernels(["no_such<float>"], *_cupy.options_for(90))


@pytest.mark.slow
@needs_cupy
@pytest.mark.skipif(
    bool(cuda_extension.unavailable() or static_ledger.unavailable()), reason="needs nvcc and tools"
)
def test_every_kernel_compiles_with_nvrtc_and_uses_nvcc_s_registers():
    expected = static_ledger.resources(cuda_extension.build().read_bytes())
    kernels = sorted(expected)
    apart = {}
    for start in range(0, len(kernels), 24):
        code, _ = _cupy.compile_kernels(kernels[start : start + 24], *_cupy.options_for(90))
        for name, row in static_ledger.resources(code).items():
            assert row["stack"] == 0 or re.search("direct|<.*, 0", name), name
            if abs(row["registers"] - expected[name]["registers"]) > 10:
                apart[name] = expected[name]["registers"], row["registers"]
    assert not apart
