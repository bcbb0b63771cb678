"""A fully connected layer and its ReLU in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_relu(input: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
    """relu(input W^T + bias), or without the ReLU."""
    out = F.linear(input, weight, bias)
    return F.relu(out) if relu else out


def linear_relu_backward(
    grad: Tensor,
    output: Tensor | None,
    input: Tensor,
    weight: Tensor,
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of input, weight and bias (of size 0 where the mask says no); ``output`` is ReLU's, None without."""
    masked = grad if output is None else torch.ops.aten.threshold_backward(grad, output, 0)
    nothing = input.new_empty(0)
    rows, inputs = (tensor.unsqueeze(0).flatten(0, -2) for tensor in (masked, input))
    wants_input, wants_weight, wants_bias = output_mask
    return (
        masked @ weight if wants_input else nothing,
        rows.t() @ inputs if wants_weight else nothing,
        rows.sum(0) if wants_bias else nothing,
    )
