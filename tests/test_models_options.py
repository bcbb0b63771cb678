"""AlexNet's options and presets: each means the same fused and stock, and a wrong one is refused in words."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastalex import ops
from fastalex.models import AlexNet, alexnet
from tests.support import bounds
from tests.support.alexnets import LABELS, SIDES, hooked, names_of, on_meta

SMALL = {"hidden": 16, "dropout": 0.0}
OPTIONS = [
    {},
    {"towers": 2},
    {"towers": 2, "lrn": {"k": 1.0, "groups": 1}},
    {"pool_first": True},
    {"norm": "batchnorm"},
    {"norm": "none", "towers": 2},
    {"pool": "plain"},
    {"pool": "plain", "norm": "none"},
    {"pool": "plain", "pool_first": True},
    {"activation": "tanh"},
    {"activation": "tanh", "norm": "batchnorm", "pool": "plain"},
    {"pool": "fractional"},
    {"pool": "fractional", "norm": "none"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options_mean_the_same_fused_and_stock(options):
    """In float64, where near ties don't flip: logits, and the gradient of every parameter."""
    stock = alexnet("cifar10", fused=False, init="cuda-convnet", **{**SMALL, **options}).double()
    fused = alexnet("cifar10", init="cuda-convnet", **{**SMALL, **options}).double()
    fused.load_state_dict(stock.state_dict())
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64) * 64
    if options.get("pool") == "fractional":  # random windows in training
        stock.eval(), fused.eval()
    expected, actual = stock(x), fused(x)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-14)
    for network, logits in ((stock, expected), (fused, actual)):
        F.cross_entropy(logits, LABELS).backward()
        assert all(p.grad.any() for p in network.parameters())
    for (name, p), q in zip(fused.named_parameters(), stock.parameters(), strict=True):
        assert (p.grad - q.grad).norm() <= 1e-9 * q.grad.norm(), name


@pytest.mark.parametrize("pool", ["overlapping", "plain", "fractional"])
@pytest.mark.parametrize("preset", ["paper", "torchvision", "cifar10", "pretrain6"])
def test_every_pooling_gives_maps_of_the_same_size(preset, pool):
    network = on_meta(preset, pool=pool)
    side = SIDES.get(preset, 227)
    sizes = {}

    def note(name, layer, input, output):
        sizes[name] = output.shape[-1]

    with hooked(network, names_of(network, nn.MaxPool2d), note):
        network(torch.empty(1, 3, side, side, device="meta"))
    assert list(sizes.values()) == ([16, 8] if preset == "cifar10" else [27, 13, 6])


def test_fractional_pooling_draws_its_windows_in_training_alone():
    network = alexnet("cifar10", pool="fractional")
    x = torch.randn(2, 3, 32, 32)
    assert not torch.equal(network(x), network(x))
    network.eval()
    assert torch.equal(network(x), network(x))


def test_dropconnect_drops_weights_in_training_alone():
    """A dropped weight has no gradient; kept ones are scaled, so that evaluation uses them all."""
    network = alexnet("cifar10", hidden=64, dropconnect=0.25)
    x = torch.randn(4, 3, 32, 32)
    network.classifier.fc7.register_forward_pre_hook(lambda layer, inputs: (inputs[0].abs() + 1,))
    nn.init.constant_(network.classifier.fc7.bias, 1e3)  # every unit passes its ReLU
    network(x).sum().backward()
    gradient = network.classifier.fc7.weight.grad
    dropped = (gradient == 0).double().mean().item()
    # 4,096 draws of probability 1/4: five standard deviations of the mean.
    assert dropped == pytest.approx(0.25, abs=5 * (0.25 * 0.75 / gradient.numel()) ** 0.5)
    assert type(network.classifier.fc8) is ops.Linear
    network.eval()
    plain = alexnet("cifar10", hidden=64).eval()
    plain.load_state_dict(network.state_dict())
    plain.classifier.fc7.register_forward_pre_hook(lambda layer, inputs: (inputs[0].abs() + 1,))
    assert torch.equal(network(x), plain(x))


def test_hidden_width_and_classes():
    network = on_meta("paper", hidden=512, num_classes=7)
    assert network(torch.empty(2, 3, 227, 227, device="meta")).shape == (2, 7)
    assert network.classifier.fc7.weight.shape == (512, 512)


@pytest.mark.parametrize("preset", ["paper", "torchvision", "cifar10"])
def test_a_new_head_takes_the_place_of_the_old(preset):
    network = alexnet(preset, **({} if preset == "cifar10" else {"hidden": 16}))
    name = list(network.state_dict())[-2]
    before = {key: value for key, value in network.state_dict().items() if value.dim() > 1}
    network.replace_head(5)
    after = network.state_dict()
    assert after[name].shape[0] == 5
    assert all(torch.equal(after[key], before[key]) for key in before if key != name)
    assert network(torch.randn(1, 3, *2 * (SIDES.get(preset, 227),))).shape == (1, 5)


