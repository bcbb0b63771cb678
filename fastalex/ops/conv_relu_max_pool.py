"""Convolution, ReLU, perhaps LRN, and max-pooling in one pass at inference: the full map never reaches memory."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from fastalex._geometry import convolved_size, empty_in_layout, pooled_size
from fastalex.backends import forced, no_refusal
from fastalex.ops import _chain, _cpu, _cpu_conv, _triton
from fastalex.ops._arguments import Pair, lrn_scale
from fastalex.ops._operator import Operator, gradients_may_follow
from fastalex.ops.conv_relu import (
    CONV_RELU,
    CONV_RELU_BACKWARD,
    Conv2dReLU,
    call_as_conv,
    conv_arguments,
    fake_conv,
)
from fastalex.ops.lrn_max_pool import LRN_MAX_POOL, LRN_MAX_POOL_BACKWARD, LRNMaxPool2d
from fastalex.ops.max_pool import MAX_POOL, MAX_POOL_BACKWARD, MaxPool2d, pool_geometry

_CONV = "Tensor input, Tensor weight, Tensor? bias, int[2] stride, int[2] padding, int[2] dilation, int groups"
_LRN = "int size, float scale, float beta, float k, int lrn_groups"
_POOL = "int[2] pool_size, int[2] pool_stride, int[2] pool_padding, bool ceil_mode"

#: Where the arguments after the convolution's begin.
_AFTER_CONV = 7


def _fake(*args: Any) -> Tensor:
    map = fake_conv(*args[:_AFTER_CONV])
    kernel, stride, padding, ceil_mode = args[-4:]
    sides = (
        pooled_size(map.shape[d + 2], kernel[d], stride[d], padding[d], 1, ceil_mode)
        for d in (0, 1)
    )
    return empty_in_layout(args[0], (*map.shape[:2], *sides))


CONV_RELU_MAX_POOL = Operator(f"conv_relu_max_pool({_CONV}, {_POOL}) -> Tensor", _fake)
CONV_RELU_LRN_MAX_POOL = Operator(
    f"conv_relu_lrn_max_pool({_CONV}, {_LRN}, {_POOL}) -> Tensor", _fake
)


# --- the operators in turn: what runs where no kernel does both, and what the backward pass repeats


def _pool(map: Tensor, rest: tuple[Any, ...], save_offsets: bool) -> Any:
    """(pooled map, offsets); ``rest``: the arguments after the convolution's."""
    *lrn, kernel, stride, padding, ceil_mode = rest
    if lrn:
        return LRN_MAX_POOL(map, *lrn, kernel, stride, padding, ceil_mode, save_offsets)
    return MAX_POOL(map, kernel, stride, padding, (1, 1), ceil_mode, save_offsets)


def _in_turn(*args: Any) -> Tensor:
    return _pool(CONV_RELU(*args[:_AFTER_CONV]), args[_AFTER_CONV:], False)[0]  # type: ignore[no-any-return]


