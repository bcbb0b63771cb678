"""An optimised model that is hooked, edited, trained or copied afterwards: nothing of it is ever stale."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import fastalex
from tests.support.optimized import (
    EXACT,
    Functional,
    Residual,
    chain,
    equal,
    image,
    pair,
    with_statistics,
)


@pytest.mark.parametrize("before", [True, False], ids=["hooked before", "hooked after"])
def test_feature_taps_see_the_stock_tensors(before):
    stock, fast = with_statistics(chain().double().eval()), None
    fast = copy.deepcopy(stock)
    if not before:
        fastalex.optimize(fast)
    seen: dict[int, dict[str, tuple]] = {0: {}, 1: {}}
    for which, model in enumerate((stock, fast)):
        for name, module in model.named_modules():
            module.register_forward_hook(
                lambda m, args, out, name=name, which=which: seen[which].update(
                    {name: (args[0].clone(), out.clone())}
                )
            )
    if before:
        fastalex.optimize(fast)
    x = image()
    equal(stock, fast, x)
    assert seen[0].keys() == seen[1].keys() == dict(stock.named_modules()).keys()
    for name, tensors in seen[0].items():
        # A ReLU in place has changed its input and its producer's output by the time both are compared.
        for expected, actual in zip(tensors, seen[1][name], strict=True):
            torch.testing.assert_close(actual, expected, **EXACT)
            assert actual.stride() == expected.stride() or not before


@pytest.mark.parametrize("kind", ["forward_pre", "backward", "backward_pre", "global"])
def test_other_hooks_run_as_on_stock(kind):
    stock, fast = pair(chain(), training=True)
    calls: dict[int, list[str]] = {0: [], 1: []}
    handles = []
    for which, model in enumerate((stock, fast)):
        for name, module in model.named_children():
            note = lambda *args, name=name, which=which: calls[which].append(name)  # noqa: E731
            if kind == "forward_pre":
                module.register_forward_pre_hook(note)
            elif kind == "backward" and not isinstance(module, nn.ReLU):
                module.register_full_backward_hook(note)
            elif kind == "backward_pre" and not isinstance(module, nn.ReLU):
                module.register_full_backward_pre_hook(note)
    if kind == "global":
        which = {id(m): w for w, model in enumerate((stock, fast)) for m in model.modules()}
        handles.append(
            nn.modules.module.register_module_forward_hook(
                lambda m, *args: calls[which[id(m)]].append(type(m).__name__)
            )
        )
    if kind.startswith("backward"):  # hooks on a backward pass don't go with layers in place
        for model in (stock, fast):
            for module in model.modules():
                if isinstance(module, nn.ReLU):
                    module.inplace = False
    try:
        x = image()
        for model in (stock, fast):
            model(x).sum().backward()
    finally:
        for handle in handles:
            handle.remove()
    assert calls[0] == calls[1]
    assert calls[0]


def test_a_replaced_layer_is_the_one_that_runs():
    stock, fast = pair(chain())
    for model in (stock, fast):
        torch.manual_seed(1)
        model[14] = nn.Linear(16, 7).double()
        model[1] = nn.Tanh()
        model[3] = nn.AvgPool2d(3, 2)
    equal(stock, fast, image())


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.append(nn.Softmax(dim=1)),
        lambda m: m.insert(0, nn.Tanh()),
        lambda m: m.__delitem__(2),
        lambda m: setattr(m, "forward", lambda x: x),
    ],
    ids=["append", "insert", "delete", "forward"],
)
def test_structural_changes_take_effect(change):
    stock, fast = pair(chain())
    for model in (stock, fast):
        change(model)
    equal(stock, fast, image())


def test_slices_and_layers_are_stock():
    stock, fast = pair(chain())
    assert type(fast[:3]) is nn.Sequential
    equal(stock[:3], fast[:3], image())
    equal(stock[0], fast[0], image())


def test_a_changed_attribute_takes_effect():
    class Switch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.relu, self.twice = nn.Conv2d(3, 4, 3), nn.ReLU(), False
            self.extra: nn.Module | None = None

        def forward(self, x):
            x = self.relu(self.conv(x))
            if self.extra is not None:
                x = self.extra(x)
            return x * 2 if self.twice else x

    for change in (
        lambda m: setattr(m, "twice", True),
        lambda m: setattr(m, "extra", nn.Tanh()),
        lambda m: setattr(m, "relu", nn.Tanh()),
    ):
        stock, fast = pair(Switch())
        for model in (stock, fast):
            change(model)
        equal(stock, fast, image())
    stock, fast = pair(Switch())
    fast.twice = False
    assert type(fast) is not Switch, "the same value changes nothing"


def test_arguments_with_defaults():
    stock, fast = pair(Functional())
    x = image()[:, :, :13, :13]
    equal(stock, fast, x)
    equal(stock, fast, x, 2.0)
    equal(stock, fast, x, scale=3.0)


def bump_version(model):
    with torch.no_grad():
        model.bn1.running_var.mul_(2)
        model.conv1.weight.add_(0.1)


def load(model):
    torch.manual_seed(7)
    model.load_state_dict(
        {k: torch.rand_like(v.double()).to(v) for k, v in model.state_dict().items()}
    )


def train_and_return(model):
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.manual_seed(8)
    for _ in range(2):
        x = torch.randn(4, 8, 5, 5, dtype=torch.float64).to(model.conv1.weight)
        model(x).square().mean().backward()
        optimizer.step()
    model.eval()


def write_data(model):
    model.conv1.weight.data.mul_(1.5)
    model.bn1.weight.data.fill_(0.7)
    model.bn1.running_mean.data[3] = 4.0
    model.bn2.bias.data = model.bn2.bias.data + 1


def write_one_element(model):
    model.conv1.weight.data[1, 2, 0, 1] = 5.0


def swap_parameters(model):
    model.conv1.weight = nn.Parameter(torch.ones_like(model.conv1.weight))
    model.bn1.running_mean = torch.ones_like(model.bn1.running_mean)
    model.bn2.eps = 0.5


def freeze_and_unfreeze(model):
    model.bn1.train()
    model(torch.ones(2, 8, 5, 5).to(model.conv1.weight))
    model.bn1.eval()


@pytest.mark.parametrize(
    "change",
    [
        bump_version,
        load,
        train_and_return,
        write_data,
        write_one_element,
        swap_parameters,
        freeze_and_unfreeze,
    ],
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_folded_weights_follow_every_change(change, grad, dtype):
    stock, fast = (model.to(dtype) for model in pair(Residual()))
    x = torch.randn(2, 8, 6, 6, dtype=dtype)
    # Three convolutions of 72 terms of order one, or one rounding of bfloat16 each, on values up to 50.
    close = {torch.float64: EXACT, torch.float32: {"rtol": 1e-4, "atol": 1e-3}}.get(
        dtype, {"rtol": 0.05, "atol": 1.0}
    )

    def check():
        torch.testing.assert_close(fast(x), stock(x), **close)

    with torch.set_grad_enabled(grad):
        check()
        for model in (stock, fast):
            with torch.enable_grad():
                change(model)
        check()


@torch.no_grad()
def test_the_engine_folds_and_adds_as_float64_does():
    """conv2d(x, w g) + b, with and without ReLU, groups, strides, either layout; the gain by output channel."""
    for groups, stride, kernel, relu in ((1, 1, 3, True), (2, 2, 3, False), (4, 1, 1, False)):
        conv = nn.Conv2d(16, 24, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
        norm = nn.BatchNorm2d(24)
        model = with_statistics(
            nn.Sequential(conv, norm, nn.ReLU() if relu else nn.Identity()).eval()
        )
        fast = copy.deepcopy(model)
        fastalex.optimize(fast)
        x = torch.randn(3, 16, 14, 15)
        for format in (torch.contiguous_format, torch.channels_last):
            out = fast(x.contiguous(memory_format=format))
            expected = copy.deepcopy(model).double()(x.double())
            error = (out.double() - expected).norm() / expected.norm()
            assert error <= 1e-5, "set_conv_precision promises it"
            x[0, 0, 5, 5] = torch.nan  # stays where it is
            assert torch.equal(fast(x).isnan(), model(x).isnan())
            x[0, 0, 5, 5] = 0.0


@torch.no_grad()
def test_copies_and_pickles_are_optimised_and_independent():
    stock, fast = pair(Residual())
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64)
    fast(x)
    file = io.BytesIO()
    torch.save(fast, file)
    file.seek(0)
    copies = [
        copy.deepcopy(fast),
        pickle.loads(pickle.dumps(fast)),
        torch.load(file, weights_only=False),
    ]
    for other in copies:
        assert type(other).__mro__[1] is Residual
        equal(stock, other, x)
        other.conv1.weight.mul_(2)
        other.bn1.running_mean.add_(1)
        expected = copy.deepcopy(stock)
        expected.load_state_dict(other.state_dict())
        equal(expected, other, x)
        equal(stock, fast, x)
