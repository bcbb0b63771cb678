"""What each operator must cost at least: bytes to and from memory, and floating-point operations.

One function per operator of ``torch.ops.fastalex``, taking the operator's own arguments. Only
shapes and dtypes are read, so meta tensors do. Bytes are compulsory traffic: every input read once,
every result written once, the state saved for the backward pass included. A power counts as one
operation, as does a comparison.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastalex._geometry import convolved_size, offsets_dtype, pooled_size

Ints = Sequence[int]


@dataclass(frozen=True)
class Cost:
    """Bytes moved and floating-point operations."""

    bytes: int
    flops: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.bytes + other.bytes, self.flops + other.flops)


def _bytes(*tensors: Tensor | None) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def _pooled(
    input: Tensor, kernel: Ints, stride: Ints, padding: Ints, dilation: Ints, ceil_mode: bool
) -> int:
    """Outputs of a pool."""
    height, width = (
        pooled_size(input.shape[d + 2], kernel[d], stride[d], padding[d], dilation[d], ceil_mode)
        for d in (0, 1)
    )
    return input.shape[0] * input.shape[1] * height * width


def lrn(input: Tensor, size: int, scale: float, beta: float, k: float, groups: int) -> Cost:
    """bytes = x + y; flops = elements * (size + 4).

    A square, size - 1 additions, the scale and k, the power, the product.
    """
    return Cost(2 * _bytes(input), input.numel() * (size + 4))


def lrn_backward(
    grad: Tensor, input: Tensor, size: int, scale: float, beta: float, k: float, groups: int
) -> Cost:
    """bytes = g + x + gx; flops = elements * (2 size + 10).

    s again (size + 2), its power, g s^-beta, times x / s (2), size - 1 additions, and the last
    product, scaling and difference (4).
    """
    return Cost(_bytes(grad) + 2 * _bytes(input), input.numel() * (2 * size + 10))


def max_pool(
    input: Tensor,
    kernel_size: Ints,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    ceil_mode: bool,
    save_offsets: bool,
) -> Cost:
    """bytes = x + y + one offset an output if saved; flops = outputs * (KH KW - 1)."""
    outputs = _pooled(input, kernel_size, stride, padding, dilation, ceil_mode)
    window = kernel_size[0] * kernel_size[1]
    saved = offsets_dtype(kernel_size).itemsize if save_offsets else 0
    moved = _bytes(input) + outputs * (input.element_size() + saved)
    return Cost(moved, outputs * (window - 1))


def max_pool_backward(
    grad: Tensor,
    offsets: Tensor,
    input_size: Ints,
    kernel_size: Ints,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
) -> Cost:
    """bytes = g + offsets + gx; flops = outputs: each gradient is added once."""
    elements = grad.shape[0] * grad.shape[1] * input_size[0] * input_size[1]
    return Cost(_bytes(grad, offsets) + elements * grad.element_size(), grad.numel())


def lrn_max_pool(
    input: Tensor,
    size: int,
    scale: float,
    beta: float,
    k: float,
    groups: int,
    kernel_size: Ints,
    stride: Ints,
    padding: Ints,
    ceil_mode: bool,
    save_offsets: bool,
) -> Cost:
    """bytes = x + y + one offset an output if saved; flops = those of lrn and of max_pool."""
    pool = max_pool(input, kernel_size, stride, padding, (1, 1), ceil_mode, save_offsets)
    return Cost(pool.bytes, pool.flops + lrn(input, size, scale, beta, k, groups).flops)


def lrn_max_pool_backward(
    grad: Tensor,
    input: Tensor,
    offsets: Tensor,
    size: int,
    scale: float,
    beta: float,
    k: float,
    groups: int,
    kernel_size: Ints,
    stride: Ints,
    padding: Ints,
) -> Cost:
    """bytes = g + x + offsets + gx; flops = those of lrn_backward and of max_pool_backward."""
    norm = lrn_backward(input, input, size, scale, beta, k, groups)
    return Cost(_bytes(grad, offsets) + 2 * _bytes(input), norm.flops + grad.numel())


def _conv_map(input: Tensor, weight: Tensor, stride: Ints, padding: Ints, dilation: Ints) -> Tensor:
    """A meta tensor of what a convolution makes."""
    sides = convolved_size(input.shape[2:], weight.shape[2:], stride, padding, dilation)
    shape = (input.shape[0], weight.shape[0], *sides)
    return torch.empty(shape, dtype=input.dtype, device="meta")


def _convolved(
    input: Tensor, weight: Tensor, stride: Ints, padding: Ints, dilation: Ints
) -> tuple[int, int]:
    """Outputs of a convolution and the multiply-adds of one."""
    return _conv_map(input, weight, stride, padding, dilation).numel(), weight[0].numel()


def conv_relu(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    groups: int,
) -> Cost:
    """bytes = x + w + b + y; flops = outputs * (2 C/groups R S + 2), by direct convolution.

    Winograd's algorithm needs fewer, so a good kernel can exceed this roof.
    """
    outputs, depth = _convolved(input, weight, stride, padding, dilation)
    moved = _bytes(input, weight, bias) + outputs * input.element_size()
    return Cost(moved, outputs * (2 * depth + 1 + (bias is not None)))


def conv_relu_max_pool(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    groups: int,
    pool_size: Ints,
    pool_stride: Ints,
    pool_padding: Ints,
    ceil_mode: bool,
) -> Cost:
    """bytes = x + w + b + the pooled y; flops = those of conv_relu and of max_pool."""
    conv = conv_relu(input, weight, bias, stride, padding, dilation, groups)
    map = _conv_map(input, weight, stride, padding, dilation)
    pool = max_pool(map, pool_size, pool_stride, pool_padding, (1, 1), ceil_mode, False)
    return Cost(conv.bytes + pool.bytes - 2 * _bytes(map), conv.flops + pool.flops)


def conv_relu_lrn_max_pool(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    groups: int,
    size: int,
    scale: float,
    beta: float,
    k: float,
    lrn_groups: int,
    pool_size: Ints,
    pool_stride: Ints,
    pool_padding: Ints,
    ceil_mode: bool,
) -> Cost:
    """bytes = x + w + b + the pooled y; flops = those of conv_relu and of lrn_max_pool."""
    conv = (input, weight, bias, stride, padding, dilation, groups)
    rest = conv_relu_max_pool(*conv, pool_size, pool_stride, pool_padding, ceil_mode)
    map = _conv_map(input, weight, stride, padding, dilation)
    return Cost(rest.bytes, rest.flops + lrn(map, size, scale, beta, k, lrn_groups).flops)


def conv_relu_backward(
    grad: Tensor,
    output: Tensor,
    input: Tensor,
    weight: Tensor,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    groups: int,
    output_mask: Sequence[bool],
) -> Cost:
    """bytes = g + y + x + w + the gradients asked for; flops = outputs * (1 + 2 C/groups R S each).

    The mask is one operation an output, the bias gradient one more.
    """
    outputs, depth = _convolved(input, weight, stride, padding, dilation)
    wants_input, wants_weight, wants_bias = output_mask
    moved = _bytes(grad, output, input, weight)
    moved += wants_input * _bytes(input) + wants_weight * _bytes(weight)
    moved += wants_bias * weight.shape[0] * weight.element_size()
    flops = 1 + 2 * depth * (wants_input + wants_weight) + wants_bias
    return Cost(moved, outputs * flops)


def augment(
    images: Tensor,
    corners: Tensor,
    mirrored: Tensor,
    shift: Tensor,
    mean: Tensor,
    size: Ints,
    scale: float,
    pitch: int,
    dtype: torch.dtype,
) -> Cost:
    """bytes = the crops, their constants, y with the zeros between its rows; flops = elements * 3."""
    rows = images.shape[0] * size[0] * images.shape[3]
    moved = rows * (size[1] + pitch * dtype.itemsize)
    return Cost(moved + _bytes(corners, mirrored, shift, mean), rows * size[1] * 3)


def linear_relu(input: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> Cost:
    """bytes = x + w + b + y; flops = outputs * (2 I + 1 for the bias + 1 for the ReLU)."""
    outputs = input.numel() // max(input.shape[-1], 1) * weight.shape[0]
    moved = _bytes(input, weight, bias) + outputs * input.element_size()
    return Cost(moved, outputs * (2 * weight.shape[1] + (bias is not None) + relu))


def linear_relu_backward(
    grad: Tensor,
    output: Tensor | None,
    input: Tensor,
    weight: Tensor,
    output_mask: Sequence[bool],
) -> Cost:
    """bytes = g + y + the gradients asked for + what each reads (gx w, gw x); flops = outputs * (2 I each + 2).

    The mask is one operation an output, the bias gradient the other.
    """
    wants_input, wants_weight, wants_bias = output_mask
    moved = _bytes(grad, output)
    moved += (wants_input + wants_weight) * (_bytes(weight) + _bytes(input))
    moved += wants_bias * weight.shape[0] * weight.element_size()
    flops = 2 * weight.shape[1] * (wants_input + wants_weight) + wants_bias + (output is not None)
    return Cost(moved, grad.numel() * flops)


def sgd_step(parameters: Sequence[Any], item: int = 4) -> Cost:
    """SGD with momentum: weight, gradient, velocity read, two of them written; 4 flops each."""
    elements = sum(parameter.numel() for parameter in parameters)
    return Cost(5 * item * elements, 4 * elements)
