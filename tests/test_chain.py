"""Layers whose maps nobody else sees: their gradients, of every order, are those of the layers in turn."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastalex
from fastalex import ops
from fastalex.ops import _chain
from fastalex.ops._operator import gradients_may_follow
from tests.support.samples import distinct


@pytest.fixture(autouse=True)
def every_chain_pays(monkeypatch):
    """Chains are for GPUs; here they run on any backend, which masks nothing itself."""
    monkeypatch.setattr(_chain, "pays", lambda input, rest: gradients_may_follow(input, *rest))


def layers(dtype):
    torch.manual_seed(0)
    return [
        layer.to(dtype)
        for layer in (
            ops.Conv2dReLU(4, 6, 3, padding=1),
            ops.Conv2dReLU(6, 6, 3, padding=1, groups=2, bias=False),
            nn.Identity(),
            ops.LRNMaxPool2d(3, 0.3, 0.75, 2.0, groups=2),
            ops.Conv2dReLU(6, 4, 1),
            ops.MaxPool2d(2, 1),
            ops.Conv2dReLU(4, 3, 1),
            ops.Conv2dReLU(3, 3, 1),
        )
    ]


def found(model, x, frozen=()):
    model.zero_grad()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    y = model(x)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y))
    return [y, x.grad, *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("frozen", [(), ("0.weight", "0.bias"), ("1.weight", "4.bias")], ids=str)
@pytest.mark.parametrize("wants_input", [True, False])
def test_gradients_are_those_of_the_layers_in_turn(backend, frozen, wants_input):
    parts = layers(torch.float32)
    x = torch.randn(2, 4, 7, 7)
    results = []
    for model in (ops.FusedSequential(*parts), nn.Sequential(*parts)):
        with fastalex.use_backend(backend):
            results.append(found(model, x.clone().requires_grad_(wants_input), frozen))
    for ours, each in zip(*results, strict=True):
        assert (ours is None) == (each is None)
        assert ours is None or torch.equal(ours, each)


def test_chains_are_taken():
    y = ops.FusedSequential(*layers(torch.float32))(torch.randn(1, 4, 7, 7))
    names = []
    node = y.grad_fn
    while node is not None and "Accumulate" not in node.name():
        names.append(node.name())
        node = next((n for n, _ in node.next_functions if n), None)
    assert names == ["_ChainBackward"] * 3


def test_second_derivatives():
    torch.manual_seed(0)
    model = ops.FusedSequential(
        ops.Conv2dReLU(2, 4, 2).double(), ops.Conv2dReLU(4, 4, 1).double(), ops.LRNMaxPool2d(3, 0.3)
    )
    x = distinct((1, 2, 5, 5), torch.float64).requires_grad_()
    weights = dict(model.named_parameters())

    def call(x, *parameters):
        return torch.func.functional_call(model, dict(zip(weights, parameters, strict=True)), x)

    tensors = (x, *weights.values())
    assert torch.autograd.gradcheck(call, tensors)
    assert torch.autograd.gradgradcheck(call, tensors)


def test_gradients_run_where_the_chain_was_forced():
    """In another thread, as CUDA's do: `torch` differs from `cpu` in the last bits."""
    parts = layers(torch.float32)
    x, results = torch.randn(2, 4, 7, 7), []
    for in_thread in (False, True):
        leaf = x.clone().requires_grad_()
        with fastalex.use_backend("torch"):
            loss = ops.FusedSequential(*parts)(leaf).sum()
            if not in_thread:
                loss.backward()
        if in_thread:
            thread = threading.Thread(target=loss.backward)
            thread.start()
            thread.join()
        results.append(leaf.grad)
    assert torch.equal(*results)


def test_checkpoints_make_the_maps_anew():
    parts, x = layers(torch.float32), torch.randn(1, 4, 7, 7)
    model = ops.FusedSequential(*parts)

    def checkpointed(x):
        return checkpoint(model, x, use_reentrant=False)

    checkpointed.zero_grad = model.zero_grad
    checkpointed.named_parameters = model.named_parameters
    checkpointed.parameters = model.parameters
    expected = found(model, x.clone().requires_grad_())
    for ours, each in zip(found(checkpointed, x.clone().requires_grad_()), expected, strict=True):
        assert torch.equal(ours, each)


def test_a_changed_parameter_is_noticed():
    parts = layers(torch.float32)
    y = ops.FusedSequential(*parts)(torch.randn(1, 4, 7, 7))
    with torch.no_grad():
        parts[1].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_wrong_shapes_are_named_by_the_layers_function():
    with pytest.raises(ValueError, match="conv2d_relu: input has 6 channels"):
        ops.FusedSequential(ops.Conv2dReLU(4, 6, 1), ops.Conv2dReLU(4, 6, 1))(
            torch.randn(1, 4, 3, 3)
        )
    with pytest.raises(ValueError, match="max_pool2d"):
        ops.FusedSequential(ops.Conv2dReLU(4, 6, 1), ops.MaxPool2d(9))(torch.randn(1, 4, 3, 3))
