"""Layers in turn whose maps nobody else sees: a ReLU's mask is applied where the gradient of its map is made.

Whoever asks for the gradient of a map must get all of it, masked or not. Between the layers of a chain nobody can ask:
the kernel that makes a map's gradient, a pool's or the next convolution's, leaves out what the ReLU stops, and spares
the convolution the pass that would (kernels/conv_relu_backward.py counts the bytes).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastalex.backends import forced
from fastalex.ops._operator import (
    Operator,
    autocasting,
    gradients_may_follow,
    is_plain,
    where_forced,
)
from fastalex.ops.conv_relu import CONV_RELU, CONV_RELU_BACKWARD
from fastalex.ops.lrn_max_pool import LRN_MAX_POOL_BACKWARD
from fastalex.ops.max_pool import MAX_POOL, MAX_POOL_BACKWARD


class Link(NamedTuple):
    """A layer: a convolution with its ReLU, or, as the last one, a pool."""

    operator: Operator
    tensors: tuple[Tensor | None, ...]  # weight and bias, or none
    rest: tuple[Any, ...]  # the operator's arguments after its tensors, of a pool up to ceil_mode


def pays(input: Tensor, parameters: Iterable[Tensor | None]) -> bool:
    """Whether a chain can spare a pass: gradients may follow, on kernels that may be able to mask them."""
    if not (input.is_cuda or forced() == "triton"):
        return False
    tensors = (input, *parameters)
    return (
        input.dim() == 4
        and is_plain(*tensors)
        and gradients_may_follow(*tensors)
        and not autocasting(input)
    )


def run(input: Tensor, layers: Iterable[Callable[[Tensor], Link]]) -> Tensor:
    """The map of the last of ``layers``, each a function of the map before it; only that one may be seen elsewhere."""
    links, kept, map = [], [], input
    with torch.no_grad():
        for layer in layers:
            link = layer(map)
            links.append(link)
            if link.operator is CONV_RELU:
                map = CONV_RELU.run(map, *link.tensors, *link.rest)
                kept.append(map)
            else:
                map, offsets = link.operator.run(map, *link.rest, True)
                kept.append(offsets)
    parameters = (tensor for link in links for tensor in link.tensors)
    calls = [(link.operator, link.rest) for link in links]
    return _Chain.apply(calls, kept, map, input, *parameters)  # type: ignore[no-any-return]


def _again(calls: list[tuple[Operator, Any]], input: Tensor, *parameters: Tensor | None) -> Tensor:
    """The chain's output as its operators in turn make it, each with its own gradient."""
    for i, (operator, rest) in enumerate(calls):
        if operator is CONV_RELU:
            input = operator(input, *parameters[2 * i : 2 * i + 2], *rest)
        else:
            input = operator(input, *rest, True)[0]
    return input


class _Chain(torch.autograd.Function):
    """``tensors``: the input, then weight and bias of each convolution. ``kept``: the maps, and a pool's offsets."""

    @staticmethod
    def forward(
        ctx: Any, calls: list[Any], kept: list[Tensor], output: Tensor, *tensors: Tensor | None
    ) -> Tensor:
        ctx.calls, ctx.forced = calls, forced()
        ctx.save_for_backward(*tensors, *kept)
        return output

    @staticmethod
    @where_forced
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[3:]
        saved = ctx.saved_tensors  # once: a checkpoint makes them anew at every look
        tensors, kept = saved[: len(needs)], saved[len(needs) :]
        grads: list[Tensor | None] = [None] * len(needs)
        if torch.is_grad_enabled():  # the maps' own derivatives are wanted too
            wanted = [at for at, need in enumerate(needs) if need]
            output = _again(ctx.calls, *tensors)
            found = torch.autograd.grad(
                output, [tensors[at] for at in wanted], grad, create_graph=True
            )
            for at, gradient in zip(wanted, found, strict=True):
                grads[at] = gradient
            return None, None, None, *grads
        masked = False  # whether `grad` is zero where its map is
        for i, (operator, rest) in reversed(list(enumerate(ctx.calls))):
            map = kept[i - 1] if i else tensors[0]
            parameters = slice(2 * i + 1, 2 * i + 3)
            wants_map = any(needs[: parameters.start])
            if operator is CONV_RELU:
                weight = tensors[parameters.start]
                made, masked = CONV_RELU_BACKWARD.run_knowing(
                    (grad, kept[i], map, weight, *rest, [wants_map, *needs[parameters]]),
                    grad_is_masked=masked,
                    rectified_input=i > 0,
                )
                grad = made[0]
                grads[parameters] = [
                    g if need else None for g, need in zip(made[1:], needs[parameters], strict=True)
                ]
            else:
                plain = operator is MAX_POOL
                forward = (kept[i], map.shape[-2:]) if plain else (map, kept[i])
                backward = MAX_POOL_BACKWARD if plain else LRN_MAX_POOL_BACKWARD
                grad, masked = backward.run_knowing((grad, *forward, *rest[:-1]), rectified=map)
            if not wants_map:
                break
        else:
            grads[0] = grad
        return None, None, None, *grads
