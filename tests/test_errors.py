"""Wrong calls: an exception that names what was wrong and what is allowed; never a crash."""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import fastalex
from fastalex import _native, ops
from fastalex._explain import explanation
from fastalex.ops import _cpu
from tests.support.samples import stock_conv_relu

PACKAGE = pathlib.Path(fastalex.__file__).parent
X = torch.zeros(2, 4, 6, 6)
W = torch.zeros(8, 4, 3, 3)


def both(function, stock):
    """Ours and torch's: what torch rejects, we reject."""
    return function, stock


LRN = both(ops.local_response_norm, F.local_response_norm)
POOL = both(ops.max_pool2d, F.max_pool2d)
CONV = both(ops.conv2d_relu, stock_conv_relu)
FUSED = both(ops.lrn_max_pool2d, None)
OURS = both(ops.local_response_norm, None)
OURS_POOL = both(ops.max_pool2d, None)

#: functions, arguments, keywords, our exception, what its message names.
WRONG = [
    (LRN, (torch.zeros(2, 4), 5), {}, ValueError, "2-D .*3-D or more"),
    (LRN, (torch.zeros(4), 5), {}, ValueError, "1-D .*3-D or more"),
    (OURS, (X.int(), 5), {}, TypeError, "int32.*float32"),
    (LRN, ("x", 5), {}, TypeError, "must be a Tensor.*str"),
    (LRN, (X, 0), {}, ValueError, "size is 0.*positive"),
    (OURS, (X, -3), {}, ValueError, "size is -3.*positive"),
    (LRN, (X, "5"), {}, ValueError, "size is '5'.*positive int"),
    (OURS, (X, 5), {"groups": 3}, ValueError, "groups is 3.*divide the 4"),
    (OURS, (X, 5), {"groups": 0}, ValueError, "groups is 0"),
    (OURS, (X, 5), {"alpha_mode": "max"}, ValueError, "'max'.*'mean' or 'sum'"),
    (LRN, (X, 5, "a"), {}, TypeError, "alpha is 'a'.*a number"),
    (LRN, (X, 5, 1e-4, None), {}, TypeError, "beta is None.*a number"),
    (LRN, (X, 5, 1e-4, 0.75, "1"), {}, TypeError, "k is '1'.*a number"),
    (LRN, (X.to_sparse(), 5), {}, TypeError, "sparse.*dense"),
    (POOL, (torch.zeros(4, 4), 2), {}, ValueError, "2-D.*3-D or 4-D"),
    (POOL, (torch.zeros(1, 1, 1, 4, 4), 2), {}, ValueError, "5-D.*3-D or 4-D"),
    (POOL, ("x", 2), {}, TypeError, "must be a Tensor.*str"),
    (POOL, (X, 0), {}, ValueError, "kernel_size is 0.*at least 1"),
    (POOL, (X, -2), {}, ValueError, "kernel_size is -2.*at least 1"),
    (POOL, (X, "3"), {}, ValueError, "kernel_size is '3'.*int or a pair"),
    (POOL, (X, 2.5), {}, ValueError, "kernel_size is 2.5.*int or a pair"),
    (POOL, (X, (2, 2, 2)), {}, ValueError, "kernel_size is .*pair"),
    (POOL, (X, 3, 0), {}, ValueError, "stride is 0.*at least 1"),
    (POOL, (X, 3, 2, -1), {}, ValueError, "padding is -1.*at least 0"),
    (POOL, (X, 3, 2, 2), {}, ValueError, "padding is 2.*half of kernel_size 3"),
    (POOL, (X, 3, 2, 1, 0), {}, ValueError, "dilation is 0.*at least 1"),
    (POOL, (X, 7), {}, ValueError, r"kernel_size \(7, 7\).*does not fit"),
    (POOL, (X[:, :0], 3), {}, ValueError, "only the batch may be empty"),
    (POOL, (X[:, :, :0], 3), {}, ValueError, "does not fit"),
    (POOL, (X.to_sparse(), 3), {}, TypeError, "sparse.*dense"),
    (POOL, (X.bool(), 3), {}, NotImplementedError, "not implemented for 'Bool'"),
    (OURS_POOL, (X, 3), {"ceil_mode": "yes"}, TypeError, "ceil_mode is 'yes'.*True or False"),
    (FUSED, (X, 5), {"padding": 2}, ValueError, "padding is 2.*half of kernel_size 3"),
    (FUSED, (X, 5), {"beta": "b"}, TypeError, "beta is 'b'.*a number"),
    (FUSED, (torch.zeros(4, 4), 5), {}, ValueError, "2-D"),
    (FUSED, (torch.zeros(1, 4, 4, 4, 4), 5), {}, ValueError, "5-D"),
    (FUSED, (X, 0), {}, ValueError, "size is 0"),
    (FUSED, (X, 5), {"kernel_size": 9}, ValueError, "does not fit"),
    (FUSED, (X.long(), 5), {}, TypeError, "int64"),
    (CONV, (X[0, 0], W), {}, ValueError, "2-D.*3-D or 4-D"),
    (CONV, (X, W[0]), {}, ValueError, "weight is 3-D"),
    (CONV, (X, W[0]), {"padding": "same"}, ValueError, "weight is 3-D"),
    (CONV, (X[0, 0, 0], W), {"padding": "same"}, ValueError, "1-D.*3-D or 4-D"),
    (CONV, ("x", W), {}, TypeError, "input must be a Tensor.*str"),
    (CONV, (X, "w"), {}, TypeError, "weight must be a Tensor.*str"),
    (CONV, (X, W, "b"), {}, TypeError, "bias must be a Tensor.*str"),
    (
        CONV,
        (X.double(), W),
        {},
        TypeError,
        r"float64 and weight torch.float32; .*convert one with \.to",
    ),
    (CONV, (X, W, torch.zeros(8).double()), {}, TypeError, "float32 and bias torch.float64"),
    (
        both(ops.conv2d_relu, None),
        (X, W.to("meta")),
        {},
        ValueError,
        "cpu and weight on meta; move one",
    ),
    (CONV, (X, W, torch.zeros(7)), {}, ValueError, r"bias is \(7,\).*\(8,\)"),
    (CONV, (X, W), {"groups": 0}, ValueError, "groups is 0"),
    (CONV, (X, W), {"groups": 3}, ValueError, "groups is 3.*divide the 8"),
    (CONV, (X, W), {"groups": 2}, ValueError, "input has 4 channels.*takes 8"),
    (CONV, (X, W), {"stride": 0}, ValueError, "stride is 0.*at least 1"),
    (CONV, (X, W), {"stride": 1.5}, ValueError, "stride is 1.5.*int or a pair"),
    (CONV, (X, W), {"padding": -1}, ValueError, "padding is -1.*at least 0"),
    (CONV, (X, W), {"padding": "full"}, ValueError, "'full'.*'valid', 'same'"),
    (CONV, (X, W), {"padding": "same", "stride": 2}, ValueError, "needs stride 1"),
    (CONV, (X, W), {"dilation": 0}, ValueError, "dilation is 0.*at least 1"),
    (CONV, (X, W), {"dilation": 3}, ValueError, "does not.*fit"),
    (CONV, (X, torch.zeros(8, 4, 7, 7)), {}, ValueError, "does not.*fit"),
    (CONV, (X, torch.zeros(8, 4, 0, 3)), {}, ValueError, "does not.*fit"),
]


