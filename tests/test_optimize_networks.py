"""Optimised torchvision networks equal stock: exactly in float64, within float32's error in float32; also exported."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision import models

import fastalex
from benchmarks import bench_zoo
from fastalex.models import alexnet
from tests.support import optimized


def resnet(block: type[nn.Module], **width: int) -> nn.Module:
    """Two stages of a block each, one of them with a projection."""
    net = models.ResNet(block, [1, 1, 1, 1], **width)
    net.layer3, net.layer4 = nn.Identity(), nn.Identity()
    net.fc = nn.Linear(128 * block.expansion, 10)
    return net


#: The blocks of the family in networks of a few layers, and the side of their images.
SMALL: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "squeezenet": (
        lambda: nn.Sequential(
            *models.squeezenet1_1().features[:5], nn.Dropout(0.5), nn.Conv2d(128, 9, 1),
            nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        ),
        64,
    ),
    "residual": (lambda: resnet(models.resnet.BasicBlock), 48),
    "bottleneck": (
        lambda: resnet(models.resnet.Bottleneck, groups=4, width_per_group=8),
        48,
    ),
    "densenet": (lambda: models.DenseNet(8, (2, 2, 2), 16), 48),
    "inception": (
        lambda: nn.Sequential(
            *list(models.googlenet(init_weights=False).children())[:6],
            nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        ),
        48,
    ),
    "stochastic depth": (lambda: models.efficientnet_b0().features[:3].append(nn.Flatten()), 32),
}  # fmt: skip
TORCHVISION = (
    "alexnet", "vgg11", "vgg16", "vgg19", "vgg11_bn", "vgg16_bn", "vgg19_bn", "googlenet", "resnet18", "resnet50",
    "resnet152", "wide_resnet50_2", "resnext50_32x4d", "densenet121", "squeezenet1_0", "squeezenet1_1",
    "efficientnet_b0", "swin_t", "shufflenet_v2_x1_0", "mobilenet_v2",
)  # fmt: skip


def build(name: str) -> nn.Module:
    options = {"init_weights": False} if name == "googlenet" else {}
    return models.get_model(name, weights=None, **options)


#: Whole networks, torchvision's and fastalex's own in their stock form, and the side of their images.
FULL: dict[str, tuple[Callable[[], nn.Module], int]] = {
    **{name: (functools.partial(build, name), 224) for name in TORCHVISION},
    **bench_zoo.FAMILY,
    "torchvision preset": (functools.partial(alexnet, "torchvision", fused=False), 224),
}


def compare(model: nn.Module, side: int) -> None:
    """Eval in float64 and float32, and one training step in float64."""
    stock = optimized.with_statistics(model.eval())
    fast = copy.deepcopy(stock)
    report = fastalex.optimize(fast)
    x = torch.randn(2, 3, side, side)
    with torch.no_grad():
        plain, ours = stock(x), fast(x)
        stock.double(), fast.double()
        oracle = stock(x.double())
        torch.testing.assert_close(fast(x.double()), oracle, **optimized.EXACT)
    # Each layer adds its own error: at most 1e-5 a convolution (set_conv_precision's "high").
    layers = sum(isinstance(module, nn.Conv2d) for module in model.modules())
    scale = oracle.norm()
    allowed = 2 * (plain.double() - oracle).norm() + layers * 1e-5 * scale
    assert (ours.double() - oracle).norm() <= allowed
    step(stock, fast, x.double())
    report.restore()
    assert [type(m) for m in fast.modules()] == [type(m) for m in stock.modules()]


def step(stock: nn.Module, fast: nn.Module, x: torch.Tensor) -> None:
    """One step of SGD, and all parameters and statistics after it."""
    labels = torch.arange(len(x))
    for model in (stock, fast):
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        torch.manual_seed(3)  # dropout and stochastic depth draw alike
        output = model(x)
        outputs = output if isinstance(output, tuple) else (output,)
        sum(F.cross_entropy(out, labels) for out in outputs).backward()
        optimizer.step()
    after = fast.state_dict()
    for key, value in stock.state_dict().items():
        # Batches of two make variances near zero, whose root magnifies the last bits.
        torch.testing.assert_close(
            after[key], value, rtol=1e-7, atol=1e-9, msg=lambda m, key=key: f"{key}: {m}"
        )


@pytest.mark.parametrize("name", SMALL)
def test_small_networks(name):
    make, side = SMALL[name]
    compare(make(), side)


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL)
def test_networks(name):
    make, side = FULL[name]
    compare(make(), side)


def test_every_convolution_of_a_network_is_accounted_for():
    with torch.device("meta"):
        for name in ("vgg16_bn", "resnet50", "googlenet"):
            model = build(name)
            report = fastalex.optimize(model.eval())
            convolutions = sum(isinstance(m, nn.Conv2d) for m in model.modules())
            fused = [entry for entry in report.replaced if "Conv2d" in entry.layers]
            assert len(fused) == convolutions, name
