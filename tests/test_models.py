"""AlexNet: its sizes, and fused against stock against float64, forward and backward."""

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
from fastalex.models.alexnet import LRN, PRESETS, TowerLocalResponseNorm
from tests.support import bounds

PARAMETERS = {"paper": 60_965_224, "single": 62_378_344}
LABELS = torch.tensor([3, 141])
LRN_POSITIONAL = (LRN["size"], LRN["alpha"] / LRN["size"], LRN["beta"], LRN["k"])


def on_meta(preset: str = "paper", **changes) -> AlexNet:
    """A network without memory or values."""
    with torch.device("meta"):
        return alexnet(preset, **changes)


@pytest.fixture(scope="module", params=PRESETS)
def networks(request):
    """One set of weights in three networks, in eval mode, without dropout, and a batch of two."""
    torch.manual_seed(2012)
    stock = alexnet(request.param, fused=False, dropout=0.0).eval()
    fused = on_meta(request.param, dropout=0.0).eval()
    fused.load_state_dict(copy.deepcopy(stock.state_dict()), strict=True, assign=True)
    exact = copy.deepcopy(stock).double()
    # Pixels less their mean, as the paper feeds them: of smaller numbers the normalisation leaves k alone.
    x = torch.randn(2, 3, 227, 227) * 64
    return SimpleNamespace(preset=request.param, stock=stock, fused=fused, exact=exact, x=x)


# --- the same function ---------------------------------------------------------------------------


@torch.no_grad()
def test_logits_are_as_exact_as_stock(networks):
    expected = networks.exact(networks.x.double())
    stock_error = (networks.stock(networks.x).double() - expected).abs().max()
    for format in (torch.contiguous_format, torch.channels_last):
        logits = networks.fused(networks.x.contiguous(memory_format=format))
        assert logits.dtype is torch.float32
        error = (logits.double() - expected).abs().max()
        assert error <= 2 * stock_error + 4 * bounds.eps(torch.float32) * expected.abs().max()


RELUS = [*(f"features.relu{n}" for n in range(1, 6)), "classifier.relu6", "classifier.relu7"]
POOLS = ["features.pool1", "features.pool2", "features.pool5"]


def winners(pool: nn.Module, input: torch.Tensor) -> torch.Tensor:
    """torch's indices of a pool layer's maxima; the fused layer's are those of the pair it stands for."""
    if isinstance(pool, ops.LRNMaxPool2d):
        input = ops.local_response_norm(input, **LRN, groups=pool.groups)
    return F.max_pool2d(input, 3, 2, return_indices=True)[1]


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
    """Which units each ReLU lets through, and where each pool's maxima stand."""
    choices = {}

    def note(name, layer, input, output):
        choices[name] = winners(layer, input) if name in POOLS else output > 0

    with torch.no_grad(), hooked(network, RELUS + POOLS, note):
        network(x)
    return choices


def gradients(
    network: AlexNet, x: torch.Tensor, choices: dict[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """Gradients of one training step's loss in float64, of the branch that ``choices`` take where given."""

    def choose(name, layer, input, output):
        chosen = choices[name]
        if name in POOLS:
            return input.flatten(2).gather(2, chosen.flatten(2)).view(chosen.shape)
        return input * chosen

    names, parameters = zip(*network.named_parameters(), strict=True)
    with hooked(network, RELUS + POOLS if choices else [], choose):
        loss = F.cross_entropy(network.train()(x), LABELS)
    found = torch.autograd.grad(loss, parameters)
    network.eval()
    return {name: grad.double() for name, grad in zip(names, found, strict=True)}


def test_gradients_are_as_exact_as_stock(networks):
    """Near ties fall to either side in float32, and one moves a gradient by a per cent.

    So float64 takes the branches that each float32 network took; what is left is rounding, at most four times stock's.
    """
    errors = {}
    for kind in ("stock", "fused"):
        network = getattr(networks, kind)
        expected = gradients(networks.exact, networks.x.double(), choices_of(network, networks.x))
        found = gradients(network, networks.x)
        assert list(found) == list(expected)
        errors[kind] = {n: ((found[n] - g).norm() / g.norm()).item() for n, g in expected.items()}
    for name, error in errors["fused"].items():
        allowed = 4 * errors["stock"][name] + 4 * bounds.eps(torch.float32)
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
    network = getattr(networks, kind)
    x = networks.x[..., :224, :224].contiguous()
    assert torch.equal(network(x), network(F.pad(x, (0, 3, 0, 3))))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["stock", "fused"])
def test_an_empty_batch(networks, kind):
    assert getattr(networks, kind)(networks.x[:0]).shape == (0, 1000)


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
    loaded = on_meta(networks.preset, fused=kind == "fused").eval()
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
    twin.features.conv1.weight.zero_()
    assert networks.fused.features.conv1.weight.any()


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
    ("make", "message"),
    [
        (lambda: alexnet("vgg"), "no preset 'vgg'; there are paper, single"),
        (lambda: alexnet("paper", towers=3), "towers is 3; it can be 1 or 2"),
        (lambda: AlexNet(towers=0), "towers is 0; it can be 1 or 2"),
        (lambda: AlexNet(init="zero"), "init is 'zero'; it can be one of paper, cuda-convnet2"),
    ],
)
def test_unknown_choices(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("init", "conv3_deviation"), [("paper", 0.01), ("cuda-convnet2", 0.03)], ids=str
)
def test_initialisations(init, conv3_deviation):
    """Section 5's standard deviation and biases; the author's code widens conv3 to conv5."""
    network = AlexNet(num_classes=2, init=init)
    weight = network.features.conv3.weight
    # The deviation of n normal values is known to about 1 / sqrt(2 n); five of those.
    assert weight.std().item() == pytest.approx(
        conv3_deviation, rel=5 / (2 * weight.numel()) ** 0.5
    )
    assert (network.features.conv2.bias == 1).all()
    assert (network.features.conv3.bias == 0).all()