@pytest.mark.parametrize(("functions", "args", "kwargs", "error", "message"), WRONG)
def test_wrong_calls(functions, args, kwargs, error, message):
    ours, stock = functions
    with pytest.raises(error, match=f"(?s){message}") as raised:
        ours(*args, **kwargs)
    assert ours.__name__ in str(raised.value)
    if stock is not None:
        with pytest.raises(
            (RuntimeError, TypeError, ValueError, ZeroDivisionError, AttributeError)
        ):
            stock(*args, **kwargs)


LINEAR = (torch.zeros(2, 3), torch.zeros(4, 3))
NET = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU()).eval()


#: What is called, our exception, what its message names: the rest of the public API.
OTHERS = [
    (lambda: ops.linear_relu(LINEAR[0], torch.zeros(4, 5)), ValueError, r"\(2, 3\).*\[..., 5\]"),
    (lambda: ops.linear_relu(*LINEAR, torch.zeros(3)), ValueError, r"bias is \(3,\).*\(4,\)"),
    (lambda: ops.linear_relu(LINEAR[0], LINEAR[1].double()), TypeError, "float64; they must agree"),
    (lambda: ops.linear_relu(LINEAR[0], torch.zeros(3)), ValueError, "weight is 1-D"),
    (lambda: ops.linear_relu(LINEAR[0].int(), LINEAR[1]), TypeError, "int32.*float32"),
    (lambda: ops.conv2d_relu_max_pool2d(X, W, pool_size=9), ValueError, r"pool_size \(9, 9\).*fit"),
    (
        lambda: ops.conv2d_relu_max_pool2d(X, W, pool_padding=2),
        ValueError,
        "pool_padding is 2; .* pool_size 3",
    ),
    (lambda: ops.Conv2dReLU(3, 4, 3, groups=2), ValueError, "divisible by groups"),
    (lambda: ops.LocalResponseNorm(0)(X), ValueError, "size is 0.*positive int"),
    (lambda: fastalex.set_conv_precision("fast"), ValueError, "'fast'.*highest, high, medium"),
    (lambda: fastalex.optimize("net"), TypeError, "torch.nn.Module, got str"),
    (lambda: fastalex.optimize(NET, X), RuntimeError, "input has 4 channels.*takes 3"),
    (lambda: fastalex.tune("net", X), TypeError, "torch.nn.Module, got str"),
    (lambda: fastalex.models.alexnet("papr"), ValueError, "no preset 'papr'.*paper, single"),
    (lambda: fastalex.models.alexnet(num_classes=0), ValueError, "num_classes is 0.*at least 1"),
    (lambda: fastalex.models.alexnet(dropout=2.0), ValueError, "dropout is 2.0.*probability"),
    (lambda: fastalex.models.alexnet("cifar10")(X), ValueError, r"\[N, 3, 32, 32\]"),
]


