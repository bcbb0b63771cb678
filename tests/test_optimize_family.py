"""fastalex's own networks in their stock form are traced from image to logits, and change layouts once."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

import fastalex
from fastalex import models
from fastalex._optimize import steps
from fastalex.ops import _cpu_conv
from tests.support import optimized

NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "googlenet": (lambda: models.GoogLeNet(7, fused=False), 224),
    "caffenet": (lambda: models.alexnet("caffenet", num_classes=7, hidden=16, fused=False), 224),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_is_one_island_and_checks_its_images(monkeypatch, name):
    entered: list[tuple[int, ...]] = []
    enter = steps.enter
    monkeypatch.setattr(steps, "enter", lambda x: entered.append(tuple(x.shape)) or enter(x))
    build, side = NETWORKS[name]
    stock = build().eval()
    fast = copy.deepcopy(stock)
    report = fastalex.optimize(fast)
    assert not [entry for entry in report.kept if entry.where == "(model)"]
    x = torch.randn(1, 3, side, side)
    with torch.no_grad():
        expected, actual = stock(x), fast(x)
        assert entered == [(1, 3, side, side)]
        # At most 1e-5 a convolution, the precision "high"; less is left of it behind each ReLU.
        assert (actual - expected).norm() <= 1e-4 * expected.norm()
        for wrong in (x[:, :, 1:], x[:, :1], x[0]):
            with pytest.raises(ValueError, match=r"takes \[N, 3, "):
                fast(wrong)


def test_auxiliary_heads_train():
    stock = models.GoogLeNet(5, fused=False, dropout=0.0, auxiliary_dropout=0.0).train()
    fast = copy.deepcopy(stock)
    fastalex.optimize(fast)
    x = torch.randn(1, 3, 224, 224)
    gradients = []
    for model in (stock, fast):
        outputs = model(x)
        assert type(outputs) is models.GoogLeNetOutputs
        sum(output.square().sum() for output in outputs).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert (gradients[1] - gradients[0]).norm() <= 1e-3 * gradients[0].norm()


def test_a_program_of_such_a_network_survives_a_copy():
    stock = models.alexnet("caffenet", num_classes=7, hidden=16, fused=False).eval().double()
    fast = copy.deepcopy(stock)
    fastalex.optimize(fast)
    x = torch.randn(1, 3, 227, 227, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(copy.deepcopy(fast)(x), stock(x), **optimized.EXACT)


@pytest.mark.parametrize(("channels", "groups", "ours"), [(16, 16, 0), (16, 4, 0), (32, 2, 1)])
def test_narrow_groups_stay_with_torch(monkeypatch, channels, groups, ours):
    """The engine takes up to 30 times torch's time for a depthwise convolution."""
    calls: list[object] = []
    run = _cpu_conv.inference
    monkeypatch.setattr(_cpu_conv, "inference", lambda *args: calls.append(args) or run(*args))
    layers = (nn.Conv2d(channels, channels, 3, groups=groups), nn.BatchNorm2d(channels), nn.ReLU())
    stock = optimized.with_statistics(nn.Sequential(*layers).eval())
    fast = copy.deepcopy(stock)
    assert fastalex.optimize(fast).replaced[0].step == "convolution"
    x = torch.randn(2, channels, 9, 9)
    with torch.no_grad():
        expected, actual = stock(x), fast(x)
    assert len(calls) == ours
    # One convolution, within the precision "high".
    assert (actual - expected).norm() <= 1e-5 * expected.norm()
    for model in (stock, fast):
        model(x).square().sum().backward()
    for a, b in zip(stock.parameters(), fast.parameters(), strict=True):
        assert (b.grad - a.grad).norm() <= 1e-4 * a.grad.norm().clamp(min=1)
