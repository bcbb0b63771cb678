"""The registry walk: whatever is registered works under every part of torch that a user meets."""

from __future__ import annotations

import copy
import inspect
import pickle
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

import fastalex
from fastalex import explain, ops, reference
from fastalex.ops._operator import REGISTRY
from tests.support.backends import BACKENDS, running
from tests.support.cases import LAYOUTS, lay_out
from tests.support.samples import COMPOSED, FORWARD, SAMPLES, distinct, strides

BACKWARD = [f"{name}_backward" for name in FORWARD if name not in COMPOSED]
#: Operators on integers: no backward half, no samples of floats. tests/test_augment.py is their walk.
INTEGER = ["augment"]
DIFFERENTIABLE = sorted(set(REGISTRY) - set(INTEGER))
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def operator_call(name: str, dtype: torch.dtype, layout: str, requires_grad: bool) -> tuple:
    """Arguments of ``torch.ops.fastalex.<name>``."""
    sample = SAMPLES[name.removesuffix("_backward")]
    tensors = sample.tensors(dtype, layout)
    forward = REGISTRY[sample.name]
    if name == sample.name:
        return (*(t.requires_grad_(requires_grad) for t in tensors), *sample.positional)
    outputs = forward.run(*tensors, *sample.positional)
    y, offsets = outputs if sample.saves_offsets else (outputs, None)
    grad = lay_out(distinct(tuple(y.shape), dtype), layout)
    x, *weights = (t.requires_grad_(requires_grad) for t in tensors)
    grad.requires_grad_(requires_grad)
    arguments = {
        "lrn": lambda: (grad, x, *sample.positional),
        "max_pool": lambda: (grad, offsets, x.shape[-2:], *sample.positional[:4]),
        "lrn_max_pool": lambda: (grad, x, offsets, *sample.positional[:-2]),
        "conv_relu": lambda: (grad, y, x, weights[0], *sample.positional, [True, True, True]),
        "linear_relu": lambda: (grad, y, x, weights[0], [True, True, True]),
    }
    return arguments[sample.name]()


# --- the walk ------------------------------------------------------------------------------------


def test_every_operator_has_a_sample():
    assert sorted(REGISTRY) == sorted(FORWARD + BACKWARD + INTEGER)


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_registrations(name):
    """A reference of the same name and arguments, a torch backend, a fake, autograd, vmap."""
    operator = REGISTRY[name]
    parameters = list(inspect.signature(getattr(reference, name)).parameters)
    assert parameters == [argument.name for argument in operator.dispatch._schema.arguments]
    assert operator.kernels.kernels[-1].backend == "torch"
    differentiated = [] if name in INTEGER else ["AutogradCPU"]
    for key in ("CPU", "Meta", "FuncTorchBatched", *differentiated):
        has = torch._C._dispatch_has_computed_kernel_for_dispatch_key
        assert has(f"fastalex::{name}", key), key
    assert torch.Tag.pt2_compliant_tag in operator.dispatch.tags


def test_every_forward_operator_is_public_and_explained():
    from fastalex._explain import FUNCTIONS

    assert sorted(FUNCTIONS) == sorted(FORWARD + INTEGER)
    for function in FUNCTIONS.values():
        assert function.__name__ in ops.__all__
        assert function.__doc__
    assert callable(explain)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_opcheck(name, requires_grad, layout):
    args = operator_call(name, torch.float32, layout, requires_grad)
    torch.library.opcheck(REGISTRY[name].dispatch, args)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradcheck(name, layout):
    """The forward operators' own backward, and the backward operators' derivative."""
    args = operator_call(name, torch.float64, layout, requires_grad=True)
    assert torch.autograd.gradcheck(REGISTRY[name].dispatch, args)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("name", FORWARD)
