"""Which backend runs a call: the choice, its reasons, how it is forced, and what keeps instruction sets apart."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fastalex
from fastalex import BackendError, _native, backends, explain, ops, use_backend
from fastalex.backends import NAMES, KernelTable
from fastalex.ops import _cpu
from fastalex.ops._operator import REGISTRY
from tests.support.samples import SAMPLES

HAS_TRITON = importlib.util.find_spec("triton") is not None
ROOT = Path(__file__).resolve().parents[1]
X = torch.zeros(2, 8, 9, 9)
WIDE = torch.zeros(2, 64, 27, 27), torch.zeros(64, 64, 3, 3)
FORWARD = sorted(SAMPLES)
COMPOSED = ["conv_relu_lrn_max_pool", "conv_relu_max_pool"]


def explained(capsys, *args, **kwargs) -> dict[str, str]:
    """What explain prints: the headline under "", then each backend's verdict."""
    assert explain(*args, **kwargs) is None
    headline, *lines = capsys.readouterr().out.splitlines()
    verdicts = [line for line in lines if line[2:3].strip()]  # a backend's plan stands further in
    return {"": headline, **dict(line.strip().split(maxsplit=1) for line in verdicts)}


def explained_sample(capsys, name: str, **changes) -> dict[str, str]:
    sample = SAMPLES[name]
    tensors = [tensor.to(**changes) for tensor in sample.tensors(torch.float32)]
    return explained(capsys, name, *tensors, **sample.arguments)


# --- explain -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORWARD)
def test_explain_says_what_runs(capsys, name):
    told = explained_sample(capsys, name)
    assert told[""] == f"{name}: runs on cpu"
    assert told["cpu"].partition(";")[0] == "chosen"
    assert list(told)[1:] == [kernel.backend for kernel in REGISTRY[name].kernels.kernels]


def test_torch_takes_narrow_groups_unless_the_engine_is_forced(capsys):
    """A depthwise convolution takes the engine up to 30 times torch's time."""
    call = ("conv_relu", X, torch.zeros(8, 1, 3, 3), None, 1, 0, 1, 8)
    told = explained(capsys, *call)
    assert told[""] == "conv_relu: runs on torch"
    assert told["cpu"] == (
        "no: torch is faster in groups of 8 channels or fewer; use_backend('cpu') insists"
    )
    with use_backend("cpu"):
        assert explained(capsys, *call)[""] == "conv_relu: runs on cpu (forced)"


def test_explain_tells_who_else_could(capsys):
    assert explained(capsys, "lrn", X, 5)["torch"] == "able, not needed"
    assert explained(capsys, "conv_relu", *WIDE)["torch"] == "able, not needed"


@pytest.mark.parametrize("name", ["lrn", "lrn_max_pool", "max_pool"])
def test_explain_refuses_other_dtypes(capsys, name):
    """LRN's own check stops integers earlier; float8 is what it lets through and the library doesn't take."""
    dtype = torch.int32 if name == "max_pool" else torch.float8_e4m3fn
    told = explained_sample(capsys, name, dtype=dtype)
    assert told[""] == f"{name}: runs on torch"
    assert re.fullmatch(f"no: it takes float32, .* and this tensor is {dtype}", told["cpu"])


def test_explain_refuses_convolutions_in_float64(capsys):
    x, weight = WIDE
    told = explained(capsys, "conv_relu", x.double(), weight.double())
    assert told["cpu"] == (
        "no: it takes float32, bfloat16 and float16, and this tensor is torch.float64"
    )


@pytest.mark.parametrize("name", FORWARD)
def test_explain_of_tensors_on_a_gpu_that_is_not_there(capsys, name):
    with FakeTensorMode():
        told = explained_sample(capsys, name, device="cuda")
    # An untuned convolution leaves the choice to cuDNN, and linear layers are cuBLAS's.
    untuned = name in ("conv_relu", "linear_relu", *COMPOSED)
    expected = "torch" if untuned or not HAS_TRITON else "triton"
    assert told[""] == f"{name}: runs on {expected}"
    assert told["cpu"] == "no: it runs on CPU tensors, and this one is on cuda:0"


def test_explain_without_the_cpu_library(capsys, monkeypatch):
    monkeypatch.setattr(_native, "error", "the library is on holiday")
    told = explained(capsys, "lrn", X, 5)
    assert told[""] == "lrn: runs on torch"
    assert told["cpu"] == "no: the library is on holiday"


def test_explain_knows_of_forcing(capsys):
    with use_backend("torch"):
        told = explained(capsys, "lrn", X, 5)
    assert told[""] == "lrn: runs on torch (forced)"
    assert (told["cpu"], told["torch"]) == ("able, not needed", "chosen")
    with use_backend("cuda"):
        told = explained(capsys, "lrn", X, 5)
    assert told[""] == "lrn: runs on nothing (forced)"
    assert told["cpu"] == told["torch"] == "able, not needed"


