"""AlexNet and its presets: their sizes, and fused against stock against float64, forward and backward."""

from __future__ import annotations

import contextlib
import copy
import functools
import pickle
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastalex import ops, reference
from fastalex.models import AlexNet, alexnet
from fastalex.models._layers import TowerLocalResponseNorm
from fastalex.models.alexnet import LRN, PRESETS
from tests.support import bounds
from tests.support.backends import conv_precision

#: From the literature, or counted by hand: conv1 34,944 + conv2 307,456 + conv3 885,120 + conv4 663,936 + conv5
#: 442,624 in two towers; fc6 37,752,832, fc7 16,781,312, fc8 4,097,000.
PAPER = 60_965_224
PARAMETERS = {
    "paper": PAPER,
    "single": 62_378_344,
    "caffenet": PAPER,
    "bvlc": PAPER,
    "torchvision": 61_100_840,
    "batchnorm": PAPER + 96 + 256,  # a scale each; the shift takes the bias's place
    "cifar10": 64 * 76 + 64 * 1601 + 32 * 577 + 32 * 289 + 10 * 2049,
    "pretrain6": PAPER + 256 * (128 * 9 + 1),
}
#: Presets that take one size of image.
SIDES = {"torchvision": 224, "cifar10": 32}
LABELS = torch.tensor([3, 8])
LRN_POSITIONAL = (LRN["size"], LRN["alpha"] / LRN["size"], LRN["beta"], LRN["k"])


def on_meta(preset: str = "paper", **changes) -> AlexNet:
    """A network without memory or values."""
    with torch.device("meta"):
        return alexnet(preset, **changes)


#: What the options' tests below do not cover at the networks' own size.
QUICK = ("paper", "torchvision", "cifar10")


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in PRESETS
    ],
)
def networks(request):
    """One set of weights in three networks, in eval mode, without dropout, and a batch of two.

    The paper's network is whole; in the others the fully connected layers, which repeat it, are narrow.
    """
    torch.manual_seed(2012)
    preset = request.param
    options = {"dropout": 0.0}
    if preset not in ("paper", "cifar10"):
        options["hidden"] = 64
    stock = alexnet(preset, fused=False, **options).eval()
    fused = on_meta(preset, **options).eval()
    for module in (*stock.modules(), *fused.modules()):
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.0  # every test sees the same statistics
            nn.init.uniform_(module.running_mean, 0, 8)
            nn.init.uniform_(module.running_var, 200, 400)
    fused.load_state_dict(copy.deepcopy(stock.state_dict()), strict=True, assign=True)
    exact = copy.deepcopy(stock).double()
    # Pixels less their mean, as the paper feeds them: of smaller numbers the normalisation leaves k alone.
    x = torch.randn(2, 3, *2 * (SIDES.get(preset, 227),)) * 64
    return SimpleNamespace(
        preset=preset, options=options, stock=stock, fused=fused, exact=exact, x=x
    )


# --- the same function ---------------------------------------------------------------------------


def tile_error(network: AlexNet, passes: int) -> float:
    """What convolutions at the default precision may add: each its documented share of a norm, once a pass."""
    convolutions = sum(isinstance(module, nn.Conv2d) for module in network.modules())
    return passes * convolutions * bounds.CONV_PRECISION["high"][0]


@torch.no_grad()
@pytest.mark.parametrize("precision", ["highest", "high"])
def test_logits_are_as_exact_as_stock(networks, precision):
    """Of direct sums; Winograd's tiles add what their precision allows."""
    expected = networks.exact(networks.x.double())
    allowed = 2 * (networks.stock(networks.x).double() - expected).norm()
    allowed += 4 * bounds.eps(torch.float32) * expected.norm()
    if precision != "highest":
        allowed += tile_error(networks.fused, passes=1) * expected.norm()
    for format in (torch.contiguous_format, torch.channels_last):
        with conv_precision(precision):
            logits = networks.fused(networks.x.contiguous(memory_format=format))
        assert logits.dtype is torch.float32
        assert (logits.double() - expected).norm() <= allowed


