"""The measured choice: who is trusted, who wins, what is remembered, and what a damaged memory does; needs no GPU."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from fastalex.kernels._configs import ConvTile, Launch
from torch import nn

import fastalex
from fastalex import _cupy, _tuning, ops
from fastalex._explain import explanation
from fastalex._tuning import Choice
from fastalex.backends import KernelTable
from fastalex.ops._operator import REGISTRY

SLOW, FAST, WRONG, BROKEN, BLIND = (Launch(64 * i, i) for i in range(1, 6))
TIMES = {SLOW: 2.0, FAST: 1.0, WRONG: 0.5, BLIND: 0.1}
ANSWER = Choice("triton", {"launch": FAST})


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A memory of its own, and calls on the CPU measured as on a GPU."""
    monkeypatch.setenv("FASTALEX_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(_tuning, "DEVICES", {"cpu"})
    _tuning.forget()
    yield tmp_path
    _tuning.forget()


ran: list[Launch | str] = []


def double(x, *, launch):
    """What the candidates compute: two of them wrongly."""
    ran.append(launch)
    if launch == BROKEN:
        raise RuntimeError("out of resource: shared memory")
    y = x * 2
    if launch == WRONG:
        y[-1, -1] += 0.5
    return y.fill_(math.nan) if launch == BLIND else y


def stock(x):
    ran.append("stock")
    return x * 2


def table(configs=(SLOW, FAST, WRONG, BROKEN, BLIND)):
    kernels = KernelTable("double")
    kernels.add("torch", stock, lambda *args: None)
    kernels.add("triton", double, lambda *args: None, candidates=lambda x: {"launch": configs})
    return kernels


def timer(of_stock):
    def time(run):
        run()
        return TIMES.get(ran[-1], of_stock)

    return time


X = torch.randn(5, 3)


def test_the_fastest_right_candidate_is_remembered_across_processes():
    trials = _tuning.measure(table(), (X,), timer(9.0))
    assert [t.milliseconds for t in trials] == [9.0, 2.0, 1.0, math.inf, math.inf, math.inf]
    assert "off by 0.5" in trials[3].refusal
    assert "shared memory" in trials[4].refusal
    assert "off by inf" in trials[5].refusal
    for _ in range(2):  # in this process, then from the file
        assert _tuning.recorded("double", (X,)) == ANSWER
        assert _tuning.options("double", "triton", (X,)) == {"launch": FAST}
        assert _tuning.recorded("double", (X.t(),)) is None
        assert _tuning.recorded("double", (X.half(),)) is None
        assert _tuning.recorded("halve", (X,)) is None
        _tuning.forget()


def test_stock_wins_where_it_is_faster():
    kernels = table()
    assert kernels.choose(X).backend == "triton"  # the prior
    _tuning.measure(kernels, (X,), timer(0.9))
    assert _tuning.recorded("double", (X,)) == Choice("torch")
    assert kernels.choose(X).backend == "torch"
    assert "no: torch was measured faster" in kernels.explain(X)
    with fastalex.use_backend("triton"):
        assert kernels.choose(X).backend == "triton"


def test_a_contested_kernel_waits_for_its_measurement():
    kernels = KernelTable("double")
    kernels.add("torch", stock, lambda *args: None)
    kernels.add(
        "triton",
        double,
        lambda *args: None,
        candidates=lambda x: {"launch": (FAST,)},
        contested=True,
    )
    assert kernels.choose(X).backend == "torch"
    assert "not measured against cuDNN yet" in kernels.explain(X)
    _tuning.settle(kernels, (X,))
    assert _tuning.recorded("double", (X,)) is not None
    count = len(ran)
    _tuning.settle(kernels, (X,))
    assert len(ran) == count


def test_the_inputs_are_random_laid_out_alike_and_the_users_random_state_is_kept():
    x = torch.zeros(4, 6, 8)[:, ::2].transpose(0, 2)
    before = torch.get_rng_state()
    fresh, number = _tuning.random_arguments((x, 3))
    assert torch.equal(torch.get_rng_state(), before)
    assert (fresh.shape, fresh.stride(), fresh.dtype) == (x.shape, x.stride(), x.dtype)
    assert number == 3
    assert fresh.std() > 0.5
    (expanded,) = _tuning.random_arguments((torch.zeros(1, 3).expand(5, 3),))
    assert expanded.stride() == (0, 1)


def test_a_call_that_cannot_be_measured_still_runs_and_is_not_tried_again(recwarn):
    def fails(x):
        raise torch.OutOfMemoryError("no memory for float64")

    kernels = KernelTable("double")
    kernels.add("triton", fails, lambda *args: None)
    kernels.add("torch", fails, lambda *args: None)
    _tuning.settle(kernels, (X,))
    _tuning.settle(kernels, (X,))
    assert len([w for w in recwarn if "not measured" in str(w.message)]) == 1


def test_nothing_is_measured_when_told_so(monkeypatch):
    monkeypatch.setenv("FASTALEX_TUNE", "0")
    count = len(ran)
    _tuning.settle(table(), (X,))
    assert len(ran) == count
    assert _tuning.recorded("double", (X,)) is None


@pytest.mark.parametrize("op", ["max_pool", "lrn_max_pool"])
def test_offsets_are_judged_by_what_they_point_at(op):
    args = (torch.randn(1, 6, 7, 7),)
    args += (5, 0.3, 0.75, 2.0, 2) if op == "lrn_max_pool" else ()
    args += ((3, 3), (2, 2), (1, 1)) + ((1, 1),) * (op == "max_pool") + (False, True)
    reference = next(k for k in REGISTRY[op].kernels.kernels if k.backend == "torch").run
    judge = _tuning.Judge(op, reference, args)
    y, offsets = reference(*args)
    assert judge.refusal((y, offsets)) is None
    offsets[0, 0, 2, 2] = (offsets[0, 0, 2, 2] + 1) % 9
    assert "off by" in judge.refusal((y, offsets))


@pytest.mark.parametrize(
    "changed", ["conv_choice.h", "lrn.cuh", "conv_relu.cu", "planner/planner.cpp"]
)
def test_a_choice_is_forgotten_when_a_cuda_source_changes(changed, tmp_path_factory, monkeypatch):
    """Which no Python file shows: tiles, kernels, launchers and the planner."""
    folder = tmp_path_factory.mktemp("sources") / "cuda"
    shutil.copytree(_cupy.kernel_folder(), folder)
    monkeypatch.setattr(_cupy, "kernel_folder", lambda: folder)

    def new_process():
        _tuning.environment.cache_clear()
        _tuning.forget()

    new_process()
    _tuning.record("double", (X,), ANSWER)
    new_process()
    assert _tuning.recorded("double", (X,)) == ANSWER
    (folder / changed).write_text((folder / changed).read_text() + "// changed")
    new_process()
    assert _tuning.recorded("double", (X,)) is None
    monkeypatch.undo()
    _tuning.environment.cache_clear()


def test_what_is_hashed_holds_every_backend_and_nothing_of_others():
    names = {path.name for path in _tuning.sources()}
    assert {"_tuning.py", "_configs.py", "conv_math.cuh", "conv_plan.h"} <= names
    assert [name for name in names if name.startswith("_cuda_plan.")]  # what was built, too
    assert not [name for name in names if name.startswith("_cpu.") and name.endswith(".so")]


# --- the file --------------------------------------------------------------------------------------


def test_entries_of_other_processes_are_kept(folder):
    theirs = {"theirs": Choice("triton", {"tile": ConvTile(128, 64, 32, 32, 8, 3, 2)})}
    _tuning.memory()
    _tuning.save(_tuning.cache_file(), theirs)
    _tuning.record("double", (X,), ANSWER)
    assert theirs.items() <= _tuning.load(_tuning.cache_file()).items()
    assert [path.name for path in folder.iterdir()] == ["tuning.json"]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        '{"version": 2}',
        '{"version": 2, "entries": {"a": ["triton", {"launch": ["Launch", {"threads": 1}]}]}}',
        '{"version": 2, "entries": {"a": ["triton", {"launch": ["os.system", {}]}]}}',
        '{"version": 2, "entries": {"a": ["triton"]}}',
    ],
)
def test_a_damaged_file_is_ignored_with_a_warning_and_replaced(content):
    _tuning.cache_file().write_text(content)
    with pytest.warns(UserWarning, match="ignored"):
        assert _tuning.recorded("double", (X,)) is None
    with pytest.warns(UserWarning, match="ignored"):
        _tuning.record("double", (X,), ANSWER)
    assert len(json.loads(_tuning.cache_file().read_text())["entries"]) == 1


