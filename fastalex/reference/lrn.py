"""Local response normalization in plain torch: the definition, and the oracle of every test."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _compute_dtype(input: Tensor) -> torch.dtype:
    return torch.float32 if input.dtype in (torch.float16, torch.bfloat16) else input.dtype


def _window_sum(values: Tensor, before: int, after: int, groups: int) -> Tensor:
    """Sums over channels [c - before, c + after] of each channel c, inside its group."""
    grouped = values.unflatten(1, (groups, values.shape[1] // groups))
    channels = grouped.shape[2]
    before, after = min(before, channels), min(after, channels)
    padded = F.pad(grouped, (0, 0) * (grouped.dim() - 3) + (before, after))
    total = padded.narrow(2, 0, channels)
    for shift in range(1, before + after + 1):
        total = total + padded.narrow(2, shift, channels)
    return total.flatten(1, 2)


def _denominator_base(x: Tensor, size: int, scale: float, k: float, groups: int) -> Tensor:
    return k + scale * _window_sum(x * x, size // 2, size - 1 - size // 2, groups)


def lrn(input: Tensor, size: int, scale: float, beta: float, k: float, groups: int) -> Tensor:
    """y_c = x_c (k + scale * sum of x_j^2 over the window of c)^-beta.

    ImageNet Classification with Deep Convolutional Neural Networks, section 3.3; scale is alpha / n in torch, Caffe
    and cuda-convnet2, and alpha in the formula as printed.
    """
    x = input.to(_compute_dtype(input))
    y = x * _denominator_base(x, size, scale, k, groups) ** -beta
    return y.to(input.dtype)


def lrn_backward(
    grad: Tensor, input: Tensor, size: int, scale: float, beta: float, k: float, groups: int
) -> Tensor:
    """gx_c = g_c s_c^-beta - 2 scale beta x_c * sum of g_j x_j s_j^(-beta-1) over the j whose window holds c."""
    dtype = _compute_dtype(input)
    x, g = input.to(dtype), grad.to(dtype)
    s = _denominator_base(x, size, scale, k, groups)
    direct = g * s**-beta
    # Window membership is mirrored: for an even size, c is in the window of more channels after it than before.
    shared = _window_sum(direct * x / s, size - 1 - size // 2, size // 2, groups)
    return (direct - 2 * scale * beta * x * shared).to(input.dtype)
