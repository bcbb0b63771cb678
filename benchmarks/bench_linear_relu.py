"""Rows of ``linear_relu``: AlexNet's hidden fully connected layers."""

from __future__ import annotations

from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.operation import Operation
from fastalex import costs, ops

LAYERS = {"fc6": (9216, 4096), "fc7": (4096, 4096)}


def stock(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.relu(F.linear(input, weight, bias))


def operation(inputs: int, outputs: int, batch: int) -> Operation:
    def backward_cost(input: Tensor, weight: Tensor, bias: Tensor) -> costs.Cost:
        output = input.new_empty((batch, outputs))
        return costs.linear_relu_backward(output, output, input, weight, (True, True, True))

    return Operation(
        "linear_relu",
        stock,
        ops.linear_relu,
        ((batch, inputs), (outputs, inputs), (outputs,)),
        lambda tensors, _: costs.linear_relu(*tensors, True),
        lambda tensors: backward_cost(*tensors),
    )


def cases() -> Iterator[Case]:
    for name, (inputs, outputs) in LAYERS.items():
        for batch in (32, 1, 128):
            rows = operation(inputs, outputs, batch)
            yield from rows.cases(
                f"{name}-b{batch}", ("f32", "bf16"), ("",), full=name != "fc6" or batch == 128
            )
    yield from operation(3, 3, 1).overhead()
