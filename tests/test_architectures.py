"""The architectures after AlexNet: sizes from the literature, and fused against stock in float64 and float32."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastalex.models import GoogLeNet, GoogLeNetOutputs, NetworkInNetwork, ZFNet
from tests.support import bounds
from tests.support.backends import conv_precision

#: What builds each, its parameters (the literature's, with 1000 or 10 classes), its image's side.
NETWORKS = {
    "zfnet": (ZFNet, 62_357_608, 224),
    "nin": (NetworkInNetwork, 7_595_176, 224),
    "nin-cifar10": (functools.partial(NetworkInNetwork, variant="cifar10"), 966_986, 32),
    "googlenet": (functools.partial(GoogLeNet, auxiliary=False), 6_998_552, 224),
    "googlenet-auxiliary": (GoogLeNet, 13_378_280, 224),
}
LABELS = torch.tensor([3, 8])


def on_meta(name: str, **options) -> nn.Module:
    with torch.device("meta"):
        return NETWORKS[name][0](**options)


def without_dropout(network: nn.Module) -> nn.Module:
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return network


TRAINED = [
    "nin-cifar10",
    *(pytest.param(n, marks=pytest.mark.slow) for n in ("zfnet", "nin", "googlenet-auxiliary")),
]


def same_weights(name: str) -> SimpleNamespace:
    """One set of weights in a stock, a fused and a float64 network, and a batch of pixels less their mean."""
    torch.manual_seed(2013)
    make, _, side = NETWORKS[name]
    stock = without_dropout(make(fused=False)).eval()
    fused = without_dropout(on_meta(name)).eval()
    fused.load_state_dict(stock.state_dict(), assign=True)
    exact = without_dropout(on_meta(name, fused=False)).eval()
    exact.load_state_dict({k: v.double() for k, v in stock.state_dict().items()}, assign=True)
    x = torch.randn(2, 3, side, side) * 64
    return SimpleNamespace(stock=stock, fused=fused, exact=exact, x=x)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", NETWORKS)
def test_parameter_counts(name, fused):
    assert sum(p.numel() for p in on_meta(name, fused=fused).parameters()) == NETWORKS[name][1]


@torch.no_grad()
@pytest.mark.parametrize("name", ["zfnet", "nin", "nin-cifar10", "googlenet-auxiliary"])
def test_logits_are_as_exact_as_stock(name):
    """Of direct sums; Winograd's tiles add what their precision allows a convolution."""
    networks = same_weights(name)
    expected = networks.exact(networks.x.double())
    assert expected.std() > 0
    exact = 2 * (networks.stock(networks.x).double() - expected).norm()
    exact += 4 * bounds.eps(torch.float32) * expected.norm()
    convolutions = sum(isinstance(module, nn.Conv2d) for module in networks.fused.modules())
    tiles = convolutions * bounds.CONV_PRECISION["high"][0] * expected.norm()
    for precision, format, allowed in (
        ("highest", torch.contiguous_format, exact),
        ("high", torch.channels_last, exact + tiles),
    ):
        with conv_precision(precision):
            logits = networks.fused(networks.x.contiguous(memory_format=format))
        assert (logits.double() - expected).norm() <= allowed


def loss_of(network: nn.Module, x: torch.Tensor) -> torch.Tensor:
    outputs = network.train()(x)
    network.eval()
    if not isinstance(outputs, GoogLeNetOutputs):
        return F.cross_entropy(outputs, LABELS)
    main, *auxiliary = (F.cross_entropy(logits, LABELS) for logits in outputs)
    return main + 0.3 * sum(auxiliary)


@pytest.mark.parametrize("name", TRAINED)
def test_gradients_in_float64(name):
    """No near tie falls to another side in float64, so what is left is rounding.

    22 layers of at most 9,216 summands: 5e-11 of each gradient; twenty times that for cancellation.
    """
    networks = same_weights(name)
    fused = without_dropout(on_meta(name))
    fused.load_state_dict(networks.exact.state_dict(), assign=True)
    x = networks.x.double()
    names, parameters = zip(*networks.exact.named_parameters(), strict=True)
    expected = torch.autograd.grad(loss_of(networks.exact, x), parameters)
    actual = torch.autograd.grad(loss_of(fused, x), list(fused.parameters()))
    for name, e, a in zip(names, expected, actual, strict=True):
        assert e.norm() > 0, name
        assert (a - e).norm() <= 1e-9 * e.norm(), name


@pytest.mark.parametrize("name", NETWORKS)
def test_state_dicts_have_the_same_keys(name):
    assert list(on_meta(name).state_dict()) == list(on_meta(name, fused=False).state_dict())


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("zfnet", {"features.pool1": 55, "features.pool2": 13, "features.pool5": 6}),
        ("nin", {"features.pool1": 27, "features.pool2": 13, "features.cccp8": 6}),
        ("nin-cifar10", {"features.pool1": 16, "features.pool2": 8, "features.cccp6": 8}),
        ("googlenet", {"pool1": 56, "pool2": 28, "pool3": 14, "pool4": 7}),
    ],
)
def test_sizes_of_the_maps(name, sizes):
    network, found = on_meta(name), {}
    for layer in sizes:
        network.get_submodule(layer).register_forward_hook(
            lambda module, inputs, output, layer=layer: found.update({layer: output.shape[-1]})
        )
    side = NETWORKS[name][2]
    network(torch.empty(1, 3, side, side, device="meta"))
    assert found == sizes


def test_auxiliary_heads_run_in_training_alone():
    network = on_meta("googlenet-auxiliary", num_classes=7)
    x = torch.empty(2, 3, 224, 224, device="meta")
    assert [tuple(logits.shape) for logits in network(x)] == [(2, 7)] * 3
    assert network.eval()(x).shape == (2, 7)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: on_meta("zfnet")(torch.empty(1, 3, 227, 227)), r"ZFNet takes \[N, 3, 224, 224\]"),
        (lambda: on_meta("googlenet")(torch.empty(3, 224, 224)), r"got \(3, 224, 224\)"),
        (lambda: on_meta("nin")(torch.empty(1, 1, 224, 224)), r"takes \[N, 3, H, W\]"),
        (lambda: NetworkInNetwork(variant="mnist"), "variant is 'mnist'; it can be one of imag"),
    ],
)
def test_wrong_calls(make, message):
    with pytest.raises(ValueError, match=message):
        make()