def test_gradcheck_of_the_function(name, layout, backend):
    sample = SAMPLES[name]
    tensors = [t.requires_grad_() for t in sample.tensors(torch.float64, layout)]
    has = {kernel.backend for kernel in REGISTRY[name].kernels.kernels}
    if backend.partition("-")[0] not in has:
        pytest.skip(f"{name} has no backend {backend}")
    if ("conv_relu" in name or name == "linear_relu") and backend != "torch":
        pytest.skip("the CPU engine leaves float64 to torch")
    with running(backend):
        assert torch.autograd.gradcheck(sample.call, tensors)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("name", FORWARD)
def test_gradgradcheck(name, layout):
    sample = SAMPLES[name]
    if name.startswith("conv_relu"):  # float64 is torch's, which two channels a group show as well
        sample = replace(sample, shapes=((2, 4, 2, 3), (2, 2, 2, 3), (2,)))
    tensors = [t.requires_grad_() for t in sample.tensors(torch.float64, layout)]
    assert torch.autograd.gradgradcheck(sample.call, tensors)


# --- results have the layout that the fakes promise ----------------------------------------------

MORE_LAYOUTS = {
    **{layout: (lambda x, layout=layout: lay_out(x, layout)) for layout in LAYOUTS},
    "one_channel": lambda x: lay_out(x, "channels_last")[:, :1],
    "one_row": lambda x: x[:, :, :1],
    "one_pixel": lambda x: lay_out(x, "channels_last")[:, :, :1, :1],
    "empty_batch": lambda x: lay_out(x, "channels_last")[:0],
    "every_second_row": lambda x: lay_out(x, "channels_last")[:, :, ::2],
    "batch_last": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
}


def assert_same_form(actual, promised):
    actual, promised = ([t] if isinstance(t, torch.Tensor) else t for t in (actual, promised))
    for real, fake in zip(actual, promised, strict=True):
        assert real.shape == fake.shape
        assert real.dtype == fake.dtype
        assert strides(real) == strides(fake)


@pytest.mark.parametrize("layout", MORE_LAYOUTS)
@pytest.mark.parametrize("backend", BACKENDS[:2])
@pytest.mark.parametrize("name", FORWARD)
def test_fakes_tell_the_layout(name, backend, layout):
    """Inductor believes the strides of the fake: a kernel that returned others would be an error."""
    sample, operator = SAMPLES[name], REGISTRY[name]
    if backend.partition("-")[0] not in {kernel.backend for kernel in operator.kernels.kernels}:
        pytest.skip(f"{name} has no backend {backend}")
    x, *rest = sample.tensors(torch.float32)
    positional = sample.positional
    x = MORE_LAYOUTS[layout](x)
    if "conv_relu" in name:  # kernels and windows of one fit every size
        rest = [distinct((rest[0].shape[0], x.shape[1], 1, 1), torch.float32), *rest[1:]]
        positional = (*positional[:3], 1, *positional[4:])
        if name in COMPOSED:
            positional = (*positional[:-4], (1, 1), (1, 1), (0, 0), False)
    elif name == "linear_relu":
        rest = [distinct((6, x.shape[-1]), torch.float32), *rest[1:]]
    elif "max_pool" in name:  # a window of one fits every size
        at = 0 if name == "max_pool" else 5
        positional = (*positional[:at], (1, 1), (1, 1), (0, 0), *positional[at + 3 :])
    with running(backend):
        actual = operator.run(x, *rest, *positional)
    with FakeTensorMode() as mode:
        promised = operator.dispatch(*(mode.from_tensor(t) for t in (x, *rest)), *positional)
    assert_same_form(actual, promised)


