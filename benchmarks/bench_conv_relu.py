"""Rows of ``conv_relu``: one per convolution of the two-tower AlexNet."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.operation import Operation
from fastalex import costs, ops


@dataclass(frozen=True)
class Layer:
    """One convolution: its input map, weight and geometry."""

    input: tuple[int, int, int]
    outputs: int
    kernel: int
    stride: int
    padding: int
    groups: int

    def shapes(self, batch: int) -> tuple[tuple[int, ...], ...]:
        weight = (self.outputs, self.input[0] // self.groups, self.kernel, self.kernel)
        return (batch, *self.input), weight, (self.outputs,)

    @property
    def geometry(self) -> tuple[int, int, int, int]:
        return self.stride, self.padding, 1, self.groups

    @property
    def arguments(self) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int], int]:
        """Stride, padding, dilation and groups as the operator has them."""
        return (self.stride,) * 2, (self.padding,) * 2, (1, 1), self.groups

    def output(self, input: Tensor) -> Tensor:
        """A meta tensor of the output's shape."""
        side = (self.input[1] + 2 * self.padding - self.kernel) // self.stride + 1
        shape = (input.shape[0], self.outputs, side, side)
        return torch.empty(shape, dtype=input.dtype, device="meta")


LAYERS = {
    "conv1": Layer((3, 227, 227), 96, 11, 4, 0, 1),
    "conv2": Layer((96, 27, 27), 256, 5, 1, 2, 2),
    "conv3": Layer((256, 13, 13), 384, 3, 1, 1, 1),
    "conv4": Layer((384, 13, 13), 384, 3, 1, 1, 2),
    "conv5": Layer((384, 13, 13), 256, 3, 1, 1, 2),
}


def operation(layer: Layer, batch: int) -> Operation:
    def stock(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.relu(F.conv2d(input, weight, bias, *layer.geometry))

    def fused(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return ops.conv2d_relu(input, weight, bias, *layer.geometry)

    def backward_cost(input: Tensor, weight: Tensor, bias: Tensor) -> costs.Cost:
        output = layer.output(input)
        return costs.conv_relu_backward(
            output, output, input, weight, *layer.arguments, (True, True, True)
        )

    return Operation(
        "conv_relu",
        stock,
        fused,
        layer.shapes(batch),
        lambda tensors, _: costs.conv_relu(*tensors, *layer.arguments),
        lambda tensors: backward_cost(*tensors),
    )


def cases() -> Iterator[Case]:
    for name, layer in LAYERS.items():
        for batch in (32, 1):
            rows = operation(layer, batch)
            label = f"{name}-b{batch}"
            yield from rows.cases(label, ("f32",), ("-nhwc",), full=batch == 1)
            yield from rows.cases(label, ("f32",), ("",), full=True)
            yield from rows.cases(label, ("bf16",), ("", "-nhwc"), full=True)
    yield from operation(Layer((1, 3, 3), 1, 1, 1, 0, 1), 1).overhead()
