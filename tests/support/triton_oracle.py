"""The operators in plain torch, in float64: what the Triton tests compare against."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def lrn(x: Tensor, size: int, scale: float, beta: float, k: float, groups: int) -> Tensor:
    n, c = x.shape[:2]
    squares = x.square().reshape(n, groups, c // groups, -1)
    padded = F.pad(squares, (0, 0, size // 2, size - 1 - size // 2))
    sums = sum(padded[:, :, j : j + c // groups] for j in range(size))
    return x * (k + scale * sums.reshape(x.shape)).pow(-beta)


def max_pool(x: Tensor, kernel_size, stride, padding, dilation, ceil_mode) -> tuple[Tensor, Tensor]:
    """The pooled map and, of each winner, its tap kh * KW + kw."""
    y, index = F.max_pool2d(x, kernel_size, stride, padding, dilation, ceil_mode, return_indices=True)
    row = torch.arange(y.shape[2], device=x.device)[:, None] * stride[0] - padding[0]
    column = torch.arange(y.shape[3], device=x.device)[None, :] * stride[1] - padding[1]
    kh = (index // x.shape[3] - row) // dilation[0]
    kw = (index % x.shape[3] - column) // dilation[1]
    return y, kh * kernel_size[1] + kw


def conv_relu(x: Tensor, weight: Tensor, bias: Tensor | None, stride, padding, dilation, groups) -> Tensor:
    return F.relu(F.conv2d(x, weight, bias, stride, padding, dilation, groups))


def gradients(function, grad: Tensor, *inputs: Tensor | None) -> list[Tensor | None]:
    """Of sum(function(*inputs) * grad), in float64."""
    leaves = [None if t is None else t.double().detach().requires_grad_() for t in inputs]
    wanted = [leaf for leaf in leaves if leaf is not None]
    found = iter(torch.autograd.grad(function(*leaves), wanted, grad.double()))
    return [None if leaf is None else next(found) for leaf in leaves]
