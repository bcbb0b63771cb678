"""The public operators on the backend `triton`, in Triton's interpreter: the kernels' own results reach the caller."""

from __future__ import annotations

import os

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fastalex
from fastalex import _tuning, ops
from fastalex._tune import _Visit
from fastalex.ops._operator import REGISTRY

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip(
        "set TRITON_INTERPRET=1: Triton decides when it is imported", allow_module_level=True
    )
pytest.importorskip("triton")

CALLS = {
    "conv_relu": lambda x, w: ops.conv2d_relu(x, w, None, 2, 1),
    "linear_relu": lambda x, w: ops.linear_relu(x.flatten(1)[:, :9], w.flatten(0, 1).flatten(1)),
    "lrn": lambda x, w: ops.local_response_norm(x, 5, groups=2),
    "max_pool": lambda x, w: ops.max_pool2d(x, 3, 2),
    "lrn_max_pool": lambda x, w: ops.lrn_max_pool2d(x, 5, groups=2),
}


def described(results):
    tensors = (results,) if isinstance(results, torch.Tensor) else results
    return [(t.shape, t.dtype, t.stride()) for t in tensors]


@pytest.fixture
def calls(monkeypatch):
    """Counts what runs on the backend, and checks each result against what tracing is promised."""
    counts: dict[str, int] = {}
    for name, operator in REGISTRY.items():
        kernel = next((k for k in operator.kernels.kernels if k.backend == "triton"), None)
        if kernel is None:  # of convolution, LRN and pool: its parts run
            continue

        def run(*args, name=name, operator=operator, original=kernel.run):
            counts[name] = counts.get(name, 0) + 1
            results = original(*args)
            with FakeTensorMode(allow_non_fake_inputs=True):
                promised = operator.dispatch(*args)
            assert described(results) == described(promised)
            return results

        monkeypatch.setitem(kernel.__dict__, "run", run)
    return counts


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("op", CALLS)
def test_forward_and_backward_agree_with_torch(calls, op, order):
    x = torch.randn(2, 8, 7, 7).contiguous(memory_format=order)
    w = torch.randn(8, 8, 3, 3).contiguous(memory_format=order)
    found = {}
    for backend in ("torch", "triton"):
        inputs = [t.detach().clone().requires_grad_() for t in (x, w)]
        with fastalex.use_backend(backend):
            output = CALLS[op](*inputs)
            wanted = inputs if op == "conv_relu" else inputs[:1]
            gradients = torch.autograd.grad(output, wanted, torch.ones_like(output))
        found[backend] = output, *gradients
    assert calls == {op: 1, f"{op}_backward": 1}
    for ours, stock in zip(found["triton"], found["torch"], strict=True):
        torch.testing.assert_close(ours, stock)
        assert ours.stride() == stock.stride()


def test_every_operator_is_measured_with_each_configuration(monkeypatch, tmp_path):
    """The kernels' own results are judged: all are trusted, and what a planted timer likes best runs next."""
    monkeypatch.setenv("FASTALEX_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(_tuning, "DEVICES", {"cpu"})
    _tuning.forget()
    x = torch.randn(1, 4, 5, 5).contiguous(memory_format=torch.channels_last)
    w = torch.randn(4, 4, 3, 3)
    taken = []
    for call in CALLS.values():
        inputs = [t.clone().requires_grad_() for t in (x, w)]
        with _Visit(lambda op, args: taken.append((REGISTRY[op].kernels, args))):
            torch.autograd.grad(call(*inputs).sum(), inputs, allow_unused=True)
    clock = map(float, range(1000, 0, -1))  # each next one is faster
    expected = [name for name in REGISTRY if name.removesuffix("_backward") in CALLS]
    assert sorted(table.op for table, _ in taken) == sorted(expected)
    for table, args in taken:
        trials = _tuning.measure(table, args, lambda run: next(clock))
        ours = [trial for trial in trials if trial.choice.backend == "triton"]
        (kernel,) = (k for k in table.kernels if k.backend == "triton")
        assert len(ours) == max(sum(map(len, kernel.candidates(*args).values())), 1)
        assert not [trial.refusal for trial in ours if trial.refusal]
        choice = _tuning.recorded(table.op, args)
        assert choice == ours[-1].choice
        assert table.choose(*args).backend == "triton"
    _tuning.forget()
