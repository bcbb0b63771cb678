"""The operators in plain torch, in float64: what the Triton tests compare against."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def window_sums(v: Tensor, before: int, size: int, groups: int) -> Tensor:
    """The sum of v over `size` channels from `before` ahead, inside each channel's group."""
    n, c = v.shape[:2]
    padded = F.pad(v.reshape(n, groups, c // groups, -1), (0, 0, before, size - 1 - before))
    return sum(padded[:, :, j : j + c // groups] for j in range(size)).reshape(v.shape)


def lrn(x: Tensor, size: int, scale: float, beta: float, k: float, groups: int) -> Tensor:
    return x * (k + scale * window_sums(x.square(), size // 2, size, groups)).pow(-beta)


def lrn_gradient_magnitude(
    x: Tensor, grad: Tensor, size: int, scale: float, beta: float, k: float, groups: int
) -> Tensor:
    """The sum of the absolute values that each element of the gradient of lrn adds up."""
    x, grad = x.double(), grad.double()
    s = k + scale * window_sums(x.square(), size // 2, size, groups)
    q = (grad * x).abs() * s.pow(-beta - 1)
    spread = window_sums(q, size - 1 - size // 2, size, groups)
    return grad.abs() * s.pow(-beta) + 2 * scale * beta * x.abs() * spread


def max_pool(x: Tensor, kernel_size, stride, padding, dilation, ceil_mode) -> tuple[Tensor, Tensor]:
    """The pooled map and, of each winner, its tap kh * KW + kw."""
    y, index = F.max_pool2d(
        x, kernel_size, stride, padding, dilation, ceil_mode, return_indices=True
    )
    row = torch.arange(y.shape[2], device=x.device)[:, None] * stride[0] - padding[0]
    column = torch.arange(y.shape[3], device=x.device)[None, :] * stride[1] - padding[1]
    kh = (index // x.shape[3] - row) // dilation[0]
    kw = (index % x.shape[3] - column) // dilation[1]
    return y, kh * kernel_size[1] + kw


def conv_relu(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride, padding, dilation, groups
) -> Tensor:
    return F.relu(F.conv2d(x, weight, bias, stride, padding, dilation, groups))


def gradients(function, grad: Tensor, *inputs: Tensor | None) -> list[Tensor | None]:
    """Of sum(function(*inputs) * grad), in float64."""
    leaves = [None if t is None else t.double().detach().requires_grad_() for t in inputs]
    wanted = [leaf for leaf in leaves if leaf is not None]
    found = iter(torch.autograd.grad(function(*leaves), wanted, grad.double()))
    return [None if leaf is None else next(found) for leaf in leaves]
