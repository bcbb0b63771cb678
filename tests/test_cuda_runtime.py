"""The host runtime itself: its PTX twins are exact, and it stops at every misuse."""

from __future__ import annotations

import ctypes

import pytest

from tests.support import cuda_host

pytestmark = pytest.mark.skipif(
    cuda_host.unavailable() is not None, reason=str(cuda_host.unavailable())
)

EXACT = ["mma float16", "mma bfloat16", "mma tf32", "ldmatrix", "cp.async", "barriers", "roots"]
EXACT += ["division", "wgmma float16", "wgmma bfloat16"]
MISUSES = {
    "copy to an odd address": "destination is not aligned",
    "copy from an odd address": "source is not aligned",
    "copy outside shared memory": "outside shared memory",
    "exit without a wait": "never waited for",
    "half a warp at ldmatrix": "deadlock",
    "tf32 operand not rounded": "not rounded by to_tf32",
    "wgmma before a proxy fence": "no fence.proxy.async handed over",
    "wgmma operand overwritten": "changed before its product ended",
    "wgmma without its fence": "without wgmma.fence",
    "wgmma never waited for": "never waited for",
    "wgmma operand off its pattern": "starts inside a swizzle pattern",
    "threads at different barriers": "deadlock",
    "store past shared memory": "out of range",
    "plain write past shared memory": "outside dynamic shared memory",
    "unaligned vector load": "not aligned to its 16 bytes",
    "too many threads": "1 to 1024 allowed",
}


@pytest.fixture(scope="module")
def check():
    library = cuda_host.host_cuda().lib
    library.host_cuda_check.restype = library.host_cuda_checks.restype = ctypes.c_char_p
    names = library.host_cuda_checks().decode().splitlines()
    assert sorted(names) == sorted(EXACT + ["misuse: " + name for name in MISUSES])
    return lambda name: library.host_cuda_check(name.encode())


@pytest.mark.parametrize("schedule", cuda_host.SCHEDULES)
@pytest.mark.parametrize("name", EXACT)
def test_twins_are_exact(check, name, schedule):
    host = cuda_host.host_cuda()
    host.schedule(schedule, seed=3)
    try:
        assert check(name) is None
    finally:
        host.schedule("forward")


@pytest.mark.parametrize("name", MISUSES)
def test_misuse_is_stopped_and_the_next_launch_works(check, name):
    assert MISUSES[name] in check("misuse: " + name).decode()
    assert check("barriers") is None