@pytest.mark.parametrize("backend", BACKENDS[:2])
@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.randn(2, 8, 6, 3, 4),
        lambda: torch.randn(2, 8, 6, 3, 4).contiguous(memory_format=torch.channels_last_3d),
        lambda: torch.randn(2, 8, 6, 3, 4).contiguous(memory_format=torch.channels_last_3d)[
            :, :, ::2
        ],
        lambda: torch.randn(2, 8, 6, 6, 4).contiguous(memory_format=torch.channels_last_3d)[
            :, :, :, ::2
        ],
        lambda: torch.randn(2, 6, 8).transpose(1, 2),
        lambda: torch.randn(2, 8, 6, 8)[..., ::2],
    ],
)
def test_fakes_tell_the_layout_of_lrn_in_other_ranks(make, backend):
    x, operator = make(), REGISTRY["lrn"]
    arguments = SAMPLES["lrn"].positional
    with running(backend):
        actual = operator.run(x, *arguments)
    with FakeTensorMode() as mode:
        assert_same_form(actual, operator.dispatch(mode.from_tensor(x), *arguments))


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("name", FORWARD)
def test_meta_tensors(name, layout):
    sample = SAMPLES[name]
    tensors = sample.tensors(torch.float32, layout)
    result = sample.call(*(t.to("meta") for t in tensors))
    assert result.is_meta
    assert_same_form(sample.call(*tensors), result)


# --- eager corners -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORWARD)
def test_inference_mode(name):
    sample = SAMPLES[name]
    tensors = sample.tensors(torch.float32)
    expected = sample.call(*tensors)
    with torch.inference_mode():
        assert torch.equal(sample.call(*tensors), expected)
        inside = [t.clone().requires_grad_() for t in tensors]
        assert torch.equal(sample.call(*inside), expected)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("grad_layout", ["expanded", "transposed", "row_slice", "channel_slice"])
@pytest.mark.parametrize("name", FORWARD)
def test_gradients_of_any_layout(name, grad_layout, layout):
    sample = SAMPLES[name]
    results = []
    for call in (sample.call, sample.call_stock):
        torch.manual_seed(1)
        leaves = [t.requires_grad_() for t in sample.tensors(torch.float64, layout)]
        y = call(*leaves)
        y.backward(lay_out(torch.randn(y.shape, dtype=torch.float64), grad_layout))
        results.append([leaf.grad for leaf in leaves])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("name", FORWARD)
def test_gradients_of_some_arguments(name):
    """Frozen weights, and an input that needs no gradient."""
    sample = SAMPLES[name]
    for index in range(len(sample.shapes)):
        tensors = sample.tensors(torch.float64)
        tensors[index].requires_grad_()
        (ours,) = torch.autograd.grad(sample.call(*tensors).sum(), tensors[index])
        (stock,) = torch.autograd.grad(sample.call_stock(*tensors).sum(), tensors[index])
        torch.testing.assert_close(ours, stock)


@pytest.mark.parametrize("name", FORWARD)
def test_checkpointing_and_hooks(name):
    sample = SAMPLES[name]
    tensors = [t.requires_grad_() for t in sample.tensors(torch.float64)]
    again = torch.utils.checkpoint.checkpoint(sample.call, *tensors, use_reentrant=False)
    ours = torch.autograd.grad(again.sum(), tensors)
    torch.testing.assert_close(ours, torch.autograd.grad(sample.call(*tensors).sum(), tensors))


class Tagged(torch.Tensor):
    """A subclass as users write them."""


@pytest.mark.parametrize("name", FORWARD)
def test_subclasses_are_kept_as_the_stock_op_keeps_them(name):
    sample = SAMPLES[name]
    x, *rest = sample.tensors(torch.float32)
    tagged = x.as_subclass(Tagged)
    assert type(sample.call(tagged, *rest)) is type(sample.call_stock(tagged, *rest))
    torch.testing.assert_close(
        sample.call(tagged, *rest).as_subclass(torch.Tensor), sample.call(x, *rest)
    )


# --- layers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))],
    ids=["deepcopy", "pickle"],
)
@pytest.mark.parametrize("name", FORWARD)
def test_copies_of_layers(name, duplicate):
    layer = SAMPLES[name].layer()
    x = SAMPLES[name].tensors(torch.float32)[0]
    before = layer(x)
    twin = duplicate(layer)
    assert torch.equal(twin(x), before)
    assert repr(twin) == repr(layer)


