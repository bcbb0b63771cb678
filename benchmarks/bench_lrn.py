"""Rows of ``lrn``: AlexNet's two normalised maps, all channels in one group as torch has it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.operation import Operation, cases_of_maps
from fastalex import costs, ops

SIZE, ALPHA, BETA, K = 5, 1e-4, 0.75, 2.0
ARGUMENTS = (SIZE, ALPHA / SIZE, BETA, K, 1)  # as the operator has them
MAPS = {"conv1": (96, 55, 55), "conv2": (256, 27, 27)}


def stock(input: Tensor) -> Tensor:
    if input.is_cpu and input.dtype in (torch.bfloat16, torch.float16):  # torch has no kernel
        return stock(input.float()).to(input.dtype)
    return F.local_response_norm(input, SIZE, ALPHA, BETA, K)


def fused(input: Tensor) -> Tensor:
    return ops.local_response_norm(input, SIZE, ALPHA, BETA, K)


def operation(shape: tuple[int, ...]) -> Operation:
    return Operation(
        "lrn",
        stock,
        fused,
        (shape,),
        lambda tensors, _: costs.lrn(tensors[0], *ARGUMENTS),
        lambda tensors: costs.lrn_backward(tensors[0], tensors[0], *ARGUMENTS),
    )


def cases() -> Iterator[Case]:
    return cases_of_maps(operation, MAPS)
