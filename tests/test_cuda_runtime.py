"""The host runtime itself: its PTX twins are exact, and it stops at every misuse. What a wrong call is told."""

from __future__ import annotations

import ctypes
import re

import pytest
import torch

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


X = torch.zeros(1, 4, 5, 5)
W = torch.zeros(6, 4, 3, 3)
ONE, NONE = (1, 1), (0, 0)
LRN_ARGUMENTS = (0.02, 0.75, 2.0)
SEVEN = ((7, 7), ONE, NONE)
WRONG_CALLS = [  # below the checks in Python, which a call of the library's own operators does not pass
    (lambda h: h.lrn(X.double(), 5, *LRN_ARGUMENTS, 1), "lrn: input is float64; it must be"),
    (
        lambda h: h.lrn(X[0, 0], 5, *LRN_ARGUMENTS, 1),
        r"lrn: input is .*it must be \[N, C, \.\.\.\]",
    ),
    (lambda h: h.lrn(X, 0, *LRN_ARGUMENTS, 1), "lrn: size is 0; it must be at least 1"),
    (lambda h: h.lrn(X, 5, *LRN_ARGUMENTS, 3), "lrn: groups is 3; it must divide the 4 channels"),
    (lambda h: h.max_pool(X[0], *SEVEN, ONE, False, True), r"it must be \[N, C, H, W\]: unsqueeze"),
    (
        lambda h: h.max_pool(X, *SEVEN, ONE, False, True),
        "a window of 7 with padding 0 and dilation 1 does not fit input .*: pad more",
    ),
    (
        lambda h: h.max_pool_backward(X, X[:, :1].byte(), (5, 5), *SEVEN, ONE),
        "offsets are .*they must have one shape: run forward with save_offsets=True",
    ),
    (
        lambda h: h.conv_relu(X, W.half(), None, ONE, NONE, ONE, 1),
        "input is float32 and weight float16; they must agree: convert",
    ),
    (lambda h: h.conv_relu(X, W[0], None, ONE, NONE, ONE, 1), r"they must be \[N, C, H, W\] and"),
    (lambda h: h.conv_relu(X, W, None, ONE, NONE, ONE, 2), "does not fit 4 channels in 2 groups"),
    (
        lambda h: h.conv_relu(X, W, None, ONE, NONE, (3, 3), 1),
        "a kernel of 3 with padding 0 and dilation 3 does not fit input .*: pad more",
    ),
    (lambda h: h.linear_relu(X, W[0, 0], None, True, False, False), "weight .* does not fit input"),
]


@pytest.mark.parametrize(("call", "words"), WRONG_CALLS)
def test_an_error_says_what_is_wrong_and_names_no_source(call, words):
    with pytest.raises(RuntimeError, match=words) as raised:
        call(cuda_host.host_cuda())
    assert str(raised.value).startswith("fastalex::")
    assert not re.search(r"\.(cpp|cuh?|h)\b", str(raised.value))
