"""The registry walk, traced: every operator under torch.func, torch.compile and torch.export."""

from __future__ import annotations

import io

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from tests.support.cases import lay_out
from tests.support.samples import COMPOSED, FORWARD, SAMPLES, distinct, strides


def summed_squares(call):
    return lambda x, *rest: call(x, *rest).square().sum()


TRANSFORMS = {
    "vmap": lambda call: torch.func.vmap(call, (0,)),
    "vmap_dim_1": lambda call: lambda x: torch.func.vmap(call, 1)(x.movedim(0, 1)),
    "grad": lambda call: lambda x: torch.func.grad(summed_squares(call))(x[0]),
    "vmap_of_grad": lambda call: torch.func.vmap(torch.func.grad(summed_squares(call))),
    "jacrev": lambda call: lambda x: torch.func.jacrev(call)(x[0, :1]),
    "jacfwd": lambda call: lambda x: torch.func.jacfwd(call)(x[0, :1]),
    "jvp": lambda call: lambda x: torch.func.jvp(call, (x[0],), (x[1],)),
    "vjp": lambda call: lambda x: torch.func.vjp(call, x[0])[1](call(x[1])),
    "hessian_vector": lambda call: (
        lambda x: torch.func.grad(
            lambda z: (torch.func.grad(summed_squares(call))(z) * x[1]).sum()
        )(x[0])
    ),
    "reverse_over_forward": lambda call: (
        lambda x: torch.func.grad(lambda z: torch.func.jvp(summed_squares(call), (z,), (x[1],))[1])(
            x[0]
        )
    ),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", FORWARD)
def test_transforms_are_the_stock_ops(name, transform):
    sample = SAMPLES[name]
    x, *rest = sample.tensors(torch.float64)
    x = distinct((2, *x.shape), torch.float64)
    ours = TRANSFORMS[transform](lambda z: sample.call(z, *rest))(x)
    stock = TRANSFORMS[transform](lambda z: sample.call_stock(z, *rest))(x)
    torch.testing.assert_close(ours, stock)


def test_vmap_over_an_ensemble_of_weights():
    sample = SAMPLES["conv_relu"]
    x, weight, bias = sample.tensors(torch.float64)
    weights = distinct((3, *weight.shape), torch.float64)
    biases = distinct((3, *bias.shape), torch.float64)

    def gradients(call):
        loss = summed_squares(call)
        return torch.func.vmap(torch.func.grad(loss, (0, 1, 2)), (None, 0, 0))(x, weights, biases)

    torch.testing.assert_close(gradients(sample.call), gradients(sample.call_stock))


@pytest.mark.parametrize("name", FORWARD)
def test_vmap_over_empty_batches(name):
    sample = SAMPLES[name]
    x, *rest = sample.tensors(torch.float32)
    empty = x.new_empty(3, 0, *x.shape[1:])
    result = torch.func.vmap(lambda z: sample.call(z, *rest))(empty)
    assert result.shape == (3, *sample.call(x[:0], *rest).shape)


def forward_and_backward(call, tensors):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    y = call(*leaves)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape))
    return [y.detach(), *(leaf.grad for leaf in leaves)]


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


COMPILED = [
    pytest.param(dtype, layout, marks=[] if first else pytest.mark.slow)
    for dtype, layout, first in (
        (torch.float32, "channels_last", True),
        (torch.float32, "contiguous", False),
        (torch.bfloat16, "channels_last", False),
        (torch.float32, "transposed", False),
    )
]


@pytest.mark.parametrize(("dtype", "layout"), COMPILED)
@pytest.mark.parametrize("name", FORWARD)
@pytest.mark.usefixtures("fresh_dynamo")
def test_compile(name, dtype, layout):
    sample = SAMPLES[name]
    x, *rest = sample.tensors(dtype)
    tensors = [lay_out(x, layout), *rest]
    compiled = torch.compile(sample.call, fullgraph=True)
    for actual, eager in zip(
        forward_and_backward(compiled, tensors),
        forward_and_backward(sample.call, tensors),
        strict=True,
    ):
        assert torch.equal(actual, eager)
        assert strides(actual) == strides(eager)
    with torch.no_grad():
        assert torch.equal(compiled(*tensors), sample.call(*tensors))


@pytest.mark.parametrize("name", FORWARD)
@pytest.mark.usefixtures("fresh_dynamo")
def test_a_new_batch_size_does_not_recompile(name):
    sample = SAMPLES[name]
    x, *rest = sample.tensors(torch.float32)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(sample.call, fullgraph=True, backend=counter)
    for batch in (17, 19, 23):
        y = x[:1].repeat(batch, 1, 1, 1)
        torch._dynamo.mark_dynamic(y, 0)
        assert torch.equal(compiled(y, *rest), sample.call(y, *rest))
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", FORWARD)
@pytest.mark.usefixtures("fresh_dynamo")
def test_compile_of_the_layer(name):
    """Lists, None and strings among a layer's arguments trace as well."""
    layer = SAMPLES[name].layer()
    x = SAMPLES[name].tensors(torch.float32)[0]
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), layer(x))


@pytest.mark.parametrize("name", FORWARD)
def test_export(name):
    layer = SAMPLES[name].layer().eval()
    x = SAMPLES[name].tensors(torch.float32)[0]
    batch = torch.export.Dim("batch", min=1, max=64)
    with torch.set_grad_enabled(name not in COMPOSED):  # where gradients may follow, their parts
        program = torch.export.export(layer, (x,), dynamic_shapes=({0: batch},))
    targets = {str(node.target) for node in program.graph.nodes}
    assert f"fastalex.{name}.default" in targets
    for y in (x, x.repeat(3, 1, 1, 1)):
        torch.testing.assert_close(program.module()(y), layer(y))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    torch.testing.assert_close(torch.export.load(buffer).module()(x), layer(x))