@pytest.mark.parametrize(("call", "error", "message"), OTHERS)
def test_other_wrong_calls(call, error, message):
    with pytest.raises(error, match=f"(?s){message}"):
        call()


@pytest.mark.parametrize("name", ["padding", "dilation", "stride", "kernel_size"])
def test_lists_are_pairs(name):
    arguments = {"kernel_size": 3, "stride": 1, "padding": 1, "dilation": 1}
    listed = {**arguments, name: [arguments[name]] * 2}
    assert torch.equal(ops.max_pool2d(X, **listed), F.max_pool2d(X, **arguments))


native = torch.ops.fastalex_cpu
OFFSETS = torch.zeros(2, 4, 2, 2, dtype=torch.uint8)
HUGE = 2**40


def numbers(*values):
    return torch.tensor(values, dtype=torch.float64)


def lrn_numbers(size=5, groups=1):
    return numbers(size, 0.1, 0.75, 1.0, groups)


def pool_numbers(*more, kernel=3, stride=2, padding=0, dilation=1):
    """Of a pool, with the same number for height and width; ``more`` follows."""
    return numbers(*(v for v in (kernel, stride, padding, dilation) for _ in range(2)), *more)


FUSED = torch.cat([lrn_numbers(), pool_numbers()])

NONSENSE = {
    "lrn of rank 2": lambda: native.lrn(X[0, 0], lrn_numbers()),
    "lrn of ints": lambda: native.lrn(X.int(), lrn_numbers()),
    "lrn groups": lambda: native.lrn(X, lrn_numbers(groups=3)),
    "lrn no groups": lambda: native.lrn(X, lrn_numbers(groups=0)),
    "lrn size": lambda: native.lrn(X, lrn_numbers(size=-1)),
    "lrn half a size": lambda: native.lrn(X, lrn_numbers(size=2.5)),
    "lrn size nan": lambda: native.lrn(X, lrn_numbers(size=float("nan"))),
    "lrn size inf": lambda: native.lrn(X, lrn_numbers(size=float("inf"))),
    "lrn too few numbers": lambda: native.lrn(X, lrn_numbers()[:4]),
    "lrn strided numbers": lambda: native.lrn(X, lrn_numbers().repeat_interleave(2)[::2]),
    "lrn numbers in float32": lambda: native.lrn(X, lrn_numbers().float()),
    "lrn grad shape": lambda: native.lrn_backward(X[:1], X, lrn_numbers()),
    "lrn grad dtype": lambda: native.lrn_backward(X.double(), X, lrn_numbers()),
    "pool kernel": lambda: native.max_pool(X, pool_numbers(0, kernel=9)),
    "pool stride": lambda: native.max_pool(X, pool_numbers(0, stride=0)),
    "pool padding": lambda: native.max_pool(X, pool_numbers(0, padding=2)),
    "pool overflow": lambda: native.max_pool(X, pool_numbers(0, kernel=5, dilation=HUGE)),
    "pool kernel overflow": lambda: native.max_pool(X, pool_numbers(0, kernel=HUGE, dilation=4)),
    "pool too many numbers": lambda: native.max_pool(X, pool_numbers(0, 0)),
    "unpool dtype": lambda: native.max_pool_backward(
        OFFSETS.float(), OFFSETS.int(), pool_numbers(5, 5)
    ),
    "unpool shape": lambda: native.max_pool_backward(
        torch.zeros(2, 4, 1, 1), OFFSETS, pool_numbers(5, 5)
    ),
    "unpool to a negative size": lambda: native.max_pool_backward(
        OFFSETS.float(), OFFSETS, pool_numbers(-5, 5)
    ),
    "unpool to another size": lambda: native.max_pool_backward(
        OFFSETS.float(), OFFSETS, pool_numbers(50, 50)
    ),
    "fused dilation": lambda: native.lrn_max_pool(
        X, torch.cat([lrn_numbers(), pool_numbers(0, dilation=2)])
    ),
    "fused unpool channels": lambda: native.lrn_max_pool_backward(
        OFFSETS.float()[:, :2], X, OFFSETS[:, :2], FUSED
    ),
    "fused unpool dtype": lambda: native.lrn_max_pool_backward(OFFSETS.double(), X, OFFSETS, FUSED),
    "isa": lambda: native.set_isa("mmx"),
}