@pytest.mark.parametrize("requires_grad", [True, False])
def test_explain_runs_nothing(capsys, monkeypatch, requires_grad):
    def never(*args):
        raise AssertionError("explain ran the operator")

    table = REGISTRY["lrn"].kernels
    unused = tuple(dataclasses.replace(kernel, run=never) for kernel in table.kernels)
    monkeypatch.setattr(table, "kernels", unused)
    explained(capsys, "lrn", X.clone().requires_grad_(requires_grad), 5)


def test_a_variable_of_unknown_value_is_told_at_import():
    wanted = {
        "FASTALEX_BACKEND": "auto or one of cpu, cuda, triton, cupy, torch",
        "FASTALEX_CPU_ISA": "one of avx512, avx2, portable",
        "FASTALEX_TUNE": "0 or 1",
    }
    started = {
        name: subprocess.Popen(
            [sys.executable, "-c", "import fastalex"],
            env=os.environ | {name: "fast"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in wanted
    }
    for name, process in started.items():
        words = process.communicate()[1]
        assert f"ValueError: {name} is 'fast'; it can be {wanted[name]}\n" in words


def test_explain_of_wrong_calls():
    with pytest.raises(
        ValueError,
        match="no operator 'softmax'; there are augment, conv_relu, conv_relu_lrn_max_pool, ",
    ):
        explain("softmax", X)
    with pytest.raises(ValueError, match="local_response_norm's is 'lrn'"):
        explain("local_response_norm", X, 5)
    with pytest.raises(ValueError, match="size is 0"):
        explain("lrn", X, 0)


# --- forcing -------------------------------------------------------------------------------------


def chosen(name: str = "lrn") -> str:
    sample = SAMPLES[name]
    operands = sample.tensors(torch.float32)
    return REGISTRY[name].kernels.choose(*operands, *sample.positional).backend


def test_nested_choices_unwind():
    assert chosen() == "cpu"
    with use_backend("torch"):
        assert chosen() == "torch"
        with use_backend("cpu"):
            assert chosen() == "cpu"
            with use_backend("auto"):
                assert chosen() == "cpu"
                assert chosen("conv_relu") == "cpu"
        assert chosen() == "torch"
        with pytest.raises(ZeroDivisionError), use_backend("cpu"):
            _ = 1 / 0
        assert chosen() == "torch"
        with pytest.raises(ValueError, match="use_backend's name is 'gpu'"), use_backend("gpu"):
            pass
        assert chosen() == "torch"
    assert chosen() == "cpu"


def test_a_choice_is_its_threads_own():
    """Both threads are inside their blocks at the same time."""
    both_inside = threading.Barrier(2, timeout=30)
    seen = {}

    def work(backend):
        with use_backend(backend):
            both_inside.wait()
            seen[backend] = chosen()
            both_inside.wait()

    threads = [threading.Thread(target=work, args=(name,)) for name in ("cpu", "torch")]
    with use_backend("torch"):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert seen == {"cpu": "cpu", "torch": "torch"}


def test_a_new_thread_chooses_for_itself():
    seen = []
    with use_backend("torch"):
        thread = threading.Thread(target=lambda: seen.append(chosen()))
        thread.start()
        thread.join()
    assert seen == ["cpu"]


def called(name: str, tensors: list[torch.Tensor]) -> torch.Tensor:
    """The operator past torch's dispatcher, where nothing but gradients needs it."""
    return SAMPLES[name].call(*tensors)


def dispatched(name: str, tensors: list[torch.Tensor]) -> torch.Tensor:
    output = REGISTRY[name].dispatch(*tensors, *SAMPLES[name].positional)
    return output if isinstance(output, torch.Tensor) else output[0]


@pytest.mark.parametrize("forward", ["torch", "cpu", "auto"])
@pytest.mark.parametrize("reach", [called, dispatched])
@pytest.mark.parametrize("name", FORWARD)
def test_gradients_run_where_the_forward_pass_was_forced(monkeypatch, name, reach, forward):
    """In another thread, as CUDA's gradients do, and in this one under another choice."""
    chosen_by = []
    choose = KernelTable.choose

    def recorded(table, *args):
        kernel = choose(table, *args)
        chosen_by.append(kernel.backend)
        return kernel

    tensors = [t.requires_grad_() for t in SAMPLES[name].tensors(torch.float32)]
    with use_backend(forward):
        in_thread, here = (reach(name, tensors).sum() for _ in range(2))
    monkeypatch.setattr(KernelTable, "choose", recorded)
    thread = threading.Thread(target=in_thread.backward)
    thread.start()
    thread.join()
    other = "torch" if forward == "cpu" else "cpu"
    with use_backend(other):
        here.backward()
        assert backends.forced() == other
    assert set(chosen_by) == {"cpu" if forward == "auto" else forward}
    assert all(t.grad is not None for t in tensors)


@pytest.mark.parametrize("name", FORWARD)
@pytest.mark.parametrize("backend", NAMES)
def test_a_forced_backend_serves_or_says_why_not(backend, name):
    sample = SAMPLES[name]
    have = [kernel.backend for kernel in REGISTRY[name].kernels.kernels]
    tensors = sample.tensors(torch.float32)
    with use_backend(backend):
        if backend in have and backend in ("cuda", "triton", "cupy"):
            with pytest.raises(
                BackendError, match=f"^backend '{backend}' cannot run this {name}: "
            ):
                sample.call(*tensors)
            return
        if backend in have:
            torch.testing.assert_close(sample.call(*tensors), sample.call_stock(*tensors))
            return
        message = f"^{name} has no backend '{backend}'; it has {', '.join(have)}$"
        if name in COMPOSED:  # its parts may have one
            message = f"backend '{backend}' cannot run this conv_relu: "
        with pytest.raises(BackendError, match=message):
            sample.call(*tensors)
        with pytest.raises(BackendError, match=message):
            sample.call(*(tensor.requires_grad_() for tensor in tensors))


def test_a_forced_backend_that_refuses_says_why():
    message = "^backend 'cpu' cannot run this max_pool: it takes .* and this tensor is torch.int32$"
    with use_backend("cpu"), pytest.raises(BackendError, match=message):
        ops.max_pool2d(X.int(), 3)


# --- the environment -----------------------------------------------------------------------------


def python(*arguments: str, **environment: str) -> str:
    """What a fresh interpreter prints."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("FASTALEX_")}
    package_parent = str(Path(fastalex.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, *arguments],
        env={**clean, "PYTHONPATH": package_parent, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


CHOICES = """
import threading, torch
from fastalex import explain, use_backend
x = torch.zeros(2, 8, 9, 9)
explain("lrn", x, 5)
with use_backend("auto"):
    explain("lrn", x, 5)
thread = threading.Thread(target=explain, args=("lrn", x, 5))
thread.start()
thread.join()
"""


def test_the_environment_forces_every_thread_until_lifted():
    told = python("-c", CHOICES, FASTALEX_BACKEND="torch").splitlines()
    headlines = [line for line in told if line.startswith("lrn: ")]
    forced = "lrn: runs on torch (forced)"
    assert headlines == [forced, "lrn: runs on cpu", forced]


def test_the_environment_may_say_auto():
    assert "runs on cpu\n" in python("-c", CHOICES, FASTALEX_BACKEND="auto")


@pytest.mark.parametrize("cap", _native.ISAS)
def test_the_environment_caps_the_instruction_set(cap):
    """The best that the machine has at or below the cap."""
    allowed = _native.ISAS[_native.ISAS.index(cap) :]
    best = next(isa for isa in _native.available_isas() if isa in allowed)
    report = python("-m", "fastalex", FASTALEX_CPU_ISA=cap)
    assert re.search(rf"^backend cpu +{best} kernels ", report, re.MULTILINE), report


# --- instruction sets are kept apart -------------------------------------------------------------


def shared_symbols(nm: str, folder: Path) -> list[str]:
    """Mangled names that the linker merges across files: weak, unique, or weak and undefined."""
    objects = map(str, sorted(folder.glob("*.o")))
    listing = subprocess.run(
        [nm, "--format=posix", *objects], capture_output=True, text=True, check=True
    ).stdout
    fields = (line.split() for line in listing.splitlines())
    return [entry[0] for entry in fields if len(entry) > 1 and entry[1] in "wWvVu"]


def is_of(isa: str, symbol: str) -> bool:
    """Whether the named entity, not merely an argument of it, lives in fastalex::cpu::<isa>.

    Asked of the mangled name: [Z]N[K] opens the name itself, after the mark of a vtable, type info or guard.
    """
    inside = rf"_Z(T[VTIS]|GV)?Z*NK?8fastalex3cpu{len(isa)}{isa}"
    return re.match(inside, symbol) is not None or symbol.startswith("DW.ref.")


@pytest.mark.parametrize("isa", _native.ISAS)
def test_nothing_compiled_for_one_instruction_set_can_stand_in_for_another(isa):
    """Of equal weak symbols the linker keeps one: AVX-512 code could end up in the portable path."""
    folder = ROOT / "build" / "native" / isa
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("there is no nm")
    if not list(folder.glob("*.o")):
        pytest.skip(
            f"there are no objects in {folder.relative_to(ROOT)}: the library was not built here"
        )
    symbols = shared_symbols(nm, folder)
    assert symbols, "nm lists templates of every object"
    strangers = sorted({symbol for symbol in symbols if not is_of(isa, symbol)})
    assert not strangers


@pytest.mark.parametrize(
    ("symbol", "inside"),
    [
        ("_ZN8fastalex3cpu4avx23runEv", True),
        ("_ZTIN8fastalex3cpu4avx210LrnForwardIdEE", True),
        ("_ZGVZN8fastalex3cpu4avx25tableEvE1t", True),
        ("_ZN8fastalex3cpu6avx5123runEv", False),
        ("_ZN8fastalex3cpu5roundEf", False),
        ("_ZNSt6vectorIN8fastalex3cpu4avx24PoolEE4pushEv", False),
        ("_ZSt3maxIfERKT_S2_S2_", False),
    ],
)
def test_the_symbol_check_sees_strangers(symbol, inside):
    assert is_of("avx2", symbol) is inside


def test_a_library_older_than_the_sources_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setattr(_native, "error", None)
    _cpu.native("from_tomorrow")
    assert re.search(r"no operator 'from_tomorrow'.*make build", str(_native.error))