def _note_in_turn(*args: Any) -> str:
    return "the convolution and the pool in turn, each on its own best backend"


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.rest = inputs[3:]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Makes the map that the forward pass did not keep once more, then goes back through both operators."""
    input, weight, bias = ctx.saved_tensors
    geometry, rest = ctx.rest[:4], ctx.rest[4:]
    map = CONV_RELU(input, weight, bias, *geometry)
    offsets = _pool(map, rest, True)[1]
    *lrn, kernel, stride, padding, _ = rest
    if lrn:
        grad = LRN_MAX_POOL_BACKWARD(grad, map, offsets, *lrn, kernel, stride, padding)
    else:
        grad = MAX_POOL_BACKWARD(grad, offsets, map.shape[-2:], kernel, stride, padding, (1, 1))
    wanted = [bool(need) for need in ctx.needs_input_grad[:3]]
    wanted[2] = wanted[2] and bias is not None
    grads = CONV_RELU_BACKWARD(grad, map, input, weight, *geometry, wanted)
    kept = (g if want else None for g, want in zip(grads, wanted, strict=True))
    return *kept, *(None,) * len(ctx.rest)


# --- the CPU library


_native = _cpu.native("conv_relu_pool")


def _cpu_conv_relu_pool(*args: Any) -> Tensor:
    input, weight, bias, *geometry = args[:_AFTER_CONV]
    *lrn, kernel, stride, padding, ceil_mode = args[_AFTER_CONV:]
    _cpu_conv.watch(weight)
    # A window of no channels: no normalisation.
    lrn = lrn or [0, 0.0, 0.0, 0.0, 1]
    numbers = _cpu.numbers(*geometry, *lrn, kernel, stride, padding, (1, 1), ceil_mode)
    return _native(input, weight, bias, numbers)  # type: ignore[no-any-return]


def _refuse(*args: Any) -> str | None:
    return _cpu_conv.refuse(*args[:_AFTER_CONV])


def _note(*args: Any) -> str:
    return _cpu_conv.plan(*args[:_AFTER_CONV])


for _operator in (CONV_RELU_MAX_POOL, CONV_RELU_LRN_MAX_POOL):
    _operator.kernels.add("cpu", _cpu_conv_relu_pool, _refuse, note=_note)
    _operator.kernels.add("torch", _in_turn, no_refusal, note=_note_in_turn)
    _operator.register_autograd(_backward, _save)
    _operator.register_autocast(3)
    _operator.register_vmap([0])

CONV_RELU_MAX_POOL.kernels.add(
    "triton", **_triton.kernel("conv_relu_max_pool", "conv_relu_max_pool", contested=True)
)


def _forced_to_parts(operator: Operator, arguments: tuple[Any, ...]) -> bool:
    """Whether a forced backend has kernels for the parts of this call alone."""
    name = forced()
    if name is None:
        return False
    whole, part = (
        next((kernel for kernel in op.kernels.kernels if kernel.backend == name), None)
        for op in (operator, CONV_RELU)
    )
    if whole is None or part is None:
        return True
    return whole.refuse(*arguments) is not None and part.refuse(*arguments[:_AFTER_CONV]) is None


def _pool_link(*lrn_and_pool: Any) -> _chain.Link:
    *lrn, kernel, stride, padding, ceil_mode = lrn_and_pool
    if lrn:
        return _chain.Link(LRN_MAX_POOL, (), lrn_and_pool)
    return _chain.Link(MAX_POOL, (), (kernel, stride, padding, (1, 1), ceil_mode))


def _run(operator: Operator, arguments: tuple[Any, ...], lrn_and_pool: tuple[Any, ...]) -> Tensor:
    """The operator at inference. Where gradients may follow, its parts: they save what the backward pass needs."""
    if _chain.pays(arguments[0], arguments[1:3]):
        conv = _chain.Link(CONV_RELU, arguments[1:3], arguments[3:])
        pool = _pool_link(*lrn_and_pool)
        return _chain.run(arguments[0], (lambda _: conv, lambda _: pool))
    whole = (*arguments, *lrn_and_pool)
    if gradients_may_follow(*arguments[:3]) or _forced_to_parts(operator, whole):
        map = call_as_conv(CONV_RELU, arguments)
        return _pool(map, lrn_and_pool, gradients_may_follow(map))[0]  # type: ignore[no-any-return]
    return call_as_conv(operator, whole)


def _pooling(
    arguments: tuple[Any, ...], size: Any, stride: Any, padding: Any, ceil_mode: bool, name: str
) -> tuple[tuple[Pair, ...], torch.Size]:
    """Checks the pool over the convolution's map; returns its (size, stride, padding) and the map's shape."""
    input, weight, _, steps, pads, spread, _ = arguments
    sides = convolved_size(input.shape[2:], weight.shape[2:], steps, pads, spread)
    shape = torch.Size((input.shape[0], weight.shape[0], *sides))
    labels = ("pool_size", "pool_stride", "pool_padding")
    return pool_geometry(shape, size, stride, padding, 1, ceil_mode, name, labels)[:3], shape


def conv2d_relu_max_pool2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Pair = 1,
    padding: int | Pair | str = 0,
    dilation: int | Pair = 1,
    groups: int = 1,
    *,
    pool_size: int | Pair = 3,
    pool_stride: int | Pair | None = 2,
    pool_padding: int | Pair = 0,
    ceil_mode: bool = False,
) -> Tensor:
    """``max_pool2d(conv2d_relu(input, ...), ...)``; at inference the convolution's full map never reaches memory.

    Equal bit for bit to the two operators in turn. Where gradients are wanted it is those two.

    Args:
        input: [N, C, H, W] or [C, H, W], as in :func:`conv2d_relu`.
        weight, bias, stride, padding, dilation, groups: as in :func:`conv2d_relu`.
        pool_size, pool_stride, pool_padding, ceil_mode: the kernel_size, stride, padding and ceil_mode of
            :func:`max_pool2d`; the stride None is the size.

    Returns:
        The pooled map [N, K, OH, OW], in the input's dtype and layout.

    Raises:
        TypeError, ValueError: as the two operators.

    Scratch on a CPU: what the two operators hold, max(6 MiB, an image of the map), and such an image a thread.
    """
    arguments = conv_arguments(input, weight, bias, stride, padding, dilation, groups)
    name = "conv2d_relu_max_pool2d"
    pool, _ = _pooling(arguments, pool_size, pool_stride, pool_padding, ceil_mode, name)
    output = _run(CONV_RELU_MAX_POOL, arguments, (*pool, ceil_mode))
    return output if input.dim() == 4 else output.squeeze(0)


def conv2d_relu_lrn_max_pool2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Pair = 1,
    padding: int | Pair | str = 0,
    dilation: int | Pair = 1,
    groups: int = 1,
    *,
    size: int,
    alpha: float = 1e-4,
    beta: float = 0.75,
    k: float = 1.0,
    lrn_groups: int = 1,
    alpha_mode: str = "mean",
    pool_size: int | Pair = 3,
    pool_stride: int | Pair | None = 2,
    pool_padding: int | Pair = 0,
    ceil_mode: bool = False,
) -> Tensor:
    """``lrn_max_pool2d(conv2d_relu(input, ...), ...)``; at inference the convolution's full map never reaches memory.

    Equal bit for bit to the two operators in turn. Where gradients are wanted it is those two.

    Args:
        input: [N, C, H, W] or [C, H, W], as in :func:`conv2d_relu`.
        weight, bias, stride, padding, dilation, groups: as in :func:`conv2d_relu`.
        size, alpha, beta, k, alpha_mode: as in :func:`local_response_norm`; ``lrn_groups`` are its groups.
        pool_size, pool_stride, pool_padding, ceil_mode: as in :func:`conv2d_relu_max_pool2d`.

    Returns:
        The pooled map [N, K, OH, OW], in the input's dtype and layout.

    Raises:
        TypeError, ValueError: as the two operators.

    Scratch on a CPU: what the two operators hold, max(6 MiB, an image of the map), and such an image a thread.
    """
    arguments = conv_arguments(input, weight, bias, stride, padding, dilation, groups)
    name = "conv2d_relu_lrn_max_pool2d"
    pool, shape = _pooling(arguments, pool_size, pool_stride, pool_padding, ceil_mode, name)
    scale = lrn_scale(shape, size, alpha, beta, k, lrn_groups, alpha_mode, name)
    lrn = (size, scale, beta, k, lrn_groups)
    output = _run(CONV_RELU_LRN_MAX_POOL, arguments, (*lrn, *pool, ceil_mode))
    return output if input.dim() == 4 else output.squeeze(0)


def _has_hooks(module: nn.Module) -> bool:
    """Whether someone watches a module's inputs, outputs or gradients."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def _convolves(layer: nn.Module) -> bool:
    """Whether a layer can run as one operator with what follows it."""
    return type(layer) is Conv2dReLU and layer.padding_mode == "zeros" and not _has_hooks(layer)