def names_of(network: AlexNet, kind: type[nn.Module]) -> list[str]:
    """Where the stock network has a module of this kind."""
    with torch.device("meta"):
        stock = AlexNet(
            column=network.column, towers=network.towers, norm=network.norm, fused=False
        )
    found = [name for name, module in stock.named_modules() if isinstance(module, kind)]
    present = dict(network.named_modules())
    return [name for name in found if name in present]


def winners(pool: nn.Module, input: torch.Tensor) -> torch.Tensor:
    """torch's indices of a pool layer's maxima; the fused layer's are those of the pair it stands for."""
    if isinstance(pool, ops.LRNMaxPool2d):
        lrn = (pool.size, pool.alpha, pool.beta, pool.k)
        input = ops.local_response_norm(input, *lrn, groups=pool.groups)
    geometry = (pool.kernel_size, pool.stride)
    return F.max_pool2d(input, *geometry, ceil_mode=pool.ceil_mode, return_indices=True)[1]


@contextlib.contextmanager
def hooked(network: AlexNet, names: list[str], hook: Callable[..., Any]) -> Iterator[None]:
    """Calls ``hook(name, layer, input, output)`` after each of the named layers."""

    def call(name, layer, inputs, output):
        return hook(name, layer, inputs[0], output)

    handles = [
        network.get_submodule(name).register_forward_hook(functools.partial(call, name))
        for name in names
    ]
    yield
    for handle in handles:
        handle.remove()


def choices_of(network: AlexNet, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Which units each ReLU lets through, and where each pool's maxima stand, in training."""
    choices = {}
    pools = names_of(network, nn.MaxPool2d)

    def note(name, layer, input, output):
        choices[name] = winners(layer, input) if name in pools else output > 0

    with torch.no_grad(), hooked(network, names_of(network, nn.ReLU) + pools, note):
        network.train()(x)
    network.eval()
    return choices


def gradients(
    network: AlexNet, x: torch.Tensor, choices: dict[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """Gradients of one training step's loss in float64, of the branch that ``choices`` take where given."""
    pools = names_of(network, nn.MaxPool2d)

    def choose(name, layer, input, output):
        chosen = choices[name]
        if name in pools:
            return input.flatten(2).gather(2, chosen.flatten(2)).view(chosen.shape)
        return input * chosen

    names, parameters = zip(*network.named_parameters(), strict=True)
    with hooked(network, list(choices or ()), choose):
        loss = F.cross_entropy(network.train()(x), LABELS)
    found = torch.autograd.grad(loss, parameters)
    network.eval()
    return {name: grad.double() for name, grad in zip(names, found, strict=True)}


@pytest.mark.parametrize("precision", ["highest", "high"])
def test_gradients_are_as_exact_as_stock(networks, precision):
    """Near ties fall to either side in float32, and one moves a gradient by a per cent.

    So float64 takes the branches that each float32 network took; what is left is rounding, at most four times stock's,
    and what Winograd's tiles may add: forward, in the gradient of each input and in that of each weight.
    """
    errors = {}
    tiles = 0.0 if precision == "highest" else tile_error(networks.fused, passes=3)
    for kind in ("stock", "fused"):
        network = getattr(networks, kind)
        with conv_precision(precision):
            choices = choices_of(network, networks.x)
            found = gradients(network, networks.x)
        expected = gradients(networks.exact, networks.x.double(), choices)
        assert list(found) == list(expected)
        errors[kind] = {n: ((found[n] - g).norm() / g.norm()).item() for n, g in expected.items()}
    for name, error in errors["fused"].items():
        allowed = 4 * errors["stock"][name] + 4 * bounds.eps(torch.float32) + tiles
        assert error <= allowed, f"{name}: {error:.3g} beside stock's {errors['stock'][name]:.3g}"


def test_a_training_step_is_seen_by_the_next_forward(networks):
    """The convolutions keep packed weights: an optimiser that changes them in place must not go unnoticed."""
    network = copy.deepcopy(networks.fused)
    before = network(networks.x)
    optimiser = torch.optim.SGD(network.parameters(), lr=0.1)
    F.cross_entropy(before, LABELS).backward()
    optimiser.step()
    with torch.no_grad():
        after = network(networks.x)
        assert not torch.equal(after, before)
        assert torch.equal(after, copy.deepcopy(network)(networks.x))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["stock", "fused"])
def test_224_is_padded_right_and_below(networks, kind):
    if networks.preset in SIDES:
        pytest.skip("takes another size")
    network = getattr(networks, kind)
    x = networks.x[..., :224, :224].contiguous()
    assert torch.equal(network(x), network(F.pad(x, (0, 3, 0, 3))))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["stock", "fused"])
def test_an_empty_batch(networks, kind):
    classes = networks.fused.head.out_features
    assert getattr(networks, kind)(networks.x[:0]).shape == (0, classes)


# --- the same modules ----------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("preset", PRESETS)
def test_parameter_counts(preset, fused):
    network = on_meta(preset, fused=fused)
    assert sum(parameter.numel() for parameter in network.parameters()) == PARAMETERS[preset]


@torch.no_grad()
@pytest.mark.parametrize("kind", ["stock", "fused"])
def test_state_dicts_are_interchangeable(networks, kind):
    """Each network, loaded from the other's state dict, computes what it did."""
    network = getattr(networks, kind)
    other = networks.fused if kind == "stock" else networks.stock
    loaded = on_meta(networks.preset, fused=kind == "fused", **networks.options).eval()
    assert list(loaded.state_dict()) == list(other.state_dict())
    loaded.load_state_dict(other.state_dict(), strict=True, assign=True)
    assert torch.equal(loaded(networks.x), network(networks.x))


@torch.no_grad()
@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda network: pickle.loads(pickle.dumps(network))]
)
def test_copies(networks, duplicate):
    twin = duplicate(networks.fused)
    assert torch.equal(twin(networks.x), networks.fused(networks.x))
    twin.features[0].weight.zero_()
    assert networks.fused.features[0].weight.any()


