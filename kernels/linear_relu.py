"""y = relu(x w^T + b) and its gradients: a fully connected layer is a 1x1 convolution of a 1x1 map.

So it runs on the convolution's own tiles (conv_relu.py, conv_relu_backward.py): M = rows of x, N = outputs, K = inputs
walked as "taps" where 64 halves divide them, else "flat". Forward reads x once a tile of outputs and w once a tile of
rows, from L2 beyond the first; compulsory are M I + O I + M O values and 2 M I O FLOPs. A small batch leaves a whole
tile of rows to few: its multiply-adds are padding, but its time is that of reading w, which K split in parts spreads
over the GPU. The gradients: gx = dz w, gw = dz^T x, gb = the sums of dz in the same pass, dz masked once beforehand.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _layout as layout
from ._configs import (
    ConvTile,
    architecture,
    conv_tiles,
    input_gradient_tiles,
    weight_gradient_tiles,
)
from ._conv import Conv, forward_scheme
from ._conv_input_gradient import masked
from ._refuse import refuse_tensors
from .conv_relu import run_forward
from .conv_relu_backward import run_input_gradient, run_weight_gradient


def float32_precision() -> str:
    """How torch is told to multiply float32 matrices: "tf32" or "ieee"."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def as_convolution(input: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Conv]:
    """(x [M, I, 1, 1], w [O, I, 1, 1], geometry), over the same memory where rows are dense."""
    rows = input.flatten(0, -2)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    outputs, inputs = weight.shape
    conv = Conv(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 1, 1, 1, inputs, outputs)
    return as_pixels(rows), as_pixels(weight), conv


def as_pixels(rows: Tensor) -> Tensor:
    """[M, I] -> [M, I, 1, 1], a row's pitch as its pixel's strides: smaller ones would spoil the loads' alignment."""
    pitch = rows.stride(0)
    return rows.as_strided((*rows.shape, 1, 1), (pitch, rows.stride(1), pitch, pitch))


def refuse_linear_relu(
    input: Tensor, weight: Tensor, bias: Tensor | None, relu: bool
) -> str | None:
    reason = refuse_tensors(input, weight, bias)
    if reason is None and weight.dim() != 2:
        reason = f"the weight has {weight.dim()} axes, not 2: give it as [O, I]"
    if reason is None and (input.dim() < 2 or input.shape[-1] != weight.shape[1]):
        sizes = tuple(input.shape), tuple(weight.shape)
        reason = f"an input of {sizes[0]} doesn't fit a weight of {sizes[1]}"
    if reason is None and any(t.dtype != input.dtype for t in (weight, bias) if t is not None):
        reason = (
            f"input {input.dtype}, weight {weight.dtype} and bias differ: cast them to one type"
        )
    if reason is None and weight.numel() >= 2**31:
        reason = f"a weight of {weight.numel()} values has offsets beyond 2^31, which it is not read with"
    return reason


def refuse_linear_relu_backward(
    grad: Tensor, output: Tensor | None, input: Tensor, weight: Tensor, output_mask
) -> str | None:
    return refuse_tensors(grad, output) or refuse_linear_relu(input, weight, None, True)


def candidates_linear_relu(
    input: Tensor, weight: Tensor, bias: Tensor | None, relu: bool
) -> dict[str, list[ConvTile]]:
    """Every tile this call can choose from, the one it takes unmeasured first."""
    x, _, conv = as_convolution(input, weight)
    scheme = forward_scheme(conv, layout.strides(x), x.element_size())
    return {"tile": conv_tiles(conv, scheme, x.shape[0], x.dtype, float32_precision())}


def candidates_linear_relu_backward(
    grad: Tensor, output: Tensor | None, input: Tensor, weight: Tensor, output_mask
) -> dict[str, list[ConvTile]]:
    """Of each option, the tiles this call can choose from, the one it takes unmeasured first."""
    x, _, conv = as_convolution(input, weight)
    rows, precision, arch = x.shape[0], float32_precision(), architecture(x.device)
    found = {}
    if output_mask[0]:
        found["input_tile"] = input_gradient_tiles(conv, True, rows, x.dtype, precision, arch)
    if output_mask[1]:
        found["weight_tile"] = weight_gradient_tiles(conv, True, rows, x.dtype, precision, arch)
    return found


@layout.on_its_device
def linear_relu(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    relu: bool,
    *,
    tile: ConvTile | None = None,
    precision: str | None = None,
) -> Tensor:
    """relu(input weight^T + bias), or without the ReLU: input [..., I] -> [..., O]."""
    y = input.new_empty((*input.shape[:-1], weight.shape[0]))
    if y.numel():
        x, w, conv = as_convolution(input, weight)
        out = as_pixels(y.view(-1, conv.outputs))
        run_forward(x, w, bias, out, conv, True, relu, precision or float32_precision(), tile)
    return y


@layout.on_its_device
def linear_relu_backward(
    grad: Tensor,
    output: Tensor | None,
    input: Tensor,
    weight: Tensor,
    output_mask,
    *,
    precision: str | None = None,
    input_tile: ConvTile | None = None,
    weight_tile: ConvTile | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(grad_input, grad_weight, grad_bias), each of size 0 where output_mask doesn't ask for it.

    output is the ReLU's, and None where there was none.
    """
    x, w, conv = as_convolution(input, weight)
    dz = grad.reshape(-1, conv.outputs)
    if dz.stride(1) != 1:
        dz = dz.contiguous()
    if output is not None:
        dz = masked(as_pixels(dz), as_pixels(output.reshape(-1, conv.outputs)), True)
    dz = as_pixels(dz.reshape(-1, conv.outputs))
    precision = precision or float32_precision()
    gx, gw, gb = (input.new_empty(0) for _ in range(3))
    if output_mask[0]:
        gx = input.new_empty(input.shape)
        if gx.numel():
            out = as_pixels(gx.view(-1, conv.inputs))
            run_input_gradient(dz, w, out, conv, True, precision, input_tile)
    if output_mask[1]:
        gw = weight.new_empty(weight.shape)
        gb = weight.new_empty(conv.outputs if output_mask[2] else 0)
        out, wants_bias = as_pixels(gw), output_mask[2]
        run_weight_gradient(dz, None, x, out, gb, conv, True, wants_bias, precision, weight_tile)
    elif output_mask[2]:
        gb = dz.sum((0, 2, 3), dtype=torch.float32).to(weight.dtype)
    return gx, gw, gb