def test_another_version_is_not_read():
    _tuning.cache_file().write_text('{"version": 1, "entries": {"a": ["triton", {}]}}')
    assert _tuning.load(_tuning.cache_file()) == {}


def test_a_failed_write_leaves_the_old_file_and_nothing_else(folder, monkeypatch):
    _tuning.save(_tuning.cache_file(), {"a": ANSWER})

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        _tuning.save(_tuning.cache_file(), {})
    assert _tuning.load(_tuning.cache_file()) == {"a": ANSWER}
    assert [path.name for path in folder.iterdir()] == ["tuning.json"]


# --- a whole model ---------------------------------------------------------------------------------


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = ops.Conv2dReLU(4, 8, 3)
        self.again = ops.Conv2dReLU(4, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.5)
        self.pool = ops.LRNMaxPool2d(5, kernel_size=3, stride=2)

    def forward(self, x):
        return self.pool(self.drop(self.norm(self.conv(x) + self.again(x))))


def test_tune_measures_each_distinct_call_once_and_changes_nothing(monkeypatch):
    monkeypatch.setattr(_tuning, "milliseconds", lambda run: (run(), 1.0)[1])
    model, x = Small().train(), torch.randn(2, 4, 9, 9)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    found = fastalex.tune(model, x, progress=False)
    assert sorted(line.call.split()[0] for line in found) == [
        "conv_relu",
        "conv_relu_backward",
        "lrn_max_pool",
        "lrn_max_pool_backward",
    ]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert fastalex.tune(model, x, progress=False) == []
    inference = fastalex.tune(model.eval(), (x,))
    assert [line.call.split()[0] for line in inference] == ["lrn_max_pool"]  # saves no offsets


def test_tune_leaves_other_devices_alone(monkeypatch):
    monkeypatch.setattr(_tuning, "DEVICES", {"cuda"})
    assert fastalex.tune(Small().eval(), torch.randn(2, 4, 9, 9)) == []


def test_explain_says_which_configuration_won(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(_tuning, "DEVICES", {"cuda"})
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x = torch.empty(2, 8, 9, 9, device="cuda", dtype=torch.float16)
        w = torch.empty(4, 8, 3, 3, device="cuda", dtype=torch.float16)
    assert "(expected best of" in explanation("conv_relu", x, w)
    args = (x, w, None, (1, 1), (0, 0), (1, 1), 1)
    _tuning.record("conv_relu", args, Choice("triton", {"tile": ConvTile(64, 32, 0, 64, 4, 3)}))
    text = explanation("conv_relu", x, w)
    assert text.startswith("conv_relu: runs on triton\n")
    assert "64x32x64, 4 warps, 3 stages (measured fastest)" in text
