"""Convolution, bias and ReLU in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Ints = Sequence[int]


def _wide(tensor: Tensor) -> torch.dtype:
    """float16 convolutions on a CPU run in float32: torch's own are slow and round in between."""
    narrow = tensor.dtype is torch.float16 and not tensor.is_cuda
    return torch.float32 if narrow else tensor.dtype


def conv_relu(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    groups: int,
) -> Tensor:
    """relu(conv2d(input, weight) + bias)."""
    dtype = _wide(input)
    bias = None if bias is None else bias.to(dtype)
    out = F.conv2d(input.to(dtype), weight.to(dtype), bias, stride, padding, dilation, groups)
    return F.relu(out).to(input.dtype)


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
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of input, weight and bias (of size 0 where the mask says no); the ReLU's mask is the output's sign."""
    dtype = _wide(input)
    masked = torch.ops.aten.threshold_backward(grad, output, 0).to(dtype)
    grads = torch.ops.aten.convolution_backward(
        masked,
        input.to(dtype),
        weight.to(dtype),
        [weight.shape[0]],
        stride,
        padding,
        dilation,
        False,
        [0, 0],
        groups,
        output_mask,
    )
    kept = [
        gradient.to(input.dtype) if wanted else input.new_empty(0)
        for gradient, wanted in zip(grads, output_mask, strict=True)
    ]
    return kept[0], kept[1], kept[2]