def _pools(layer: nn.Module) -> bool:
    """Whether a layer can run as one operator with the convolution before it."""
    plain = type(layer) is MaxPool2d and layer.dilation in (1, (1, 1)) and not layer.return_indices
    return (plain or type(layer) is LRNMaxPool2d) and not _has_hooks(layer)


def _end_of_chain(layers: list[nn.Module], at: int) -> int:
    """Where the convolutions from ``at`` on end, with a pool behind them."""
    end = at
    while end < len(layers) and _convolves(layers[end]):
        end += 1
    return end + (at < end < len(layers) and _pools(layers[end]))


def _link(layer: Any, map: Tensor) -> _chain.Link:
    """The checked call of a layer of a chain on a map."""
    if isinstance(layer, Conv2dReLU):
        geometry = (layer.stride, layer.padding, layer.dilation, layer.groups)
        arguments = conv_arguments(map, layer.weight, layer.bias, *geometry)  # type: ignore[arg-type]
        return _chain.Link(CONV_RELU, arguments[1:3], arguments[3:])
    window = (layer.kernel_size, layer.stride, layer.padding, 1, layer.ceil_mode)
    if isinstance(layer, MaxPool2d):
        pool = pool_geometry(map.shape, *window, "max_pool2d")[:3]
        return _pool_link(*pool, layer.ceil_mode)
    pool = pool_geometry(map.shape, *window, "lrn_max_pool2d")[:3]
    norm = (layer.beta, layer.k, layer.groups)
    scale = lrn_scale(map.shape, layer.size, layer.alpha, *norm, layer.alpha_mode, "lrn_max_pool2d")
    return _pool_link(layer.size, scale, *norm, *pool, layer.ceil_mode)


