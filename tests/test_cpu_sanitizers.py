"""The CPU library under AddressSanitizer, UBSan and ThreadSanitizer."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import native_build
from tests.support.packaging import ROOT, run
from tests.test_cuda_sanitizers import runtime_library

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to build with"),
]

#: The case table of every operator on every instruction set; native operators that are handed nonsense; threads, forks
#: and a lack of memory; random memory layouts.
CASES = ("lrn", "max_pool", "lrn_max_pool", "conv_relu", "linear_relu", "augment", "concurrency")
#: Tests that exchange the library for another, or measure memory, which a sanitizer keeps from the system.
UNFIT = "not bad_libraries and not another_abi and not flat"


def test_address_and_undefined_behaviour(tmp_path: Path) -> None:
    checkout = native_build.package("address")
    # The C++ runtime besides: a sanitizer looks up its throw as it starts, before Python has loaded it.
    preloads = [runtime_library(name) for name in ("libasan.so", "libstdc++.so.6")]
    assert all(preloads), "g++ has no libasan"
    options = "detect_leaks=0:halt_on_error=1:verify_asan_link_order=0:allocator_may_return_null=1"
    files = [
        f"tests/test_{name}.py"
        for name in (*CASES, "conv_relu_max_pool", "errors", "properties", "properties_conv")
    ]
    done = run(
        [sys.executable, "-m", "pytest", "-x", "-s", "-m", "not slow", "-k", UNFIT, *files],
        checkout,
        LD_PRELOAD=" ".join(map(str, preloads)),
        ASAN_OPTIONS=f"{options}:log_path={tmp_path}/report",
        UBSAN_OPTIONS="print_stacktrace=1",
        FASTALEX_EXAMPLES="100",
    )
    reports = "".join(path.read_text() for path in tmp_path.glob("report*"))
    assert "AddressSanitizer" not in reports, reports[:6000]
    assert "runtime error" not in done.text + reports, (done.text + reports)[-6000:]
    assert done.code == 0, done.text[-6000:]


def test_threads() -> None:
    """threads.cpp hosts the library's parts on threads that the sanitizer sees: torch's pool is not built for it."""
    program = native_build.program(
        ROOT / "tests/support/native/threads.cpp", sanitizer="thread", compiler="g++"
    )
    # A fixed address space: the sanitizer's shadow needs it.
    fixed = ["setarch", "-R"] if shutil.which("setarch") else []
    done = subprocess.run(
        [*fixed, str(program)], capture_output=True, text=True, timeout=600, check=False
    )
    assert "ThreadSanitizer" not in done.stderr, done.stderr[:6000]
    assert done.returncode == 0, done.stderr[-6000:]
