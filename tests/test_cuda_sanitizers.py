"""The kernels under AddressSanitizer, UBSan and ThreadSanitizer, on the host runtime."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import cuda_host

pytestmark = pytest.mark.skipif(
    cuda_host.unavailable() is not None, reason=str(cuda_host.unavailable())
)

ROOT = Path(__file__).resolve().parents[1]
MEMORY, CONV = "tests/test_cuda_memory_bound.py", "tests/test_cuda_conv.py"
HOPPER = "tests/test_cuda_wgmma.py"
REPRESENTATIVE = (
    "(alexnet or padding or odd) and float16 or split or wide or strides or padded_rows"
)


def runtime_library(name: str) -> str | None:
    """Where g++ keeps a sanitizer's runtime; it must be loaded before Python's own allocations."""
    found = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True)
    path = found.stdout.strip()
    return path if os.path.isabs(path) else None


def sanitized(preload: str) -> dict[str, str]:
    """The variables under which Python runs with a sanitizer's runtime."""
    # A sanitizer looks up the C++ runtime's throw as it starts, before Python has loaded that runtime.
    preloads = (runtime_library(preload), runtime_library("libstdc++.so.6"))
    return {
        "LD_PRELOAD": " ".join(path for path in preloads if path),
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1:verify_asan_link_order=0",
        "TSAN_OPTIONS": "halt_on_error=1:report_signal_unsafe=0:ignore_noninstrumented_modules=1",
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
    }


def run_under(variant: str, preload: str, *pytest_arguments: str) -> subprocess.CompletedProcess:
    if runtime_library(preload) is None:
        pytest.skip(f"g++ has no {preload}")
    cuda_host.build(variant)
    environment = {**os.environ, "FASTALEX_HOST_CUDA": variant, **sanitized(preload)}
    # A sanitizer ends the process, and with it what pytest had captured of its words: -s.
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-s", "-p", "no:cacheprovider"]
    if variant == "thread" and shutil.which("setarch"):
        command = ["setarch", "-R", *command]  # a fixed address space: TSan's shadow needs it
    return subprocess.run(
        [*command, *pytest_arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )


def assert_clean(done: subprocess.CompletedProcess) -> None:
    output = done.stdout + done.stderr
    for sign in ("AddressSanitizer", "runtime error", "ThreadSanitizer: data race"):
        assert sign not in output, output[-6000:]
    assert done.returncode == 0, output[-6000:]


def test_representative_set_under_address_and_undefined_sanitizers():
    selection = ("-k", REPRESENTATIVE, "-m", "not slow")
    assert_clean(run_under("address", "libasan.so", MEMORY, CONV, *selection))


@pytest.mark.slow
@pytest.mark.parametrize("suite", [MEMORY, CONV, HOPPER])
def test_everything_under_address_and_undefined_sanitizers(suite):
    assert_clean(run_under("address", "libasan.so", suite))


@pytest.mark.slow
@pytest.mark.parametrize("suite", [MEMORY, CONV, HOPPER])
def test_everything_under_the_thread_sanitizer(suite):
    """But for the largest maps, whose hundreds of thousands of threads take minutes; one of them by every schedule."""
    few = "not bands_of_rows and (schedule or not outputs)"
    assert_clean(run_under("thread", "libtsan.so", suite, "-m", "not slow", "-k", few))
