"""Packed weights of convolutions are never stale, whoever changes the weight, and go when it goes."""

from __future__ import annotations

import copy
import gc
import threading

import pytest
import torch
import torch.nn.functional as F

import fastalex
from fastalex import ops
from tests.support import bounds
from tests.support.cases import conv_layer


def assert_current(layer, x):
    """Asserts that the layer computes what its present weights say, in each mode, with its gradient."""
    weight, bias = layer.weight.detach().double(), layer.bias.detach().double()
    expected = F.relu(F.conv2d(x.double(), weight, bias, padding=1))
    with fastalex.use_backend("cpu"), torch.no_grad():
        bounds.assert_precision(layer(x), expected, "high")
    if torch.is_inference_mode_enabled():
        return
    leaf = x.detach().clone().requires_grad_()
    with fastalex.use_backend("cpu"):
        y = layer(leaf)
        bounds.assert_precision(y.detach(), expected, "high")
        (grad,) = torch.autograd.grad(y.sum(), leaf)
    mask = (y.detach() > 0).double()
    bounds.assert_precision(
        grad, torch.nn.grad.conv2d_input(x.shape, weight, mask, padding=1), "high"
    )


def double_in_place(layer, x):
    with torch.no_grad():
        layer.weight.mul_(2)


def write_through_a_view(layer, x):
    with torch.no_grad():
        layer.weight[3].fill_(0.5)


def replace_data(layer, x):
    layer.weight.data = torch.randn_like(layer.weight)


def optimiser_step(layer, x):
    layer(x).sum().backward()
    torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9).step()


def fused_optimiser_step(layer, x):
    layer(x).sum().backward()
    torch.optim.SGD(layer.parameters(), lr=0.1, fused=True).step()


def load_state_dict(layer, x):
    layer.load_state_dict(conv_layer()[0].state_dict())


def assign_state_dict(layer, x):
    layer.load_state_dict(conv_layer()[0].state_dict(), assign=True)


def new_parameter(layer, x):
    layer.weight = torch.nn.Parameter(torch.randn_like(layer.weight))


# What leaves the version counter as it was.
def write_through_data(layer, x):
    layer.weight.data.mul_(2)


def write_one_element_through_data(layer, x):
    layer.weight.data[17, 5, 2, 1] += 100


def swap_two_elements_through_numpy(layer, x):
    values = layer.weight.detach().numpy()
    values[3, 1, 0, 0], values[9, 2, 1, 1] = values[9, 2, 1, 1] + 1, values[3, 1, 0, 0] - 1


def write_from_another_thread(layer, x):
    thread = threading.Thread(target=write_through_data, args=(layer, x))
    thread.start()
    thread.join()


def change_the_layout(layer, x):
    layer.to(memory_format=torch.channels_last)


UNSEEN_BY_THE_VERSION = [
    write_through_data,
    write_one_element_through_data,
    swap_two_elements_through_numpy,
    write_from_another_thread,
]


@pytest.mark.parametrize(
    "change",
    [
        double_in_place,
        write_through_a_view,
        replace_data,
        optimiser_step,
        fused_optimiser_step,
        load_state_dict,
        assign_state_dict,
        new_parameter,
        change_the_layout,
        *UNSEEN_BY_THE_VERSION,
    ],
)
def test_packed_weights_follow_the_weight(change):
    layer, x = conv_layer()
    assert_current(layer, x)
    change(layer, x)
    assert_current(layer, x)
    change(layer, x)
    change(layer, x)
    assert_current(layer, x)


def test_packed_weights_follow_the_geometry():
    layer, x = conv_layer()
    for size in (20, 24, 20):
        assert_current(layer, torch.randn(2, 16, size, size))
    assert_current(layer, x.contiguous(memory_format=torch.channels_last))


def test_packed_gradients_follow_stride_and_padding():
    """The taps of each phase of a strided input gradient move with the padding, their number does not."""
    weight = torch.randn(24, 16, 2, 2)
    for padding in (0, 1, 0):
        x = torch.randn(2, 16, 12, 12, requires_grad=True)
        with fastalex.use_backend("cpu"):
            y = ops.conv2d_relu(x, weight, stride=2, padding=padding)
            (grad,) = torch.autograd.grad(y.sum(), x)
        mask, wide = (y.detach() > 0).double(), weight.double()
        right = torch.nn.grad.conv2d_input(x.shape, wide, mask, stride=2, padding=padding)
        bounds.assert_precision(grad, right, "high")


def test_packed_weights_under_inference_mode():
    layer, x = conv_layer()
    with torch.inference_mode():
        assert_current(layer, x)
        frozen = copy.deepcopy(layer)
        assert_current(frozen, x)
        frozen.weight.mul_(2)
        assert_current(frozen, x)


def test_a_deep_copy_packs_its_own():
    layer, x = conv_layer()
    assert_current(layer, x)
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        twin.weight.neg_()
    assert_current(twin, x)
    assert_current(layer, x)


def test_packed_weights_go_with_the_weight():
    gc.collect()
    before = torch.ops.fastalex_cpu.packed_bytes()
    layer, x = conv_layer()
    assert_current(layer, x)
    held = torch.ops.fastalex_cpu.packed_bytes()
    assert held > before
    layer.weight.data = layer.weight.data.clone()  # the first data's packed forms go
    assert_current(layer, x)
    assert torch.ops.fastalex_cpu.packed_bytes() == held
    del layer
    gc.collect()
    assert torch.ops.fastalex_cpu.packed_bytes() == before


def test_unchanged_weights_are_packed_once():
    """The bytes stay where they are, so a second call finds what the first packed."""
    layer, x = conv_layer()
    assert_current(layer, x)
    held = torch.ops.fastalex_cpu.packed_bytes()
    for _ in range(3):
        assert_current(layer, x)
    assert torch.ops.fastalex_cpu.packed_bytes() == held


def test_calls_from_many_threads_with_a_weight_that_changes():
    """Every result is that of one of the weights the call could have met, never a mixture."""
    layers = [conv_layer()[0].eval() for _ in range(3)]
    x = torch.randn(1, 16, 20, 20)
    with torch.no_grad():
        expected = [layer(x) for layer in layers]
        shared = torch.nn.Parameter(layers[0].weight.detach().clone())
        wrong = []

        def work(number):
            torch.set_num_threads(1 + number % 2)
            mine = copy.deepcopy(layers[number % 3])
            for turn in range(30):
                if number == 0:  # replaced, so that a reader holds the old or the new one whole
                    shared.data = layers[turn % 3].weight.detach().clone()
                y = mine(x)
                if not torch.equal(y, expected[number % 3]):
                    wrong.append(number)
                now = shared.detach()
                z = ops.conv2d_relu(x, now, layers[0].bias, padding=1)
                if not torch.equal(z, ops.conv2d_relu(x, now.clone(), layers[0].bias, padding=1)):
                    wrong.append(number)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong
