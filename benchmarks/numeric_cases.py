"""Random calls of every operator for numerics.py: what fastalex runs, what stock torch runs, and what errors are of."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastalex import ops, reference
from fastalex.ops.linear_relu import LINEAR_RELU_BACKWARD
from fastalex.ops.lrn_max_pool import LRN_MAX_POOL_BACKWARD
from fastalex.reference.lrn import _denominator_base, _window_sum


@dataclass(frozen=True)
class Case:
    """One random call: what fastalex runs, what stock torch runs, the oracle and the magnitude of its terms."""

    tensors: tuple[Tensor, ...]  # float64, to be rounded to the dtype
    ours: Callable[..., Tensor]
    stock: Callable[..., Tensor]
    magnitude: Callable[..., Tensor]


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def lrn_case(draw: random.Random) -> Case:
    shape = (draw.randint(1, 2), draw.randint(1, 40), draw.randint(1, 9), draw.randint(1, 9))
    arguments = (
        *(draw.randint(1, 9), draw.choice((1e-4, 0.01, 0.3))),
        *(draw.choice((0.75, 0.5, 1.0, 0.6)), draw.choice((1.0, 2.0))),
    )
    return Case(
        (_normal(*shape) * draw.choice((1.0, 30.0)),),
        lambda x: ops.local_response_norm(x, *arguments),
        lambda x: F.local_response_norm(x, *arguments),
        lambda x: F.local_response_norm(x, *arguments).abs(),
    )


def lrn_backward_case(draw: random.Random) -> Case:
    shape = (draw.randint(1, 2), draw.randint(1, 40), draw.randint(1, 9), draw.randint(1, 9))
    size, alpha = draw.randint(1, 9), draw.choice((1e-4, 0.01, 0.3))
    beta, k = draw.choice((0.75, 0.5, 1.0, 0.6)), draw.choice((1.0, 2.0))

    def gradient(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(x: Tensor, grad: Tensor) -> Tensor:
            leaf = x.detach().requires_grad_()
            return torch.autograd.grad(function(leaf, size, alpha, beta, k), leaf, grad)[0]

        return run

    return Case(
        (_normal(*shape), _normal(*shape)),
        gradient(ops.local_response_norm),
        gradient(F.local_response_norm),
        lambda x, grad: _lrn_terms(x, grad, size, alpha / size, beta, k),
    )


def _lrn_terms(x: Tensor, grad: Tensor, size: int, scale: float, beta: float, k: float) -> Tensor:
    """The terms that an element of normalization's gradient sums."""
    s = _denominator_base(x, size, scale, k, 1)
    direct = grad.abs() * s**-beta
    shared = _window_sum((direct * x / s).abs(), size - 1 - size // 2, size // 2, 1)
    return direct + 2 * scale * beta * x.abs() * shared


def _pool_geometry(draw: random.Random) -> tuple[tuple[int, int], int, int, int]:
    kernel = draw.choice((2, 3, 3, 5))
    return (draw.randint(5, 14), draw.randint(5, 14)), kernel, draw.randint(1, 3), kernel // 2


def max_pool_case(draw: random.Random) -> Case:
    size, *geometry = _pool_geometry(draw)
    return Case(
        (_normal(draw.randint(1, 2), draw.randint(1, 24), *size),),
        lambda x: ops.max_pool2d(x, *geometry),
        lambda x: F.max_pool2d(x, *geometry),
        lambda x: F.max_pool2d(x.abs(), *geometry),
    )


def max_pool_backward_case(draw: random.Random) -> Case:
    """The winners are of x rounded to bfloat16, so that every dtype has the same."""
    size, *geometry = _pool_geometry(draw)
    x = _normal(1, draw.randint(1, 24), *size).to(torch.bfloat16).half().double()
    outputs = F.max_pool2d(x, *geometry).shape

    def gradient(pool: Callable[..., Tensor], x: Tensor, grad: Tensor) -> Tensor:
        leaf = x.detach().requires_grad_()
        return torch.autograd.grad(pool(leaf, *geometry), leaf, grad)[0]

    return Case(
        (x, _normal(*outputs)),
        lambda x, grad: gradient(ops.max_pool2d, x, grad),
        lambda x, grad: gradient(F.max_pool2d, x, grad),
        lambda x, grad: gradient(F.max_pool2d, x, grad.abs()),
    )


def lrn_max_pool_case(draw: random.Random) -> Case:
    size, kernel, stride, padding = _pool_geometry(draw)
    lrn = (5, draw.choice((1e-4, 0.3)), 0.75, draw.choice((1.0, 2.0)))

    def stock(x: Tensor) -> Tensor:
        return F.max_pool2d(F.local_response_norm(x, *lrn), kernel, stride, padding)

    return Case(
        (_normal(1, draw.randint(1, 40), *size),),
        lambda x: ops.lrn_max_pool2d(x, *lrn, kernel, stride, padding),
        stock,
        lambda x: stock(x).abs(),
    )


def lrn_max_pool_backward_case(draw: random.Random) -> Case:
    """The winners are given, since near ties fall otherwise in float64."""
    size, kernel, stride, padding = _pool_geometry(draw)
    norm = (5, draw.choice((2e-5, 0.06)), 0.75, draw.choice((1.0, 2.0)), 1)
    pool = ((kernel,) * 2, (stride,) * 2, (padding,) * 2)
    x = _normal(1, draw.randint(1, 40), *size)
    _, offsets = reference.lrn_max_pool(x, *norm, *pool, False, True)

    def unpooled(grad: Tensor) -> Tensor:
        return reference.max_pool_backward(grad, offsets, size, *pool, (1, 1))

    def stock(x: Tensor, grad: Tensor) -> Tensor:
        leaf = x.detach().requires_grad_()
        y = F.local_response_norm(leaf, norm[0], norm[0] * norm[1], *norm[2:4])
        return torch.autograd.grad(y, leaf, unpooled(grad))[0]

    return Case(
        (x, _normal(*offsets.shape)),
        lambda x, grad: LRN_MAX_POOL_BACKWARD.run(grad, x, offsets, *norm, *pool),
        stock,
        lambda x, grad: _lrn_terms(x, unpooled(grad.abs()), *norm[:4]),
    )


def _conv(draw: random.Random) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[int, int, int, int]]:
    groups = draw.choice((1, 1, 2))
    inputs, outputs = groups * draw.randint(1, 24), groups * draw.randint(1, 24)
    kernel, stride = draw.choice((1, 3, 3, 5)), draw.choice((1, 1, 2))
    x = _normal(draw.randint(1, 2), inputs, draw.randint(5, 15), draw.randint(5, 15)).relu()
    weight = _normal(outputs, inputs // groups, kernel, kernel) / kernel
    return (x, weight, _normal(outputs)), (stride, kernel // 2, 1, groups)


def conv_relu_case(draw: random.Random) -> Case:
    tensors, geometry = _conv(draw)
    return Case(
        tensors,
        lambda *t: ops.conv2d_relu(*t, *geometry),
        lambda *t: F.relu(F.conv2d(*t, *geometry)),
        lambda x, w, b: F.conv2d(x.abs(), w.abs(), b.abs(), *geometry),
    )


def conv_relu_backward_case(draw: random.Random) -> Case:
    """The weight's gradient; a bias of 1000 keeps every ReLU open, since rounding may flip one near zero."""
    (x, weight, bias), geometry = _conv(draw)
    grad = _normal(*F.conv2d(x, weight, None, *geometry).shape)

    def gradient(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor) -> Tensor:
            leaf = weight.detach().requires_grad_()
            return torch.autograd.grad(function(x, leaf, bias, *geometry), leaf, grad)[0]

        return run

    return Case(
        (x, weight, torch.full_like(bias, 1000.0), grad),
        gradient(ops.conv2d_relu),
        gradient(lambda *t: F.relu(F.conv2d(*t))),
        lambda x, w, b, g: gradient(F.conv2d)(x.abs(), w, b, g.abs()),
    )


def conv_relu_max_pool_case(draw: random.Random) -> Case:
    tensors, geometry = _conv(draw)
    return Case(
        tensors,
        lambda *t: ops.conv2d_relu_max_pool2d(*t, *geometry, pool_size=2),
        lambda *t: F.max_pool2d(F.relu(F.conv2d(*t, *geometry)), 2, 2),
        lambda x, w, b: F.max_pool2d(F.conv2d(x.abs(), w.abs(), b.abs(), *geometry), 2, 2),
    )


def conv_relu_lrn_max_pool_case(draw: random.Random) -> Case:
    """The map is rounded to the dtype before it is normalised, as by the operators in turn; the oracle's is not."""
    tensors, geometry = _conv(draw)
    norm = (5, draw.choice((1e-4, 0.3)), 0.75, draw.choice((1.0, 2.0)))
    names = dict(zip(("size", "alpha", "beta", "k"), norm, strict=True))

    def stock(*t: Tensor) -> Tensor:
        return F.max_pool2d(F.local_response_norm(F.relu(F.conv2d(*t, *geometry)), *norm), 2, 2)

    return Case(
        tensors,
        lambda *t: ops.conv2d_relu_lrn_max_pool2d(*t, *geometry, **names, pool_size=2),
        stock,
        lambda x, w, b: (
            F.max_pool2d(F.conv2d(x.abs(), w.abs(), b.abs(), *geometry), 2, 2) * norm[3] ** -0.75
        ),
    )


def _linear(draw: random.Random) -> tuple[Tensor, Tensor, Tensor]:
    rows, inputs, outputs = draw.randint(1, 40), draw.randint(1, 300), draw.randint(1, 60)
    return _normal(rows, inputs), _normal(outputs, inputs) / inputs**0.5, _normal(outputs)


def linear_relu_case(draw: random.Random) -> Case:
    return Case(
        _linear(draw),
        ops.linear_relu,
        lambda *t: F.relu(F.linear(*t)),
        lambda x, w, b: F.linear(x.abs(), w.abs(), b.abs()),
    )


def linear_relu_backward_case(draw: random.Random) -> Case:
    """The weight's gradient, every ReLU open."""
    x, weight, _ = _linear(draw)
    return Case(
        (x, weight, _normal(len(x), len(weight))),
        lambda x, w, g: LINEAR_RELU_BACKWARD.run(g, None, x, w, [False, True, False])[1],
        lambda x, w, g: g.t() @ x,
        lambda x, w, g: g.abs().t() @ x.abs(),
    )


def augment_case(draw: random.Random) -> Case:
    """The dtype is the result's; shift and mean are float32."""
    images = torch.randint(0, 256, (2, 9, 11, 3), dtype=torch.uint8)
    corners, mirrored = torch.tensor([[1, 2], [0, 3]]), torch.tensor([False, True])
    scale = draw.choice((1.0, 1 / 58))

    def ours(shift: Tensor, mean: Tensor) -> Tensor:
        given = (shift.float(), mean.float(), 7)
        return ops.augment(images, corners, mirrored, *given, scale=scale, dtype=shift.dtype)

    def stock(shift: Tensor, mean: Tensor) -> Tensor:
        wide = torch.float64 if shift.dtype is torch.float64 else torch.float32
        crops = [images[0, 1:8, 2:9], images[1, 0:7, 3:10].flip(1)]
        values = torch.stack(crops).to(wide) + shift.to(wide)[:, None, None] - mean.to(wide)
        return (values * scale).to(shift.dtype).permute(0, 3, 1, 2)

    return Case(
        (_normal(2, 3) * 10, torch.rand(3, dtype=torch.float64) * 255),
        ours,
        stock,
        lambda shift, mean: stock(shift.abs(), -mean.abs()),
    )


CASES: dict[str, Callable[[random.Random], Case]] = {
    "lrn": lrn_case,
    "lrn_backward": lrn_backward_case,
    "max_pool": max_pool_case,
    "max_pool_backward": max_pool_backward_case,
    "lrn_max_pool": lrn_max_pool_case,
    "lrn_max_pool_backward": lrn_max_pool_backward_case,
    "conv_relu": conv_relu_case,
    "conv_relu_backward": conv_relu_backward_case,
    "conv_relu_max_pool": conv_relu_max_pool_case,
    "conv_relu_lrn_max_pool": conv_relu_lrn_max_pool_case,
    "linear_relu": linear_relu_case,
    "linear_relu_backward": linear_relu_backward_case,
    "augment": augment_case,
}
