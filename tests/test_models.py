"""AlexNet and its presets: their sizes, and fused against stock against float64, forward and backward."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastalex import ops, reference
from fastalex.models import AlexNet, alexnet
from fastalex.models._layers import TowerLocalResponseNorm
from fastalex.models.alexnet import LRN, PRESETS
from tests.support import bounds
from tests.support.alexnets import LABELS, SIDES, hooked, names_of, on_meta
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
LRN_POSITIONAL = (LRN["size"], LRN["alpha"] / LRN["size"], LRN["beta"], LRN["k"])

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


def winners(pool: nn.Module, input: torch.Tensor) -> torch.Tensor:
    """torch's indices of a pool layer's maxima; the fused layer's are those of the pair it stands for."""
    if isinstance(pool, ops.LRNMaxPool2d):
        lrn = (pool.size, pool.alpha, pool.beta, pool.k)
        input = ops.local_response_norm(input, *lrn, groups=pool.groups)
    geometry = (pool.kernel_size, pool.stride)
    return F.max_pool2d(input, *geometry, ceil_mode=pool.ceil_mode, return_indices=True)[1]


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
