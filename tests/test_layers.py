"""The layers where their stock twins are used: constructors, copies, casts, hooks, and what torch.nn.utils does."""

from __future__ import annotations

import copy
import inspect
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils.fusion import fuse_conv_bn_eval

from fastalex import ops
from tests.support import bounds


class LRNThenPool(nn.Sequential):
    """The stock twin of LRNMaxPool2d."""

    def __init__(self, size, alpha=1e-4, beta=0.75, k=1.0, kernel_size=3, stride=2, padding=0):
        super().__init__(
            nn.LocalResponseNorm(size, alpha, beta, k), nn.MaxPool2d(kernel_size, stride, padding)
        )


#: Layer, stock twin, arguments of both.
LAYERS = {
    "conv": (ops.Conv2dReLU, nn.Conv2d, (16, 32, 3), {"padding": 1, "groups": 2}),
    "conv-reflect": (
        ops.Conv2dReLU,
        nn.Conv2d,
        (16, 32, 3),
        {"padding_mode": "reflect", "padding": 2},
    ),
    "lrn": (ops.LocalResponseNorm, nn.LocalResponseNorm, (5, 1e-2, 0.5, 2.0), {}),
    "pool": (ops.MaxPool2d, nn.MaxPool2d, (3, 2, 1), {"ceil_mode": True}),
    "lrn-pool": (ops.LRNMaxPool2d, LRNThenPool, (5, 1e-2, 0.75, 2.0, 3, 2, 1), {}),
}
X = (4, 16, 16, 16)  # enough multiply-adds for the kernels that pack their weights


def twins(name: str) -> tuple[nn.Module, nn.Module]:
    """The layer, and the stock layer with the same parameters and, for a convolution, the ReLU."""
    ours, stock, args, kwargs = LAYERS[name]
    layer, twin = ours(*args, **kwargs), stock(*args, **kwargs)
    twin.load_state_dict(layer.state_dict())
    return layer, nn.Sequential(twin, nn.ReLU()) if isinstance(twin, nn.Conv2d) else twin


def conv() -> ops.Conv2dReLU:
    return ops.Conv2dReLU(16, 32, 3, padding=1)


