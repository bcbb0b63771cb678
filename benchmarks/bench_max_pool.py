"""Rows of ``max_pool``: the three overlapping 3x3/2 pools of AlexNet."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.operation import Operation, cases_of_maps
from fastalex import costs, ops

GEOMETRY = ((3, 3), (2, 2), (0, 0), (1, 1))  # kernel, stride, padding, dilation
MAPS = {"conv1": (96, 55, 55), "conv2": (256, 27, 27), "conv5": (256, 13, 13)}


def stock(input: Tensor) -> Tensor:
    return F.max_pool2d(input, 3, 2)


def fused(input: Tensor) -> Tensor:
    return ops.max_pool2d(input, 3, 2)


def outputs_of(input: Tensor, dtype: torch.dtype) -> Tensor:
    """A meta tensor of the pooled shape."""
    height, width = ((size - 3) // 2 + 1 for size in input.shape[2:])
    return torch.empty(*input.shape[:2], height, width, dtype=dtype, device="meta")


def backward_cost(input: Tensor) -> costs.Cost:
    grad, offsets = outputs_of(input, input.dtype), outputs_of(input, torch.uint8)
    return costs.max_pool_backward(grad, offsets, input.shape[2:], *GEOMETRY)


def operation(shape: tuple[int, ...]) -> Operation:
    return Operation(
        "max_pool",
        stock,
        fused,
        (shape,),
        lambda tensors, saves: costs.max_pool(tensors[0], *GEOMETRY, False, saves),
        lambda tensors: backward_cost(tensors[0]),
    )


def cases() -> Iterator[Case]:
    return cases_of_maps(operation, MAPS)
