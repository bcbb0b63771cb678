"""Rows of ``lrn_max_pool``: AlexNet's two normalise-then-pool stages against torch's pair."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks import bench_lrn, bench_max_pool
from benchmarks.cases import Case
from benchmarks.operation import Operation, cases_of_maps
from fastalex import costs, ops

ARGUMENTS = (*bench_lrn.ARGUMENTS, *bench_max_pool.GEOMETRY[:3])


def stock(input: Tensor) -> Tensor:
    return bench_max_pool.stock(bench_lrn.stock(input))


def fused(input: Tensor) -> Tensor:
    return ops.lrn_max_pool2d(
        input, bench_lrn.SIZE, bench_lrn.ALPHA, bench_lrn.BETA, bench_lrn.K, kernel_size=3, stride=2
    )


def backward_cost(input: Tensor) -> costs.Cost:
    grad = bench_max_pool.outputs_of(input, input.dtype)
    offsets = bench_max_pool.outputs_of(input, torch.uint8)
    return costs.lrn_max_pool_backward(grad, input, offsets, *ARGUMENTS)


def operation(shape: tuple[int, ...]) -> Operation:
    return Operation(
        "lrn_max_pool",
        stock,
        fused,
        (shape,),
        lambda tensors, saves: costs.lrn_max_pool(tensors[0], *ARGUMENTS, False, saves),
        lambda tensors: backward_cost(tensors[0]),
    )


def cases() -> Iterator[Case]:
    return cases_of_maps(operation, bench_lrn.MAPS, bf16_is_full=True)