@pytest.mark.parametrize("with_gradients", [True, False])
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_features_stay_channels_last(networks, format, with_gradients):
    layouts = {}

    def note(name, layer, input, output):
        layouts[name] = output.is_contiguous(memory_format=torch.channels_last)

    names = [f"features.{name}" for name, _ in networks.fused.features.named_children()]
    with torch.set_grad_enabled(with_gradients), hooked(networks.fused, names, note):
        networks.fused(networks.x.contiguous(memory_format=format))
    assert list(layouts) == names
    assert all(layouts.values()), layouts


@pytest.mark.parametrize("groups", [1, 2])
def test_tower_norm_is_grouped_lrn(groups):
    """Stock LRN on towers in the batch, and ours with groups: one definition, two roundings."""
    x = torch.randn(2, 24, 5, 7) * 30
    g = torch.randn_like(x)
    arguments = (*LRN_POSITIONAL, groups)
    expected = reference.lrn(x.double(), *arguments)
    expected_gx = reference.lrn_backward(g.double(), x.double(), *arguments)
    bound = bounds.lrn_bound(x.double(), arguments, torch.float32)
    bound_gx = bounds.lrn_backward_bound(g.double(), x.double(), arguments, torch.float32)
    bound_gx += bounds.rounding(expected_gx, torch.float32)
    layers = TowerLocalResponseNorm(groups, **LRN), ops.LocalResponseNorm(**LRN, groups=groups)
    for layer in layers:
        input = x.clone().requires_grad_()
        y = layer(input)
        (gx,) = torch.autograd.grad(y, input, g)
        bounds.assert_within(y.detach(), expected, bound)
        bounds.assert_within(gx, expected_gx, bound_gx)


# --- options -------------------------------------------------------------------------------------

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


# --- wrong calls ---------------------------------------------------------------------------------


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