@pytest.mark.parametrize("call", NONSENSE.values(), ids=NONSENSE)
def test_native_operators_refuse_nonsense(call):
    with pytest.raises((RuntimeError, NotImplementedError)) as raised:
        call()
    if type(raised.value) is RuntimeError:  # the words alone: no function, file and line of ours
        assert str(raised.value).startswith("fastalex: ")


def test_a_library_of_older_sources_leaves_a_working_package(monkeypatch):
    """It lacks an operator that this Python wants: every call goes to torch, and explain says why."""
    monkeypatch.setattr(_native, "error", None)
    _cpu.native("of_the_future")
    assert "no operator 'of_the_future': it was built from older sources" in _native.error
    assert "build it again: make build" in explanation("lrn", X, 5)
    assert torch.equal(ops.local_response_norm(X, 5), X)
    assert ops.conv2d_relu(X, W).shape == (2, 8, 4, 4)


# --- the environment, and libraries that do not load ---------------------------------------------


def python(*arguments, package_parent=PACKAGE.parent, cwd=None, **environment):
    clean = {k: v for k, v in os.environ.items() if not k.startswith("FASTALEX_")}
    return subprocess.run(
        [sys.executable, *arguments],
        env={**clean, "PYTHONPATH": str(package_parent), **environment},
        cwd=cwd or package_parent,  # python -c looks in the working directory first
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    ("variable", "allowed"),
    [
        ("FASTALEX_BACKEND", "auto or one of cpu, cuda"),
        ("FASTALEX_CPU_ISA", "avx512, avx2, portable"),
    ],
)
def test_unknown_environment_values(variable, allowed):
    done = python("-c", "import fastalex", **{variable: "quick"})
    assert done.returncode == 1
    assert f"ValueError: {variable} is 'quick'" in done.stderr
    assert allowed in done.stderr


def test_unknown_build_choice():
    setup = PACKAGE.parent / "setup.py"
    if not setup.exists():
        pytest.skip("fastalex is installed without its setup.py")
    done = python(str(setup), "--version", cwd=setup.parent, FASTALEX_BUILD="fast")
    assert done.returncode == 1
    assert "FASTALEX_BUILD is 'fast'; it can be auto, cpu, cuda or none" in done.stderr


USE = """
import torch, fastalex
from fastalex import ops
x = torch.randn(2, 8, 9, 9, requires_grad=True)
ops.lrn_max_pool2d(x, 5).sum().backward()
ops.local_response_norm(x, 5); ops.max_pool2d(x, 3, 2)
ops.conv2d_relu(x, torch.randn(4, 8, 3, 3))
fastalex.explain("lrn", x, 5)
"""
#: What `python -m fastalex` prints, without another start of torch.
REPORT = """
import runpy
runpy.run_module("fastalex", run_name="__main__")
"""


def truncated(size):
    return lambda good: good[:size]


def half(good):
    return good[: len(good) // 2]


@pytest.mark.parametrize(
    "spoil",
    [
        None,
        lambda good: b"",
        lambda good: b"not a library" * 99,
        truncated(64),
        truncated(9000),
        half,
    ],
    ids=["absent", "empty", "text", "header", "pages", "half"],
)
def test_bad_libraries_leave_a_working_package(tmp_path, spoil):
    """Import works, every operator runs on torch, and the reason is given."""
    shutil.copytree(
        PACKAGE, tmp_path / "fastalex", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    (library,) = PACKAGE.glob("_cpu*.so")
    if spoil is not None:
        (tmp_path / "fastalex" / library.name).write_bytes(spoil(library.read_bytes()))
    done = python("-c", USE + REPORT, package_parent=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "lrn: runs on torch" in done.stdout
    assert "backend cpu" in done.stdout
    reason = "was not built" if spoil is None else "does not load into torch"
    assert reason in done.stdout


def test_library_of_another_abi(tmp_path):
    """One that wants a symbol this torch does not have."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ to build a library with")
    shutil.copytree(
        PACKAGE, tmp_path / "fastalex", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    source = tmp_path / "bad.cpp"
    source.write_text(
        'extern "C" int aoti_torch_of_the_future();\nint x = aoti_torch_of_the_future();\n'
    )
    output = tmp_path / "fastalex" / "_cpu.abi3.so"
    subprocess.run([compiler, "-shared", "-fPIC", source, "-o", output], check=True)
    done = python("-c", USE + REPORT, package_parent=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "aoti_torch_of_the_future" in done.stdout