def test_torchvision_is_torchvision():
    """Its state dict loads as it is, and both compute the same."""
    torchvision = pytest.importorskip("torchvision")
    theirs = torchvision.models.alexnet(num_classes=10).eval()
    for fused in (True, False):
        ours = on_meta("torchvision", num_classes=10, fused=fused).eval()
        ours.load_state_dict(theirs.state_dict(), strict=True, assign=True)
        x = torch.randn(2, 3, 200, 260)
        with torch.no_grad():
            expected = theirs(x)
            scale = expected.abs().max()
            error = (ours(x) - expected).abs().max()
        # Nine layers, each a sum whose rounding grows with the root of its up to 9,216 terms.
        assert error <= 9 * 9216**0.5 * bounds.eps(torch.float32) * scale


@pytest.mark.parametrize(
    "shape",
    [(2, 3, 226, 227), (2, 3, 227, 224), (2, 3, 256, 256), (2, 1, 227, 227), (3, 227, 227), (2,)],
    ids=str,
)
@pytest.mark.parametrize("fused", [True, False])
def test_wrong_sizes(fused, shape):
    network = on_meta(fused=fused)
    with pytest.raises(ValueError, match=r"\[N, 3, 227, 227\] or \[N, 3, 224, 224\], got \("):
        network(torch.empty(shape, device="meta"))


@pytest.mark.parametrize(
    ("preset", "shape", "message"),
    [
        ("cifar10", (2, 3, 28, 28), r"\[N, 3, 32, 32\], got \(2, 3, 28, 28\)"),
        ("torchvision", (2, 1, 224, 224), r"\[N, 3, H, W\], got \(2, 1, 224, 224\)"),
    ],
)
def test_wrong_sizes_of_other_columns(preset, shape, message):
    with pytest.raises(ValueError, match=message):
        on_meta(preset)(torch.empty(shape, device="meta"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: alexnet("vgg"), "no preset 'vgg'; there are paper, single"),
        (lambda: alexnet("paper", towers=3), "towers is 3; it can be 1 or 2"),
        (lambda: AlexNet(towers=0), "towers is 0; it can be 1 or 2"),
        (lambda: AlexNet(init="zero"), "init is 'zero'; it can be one of paper, cuda-convnet2"),
        (lambda: AlexNet(column="lenet"), "column is 'lenet'; it can be one of paper, pretrain6"),
        (lambda: AlexNet(norm="layer"), "norm is 'layer'; it can be one of lrn, batchnorm, none"),
        (lambda: AlexNet(pool="mean"), "pool is 'mean'; it can be one of overlapping, plain"),
        (lambda: AlexNet(activation="gelu"), "activation is 'gelu'; it can be one of relu, tanh"),
        (lambda: AlexNet(dropout=1.0), "dropout is 1.0; it is a probability"),
        (lambda: AlexNet(dropconnect=-0.1), "dropconnect is -0.1; it is a probability"),
        (lambda: AlexNet(0), "num_classes is 0; it must be an int of at least 1"),
        (lambda: AlexNet(hidden=-1), "hidden is -1; it must be an int of at least 0"),
        (lambda: AlexNet(hidden=0), "dropout is 0.5 and dropconnect 0.0.*but hidden is 0"),
        (lambda: AlexNet(norm="none", pool_first=True), "for norm='lrn', and norm is 'none'"),
        (lambda: AlexNet(norm="batchnorm", lrn={"k": 1}), "for norm='lrn', and norm is 'batchn"),
    ],
)
def test_unknown_and_contradictory_choices(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_preset_drops_its_lrn_with_its_norm():
    assert on_meta("caffenet", norm="none").norm == "none"


@pytest.mark.parametrize(
    ("init", "conv3_deviation", "bias"),
    [("paper", 0.01, 1.0), ("cuda-convnet2", 0.03, 1.0), ("bvlc", 0.01, 0.1)],
    ids=str,
)
def test_initialisations(init, conv3_deviation, bias):
    """Section 5's standard deviation and biases; the author's code widens conv3 to conv5, BVLC lowers the biases."""
    network = AlexNet(num_classes=2, hidden=8, init=init)
    weight = network.features.conv3.weight
    # The deviation of n normal values is known to about 1 / sqrt(2 n); five of those.
    assert weight.std().item() == pytest.approx(
        conv3_deviation, rel=5 / (2 * weight.numel()) ** 0.5
    )
    assert (network.features.conv2.bias == bias).all()
    assert (network.classifier.fc6.bias == bias).all()
    assert (network.features.conv3.bias == 0).all()