class FusedSequential(nn.Sequential):
    """:class:`torch.nn.Sequential` that runs a :class:`Conv2dReLU` and the pool after it as one operator.

    On a GPU, in training, the maps between convolutions and their pool are its own: the kernel that makes a map's
    gradient then masks it by the ReLU. Placeholders (:class:`torch.nn.Identity`) between layers don't count; layers
    that have hooks run by themselves.
    """

    def forward(self, input: Tensor) -> Tensor:
        layers = [layer for layer in self if type(layer) is not nn.Identity or _has_hooks(layer)]
        at = 0
        while at < len(layers):
            end = _end_of_chain(layers, at)
            chain = layers[at:end]
            if len(chain) > 1 and _chain.pays(
                input, (p for layer in chain for p in layer.parameters())
            ):
                input = _chain.run(input, [functools.partial(_link, layer) for layer in chain])
                at = end
            elif len(chain) == 2 and _pools(chain[1]):
                input = _run_merged(input, layers[at], layers[at + 1])  # type: ignore[arg-type]
                at += 2
            else:
                input = layers[at](input)
                at += 1
        return input


def _run_merged(input: Tensor, conv: Conv2dReLU, pool: LRNMaxPool2d | MaxPool2d) -> Tensor:
    if isinstance(pool, MaxPool2d):
        return run_layers(input, conv, pool)
    norm = {name: getattr(pool, name) for name in ("size", "alpha", "beta", "k", "alpha_mode")}
    return run_layers(input, conv, pool, lrn_groups=pool.groups, **norm)


def run_layers(input: Tensor, conv: nn.Conv2d, pool: Any, **norm: Any) -> Tensor:
    """``pool`` of the ReLU of ``conv``, by their attributes; ``norm``: conv2d_relu_lrn_max_pool2d's of LRN, or none."""
    geometry: Any = (conv.stride, conv.padding, conv.dilation, conv.groups)
    function: Any = conv2d_relu_lrn_max_pool2d if norm else conv2d_relu_max_pool2d
    output: Tensor = function(
        input,
        conv.weight,
        conv.bias,
        *geometry,
        pool_size=pool.kernel_size,
        pool_stride=pool.stride,
        pool_padding=pool.padding,
        ceil_mode=pool.ceil_mode,
        **norm,
    )
    return output