@pytest.mark.parametrize("name", FORWARD)
def test_layers_compute_what_stock_layers_do(name):
    sample = SAMPLES[name]
    layer, stock = sample.layer(), sample.stock_layer()
    for ours, theirs in zip(layer.parameters(), stock.parameters(), strict=True):
        ours.data.copy_(theirs.data)
    x = sample.tensors(torch.float32)[0]
    torch.testing.assert_close(layer(x), stock(x))


def test_representations():
    assert repr(ops.Conv2dReLU(3, 8, 3, stride=2)) == (
        "Conv2dReLU(3, 8, kernel_size=(3, 3), stride=(2, 2))"
    )
    assert repr(ops.MaxPool2d(3, 2)) == repr(nn.MaxPool2d(3, 2))
    assert repr(ops.LocalResponseNorm(5)) == repr(nn.LocalResponseNorm(5))
    assert repr(ops.LocalResponseNorm(5, groups=2, alpha_mode="sum")) == (
        "LocalResponseNorm(5, alpha=0.0001, beta=0.75, k=1.0, groups=2, alpha_mode='sum')"
    )
    assert repr(ops.LRNMaxPool2d(5, groups=2)) == (
        "LRNMaxPool2d(5, alpha=0.0001, beta=0.75, k=1.0, kernel_size=3, stride=2, padding=0, "
        "ceil_mode=False, groups=2, alpha_mode='mean')"
    )


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layer", [ops.LinearReLU, ops.Linear])
def test_state_dict_of_the_linear_layers_is_stocks(layer, bias):
    fused, stock = layer(4, 8, bias=bias), nn.Linear(4, 8, bias=bias)
    for source, target in ((fused, stock), (stock, fused)):
        target.load_state_dict(source.state_dict(), strict=True)
    assert list(fused.state_dict()) == list(stock.state_dict())
    assert isinstance(fused, nn.Linear)
    assert fused.state_dict()._metadata == stock.state_dict()._metadata


@pytest.mark.parametrize("bias", [True, False])
def test_state_dict_of_the_convolution_is_stocks(bias):
    arguments = {"stride": 2, "padding": 1, "dilation": 1, "groups": 2, "bias": bias}
    fused, stock = ops.Conv2dReLU(4, 8, 3, **arguments), nn.Conv2d(4, 8, 3, **arguments)
    for source, target in ((fused, stock), (stock, fused)):
        target.load_state_dict(source.state_dict(), strict=True)
    assert list(fused.state_dict()) == list(stock.state_dict())
    assert isinstance(fused, nn.Conv2d)
    assert fused.state_dict()._metadata == stock.state_dict()._metadata


@pytest.mark.parametrize("name", FORWARD)
def test_forced_backend_holds_in_the_backward_pass(name):
    """Not only forward: a whole step inside the block stays on the one backend."""
    sample = SAMPLES[name]
    tensors = [t.requires_grad_() for t in sample.tensors(torch.float32)]
    with fastalex.use_backend("torch"):
        sample.call(*tensors).sum().backward()
    assert all(t.grad is not None for t in tensors)


@pytest.mark.parametrize("sample", SAMPLES.values(), ids=SAMPLES)
def test_plain_dual_tensors_keep_their_tangents(sample):
    """Forward mode without torch.func: the operators have no rule for it, so the reference runs."""
    tensors = sample.tensors(torch.float64)
    tangents = [torch.randn_like(tensor) for tensor in tensors]

    def tangent_of(call):
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(*pair) for pair in zip(tensors, tangents, strict=True)]
            return forward_ad.unpack_dual(call(*duals)).tangent

    torch.testing.assert_close(tangent_of(sample.call), tangent_of(sample.call_stock))