def expected_of(layer: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    """From the weight that the layer shows now."""
    return F.relu(F.conv2d(x, layer.weight, layer.bias, layer.stride, layer.padding))


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """What the default precision of convolutions promises, of the norm and of the largest output."""
    norm, largest = bounds.CONV_PRECISION["high"]
    error = actual - expected
    assert actual.shape == expected.shape
    assert error.norm() <= norm * expected.norm()
    assert error.abs().max() <= largest * expected.abs().max()


# --- construction --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["conv", "lrn", "pool"])
def test_constructors_begin_as_the_stock_layers(name):
    ours, stock, *_ = LAYERS[name]
    theirs = list(inspect.signature(stock.__init__).parameters.values())
    mine = list(inspect.signature(ours.__init__).parameters.values())
    pairs = zip(mine[: len(theirs)], theirs, strict=True)
    assert all((m.name, m.default, m.kind) == (t.name, t.default, t.kind) for m, t in pairs)
    # What comes on top can only be given by name.
    assert all(m.kind is m.KEYWORD_ONLY for m in mine[len(theirs) :])
    assert issubclass(ours, stock)


@pytest.mark.parametrize("name", LAYERS)
def test_representation_shows_every_argument(name):
    layer, _ = twins(name)
    text = repr(layer)
    assert text.startswith(type(layer).__name__ + "(")
    for value in (*LAYERS[name][2], *LAYERS[name][3].values()):
        assert str(value) in text, value


def test_representation_of_towers():
    assert "groups=2" in repr(ops.LocalResponseNorm(5, groups=2))
    assert "alpha_mode='sum'" in repr(ops.LRNMaxPool2d(5, alpha_mode="sum"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_device_and_dtype_arguments(dtype):
    layer = ops.Conv2dReLU(3, 4, 3, device="meta", dtype=dtype)
    assert layer.weight.is_meta
    assert layer.weight.dtype is dtype
    assert layer(torch.empty(2, 3, 8, 8, device="meta", dtype=dtype)).shape == (2, 4, 6, 6)


def test_skip_init():
    layer = nn.utils.skip_init(ops.Conv2dReLU, 16, 32, 3, padding=1)
    layer.load_state_dict(conv().state_dict())
    x = torch.randn(X)
    assert_close(layer(x), expected_of(layer, x))


# --- copies --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "duplicate",
    [
        copy.copy,
        copy.deepcopy,
        lambda layer: pickle.loads(pickle.dumps(layer)),
        lambda layer: saved_whole(layer),
    ],
    ids=["copy", "deepcopy", "pickle", "torch.save"],
)
@pytest.mark.parametrize("name", LAYERS)
def test_copies(name, duplicate):
    layer, twin = twins(name)
    x = torch.randn(X)
    with torch.no_grad():  # the first call fills whatever a layer keeps
        assert_close(layer(x), twin(x))
        other = duplicate(layer)
        assert type(other) is type(layer)
        assert repr(other) == repr(layer)
        assert torch.equal(other(x), layer(x))


def saved_whole(layer: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@torch.no_grad()
def test_a_shallow_copy_shares_and_a_deep_one_does_not():
    layer, x = conv(), torch.randn(X)
    shallow, deep = copy.copy(layer), copy.deepcopy(layer)
    before = layer(x)
    layer.weight.mul_(-1)
    assert torch.equal(shallow(x), layer(x))
    assert torch.equal(deep(x), before)


@pytest.mark.parametrize("name", LAYERS)
def test_state_dicts_go_both_ways(name):
    layer, twin = twins(name)
    inner = twin[0] if name.startswith("conv") else twin
    assert list(layer.state_dict()) == list(inner.state_dict())
    layer.load_state_dict(inner.state_dict(), strict=True)
    inner.load_state_dict(layer.state_dict(), strict=True)


@torch.no_grad()
def test_assigned_and_swapped_parameters_are_seen():
    layer, x = conv(), torch.randn(X)
    layer(x)
    layer.load_state_dict(conv().state_dict(), assign=True)
    assert_close(layer(x), expected_of(layer, x))
    layer.weight = nn.Parameter(torch.randn_like(layer.weight))
    assert_close(layer(x), expected_of(layer, x))
    layer.weight.data = torch.randn_like(layer.weight)
    assert_close(layer(x), expected_of(layer, x))


# --- casts ---------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_dtypes(name, dtype):
    layer, twin = twins(name)
    x = torch.randn(X)
    layer(x)
    cast = layer.to(dtype)
    assert cast is layer
    y = layer(x.to(dtype))
    assert y.dtype is dtype
    exact = twin.double()
    for parameter, narrow in zip(exact.parameters(), layer.parameters(), strict=True):
        parameter.copy_(narrow)
    # Half types sum in float32 and round once; three units for the products' intermediate rounding.
    bound = 3 * torch.finfo(dtype).eps * exact(x.to(dtype).double()).abs().max()
    bound = max(bound.item(), 144 * torch.finfo(torch.float64).eps)
    assert (y.double() - exact(x.to(dtype).double())).abs().max() <= bound


@torch.no_grad()
@pytest.mark.parametrize("name", LAYERS)
def test_channels_last(name):
    layer, twin = twins(name)
    x = torch.randn(X)
    expected = twin(x)
    layer(x)
    layer = layer.to(memory_format=torch.channels_last)
    for format in (torch.contiguous_format, torch.channels_last):
        y = layer(x.contiguous(memory_format=format))
        assert y.is_contiguous(memory_format=format)
        assert_close(y, expected)
    if name.startswith("conv"):
        assert layer.weight.is_contiguous(memory_format=torch.channels_last)


# --- hooks, freezing, functional calls -----------------------------------------------------------


@pytest.mark.parametrize("name", LAYERS)
def test_hooks_in_a_sequential(name):
    layer, twin = twins(name)
    x = torch.randn(X, requires_grad=True)
    chain, stock = nn.Sequential(nn.Identity(), layer), nn.Sequential(nn.Identity(), twin)
    seen: dict[str, list[torch.Tensor]] = {"ours": [], "stock": []}
    for key, network in (("ours", chain), ("stock", stock)):
        network[1].register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))
        network[1].register_forward_hook(
            lambda module, inputs, output, key=key: seen[key].append(output)
        )
        network[1].register_full_backward_hook(
            lambda module, grads, outputs, key=key: seen[key].append(grads[0])
        )
        network(x).sum().backward()
    for ours, theirs in zip(seen["ours"], seen["stock"], strict=True):
        assert_close(ours, theirs)


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_frozen_parameters_get_no_gradient(frozen):
    layer, x = conv(), torch.randn(X)
    getattr(layer, frozen).requires_grad_(False)
    layer(x).sum().backward()
    assert getattr(layer, frozen).grad is None
    (other,) = {"weight", "bias"} - {frozen}
    assert getattr(layer, other).grad.any()


def test_functional_call():
    layer, other, x = conv(), conv(), torch.randn(X)
    layer(x)
    assert_close(functional_call(layer, dict(other.named_parameters()), (x,)), other(x))
    assert_close(layer(x), expected_of(layer, x))


def test_an_ensemble_by_vmap():
    layers, x = [conv(), conv(), conv()], torch.randn(X)
    parameters, buffers = stack_module_state(layers)
    base = copy.deepcopy(layers[0]).to("meta")
    outputs = vmap(lambda p, b: functional_call(base, (p, b), (x,)))(parameters, buffers)
    for y, layer in zip(outputs, layers, strict=True):
        assert_close(y, layer(x))


# --- torch.nn.utils ------------------------------------------------------------------------------


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("register", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_parametrized_weights(register, grad):
    """The weight is another tensor at every call, and none may be taken for an earlier one."""
    layer, x = conv(), torch.randn(X)
    register(layer)
    layer.eval()  # spectral_norm moves its vectors in training
    with torch.set_grad_enabled(grad):
        assert_close(layer(x), expected_of(layer, x))
        with torch.no_grad():
            for parameter in layer.parametrizations.weight.parameters():
                parameter.add_(torch.rand_like(parameter))
        assert_close(layer(x), expected_of(layer, x))
    if grad:
        layer(x).sum().backward()
        assert all(p.grad.any() for p in layer.parametrizations.weight.parameters())
    parametrize.remove_parametrizations(layer, "weight")
    assert type(layer) is ops.Conv2dReLU
    assert_close(layer(x), expected_of(layer, x))


def test_pruning():
    layer, x = conv(), torch.randn(X)
    layer(x)
    prune.l1_unstructured(layer, "weight", amount=0.5)
    assert_close(layer(x), expected_of(layer, x))
    layer(x).sum().backward()
    assert (layer.weight_orig.grad[layer.weight_mask == 0] == 0).all()
    prune.remove(layer, "weight")
    with torch.no_grad():
        assert_close(layer(x), expected_of(layer, x))
    assert (layer.weight == 0).double().mean().item() == pytest.approx(0.5, abs=1e-3)


def test_parameters_as_a_vector():
    layer, other, x = conv(), conv(), torch.randn(X)
    layer(x)
    vector = nn.utils.parameters_to_vector(other.parameters())
    with torch.no_grad():
        nn.utils.vector_to_parameters(vector, layer.parameters())
        assert_close(layer(x), other(x))


def test_gradient_clipping():
    layer, x = conv(), torch.randn(X)
    (layer(x) * 100).sum().backward()
    nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
    norm = torch.stack([p.grad.norm() for p in layer.parameters()]).norm()
    torch.testing.assert_close(norm, torch.tensor(1.0))


def test_folding_a_batch_norm():
    """torch folds what follows the convolution into its weights, so the ReLU then comes last."""
    layer, norm, x = conv().eval(), nn.BatchNorm2d(32).eval(), torch.randn(X)
    nn.init.uniform_(norm.running_mean, -1, 1)
    nn.init.uniform_(norm.running_var, 0.5, 2)
    folded = fuse_conv_bn_eval(layer, norm)
    assert type(folded) is ops.Conv2dReLU
    with torch.no_grad():
        bare = F.conv2d(x, layer.weight, layer.bias, padding=1)
        assert_close(folded(x), F.relu(norm(bare)))
