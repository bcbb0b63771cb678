"""Gradients of y = relu(conv2d(x, w) + b), as implicit matrix products on tensor cores.

    dz                = g where y > 0 or y is NaN, else 0
    gx[pixel, c]      = sum over taps, o   dz[(pixel + P - D (r, s)) / S, o] w[o, c, r, s]
    gw[o, (r, s, c)]  = sum over pixels    dz[pixel, o] x[S pixel - P + D (r, s), c]
    gb[o]             = sum over pixels    dz[pixel, o]                  in the same pass

FLOPs are the forward's for each of gx and gw. Compulsory bytes: dz and w read, gx written; dz and x
read, gw and gb written. K is taps times output channels for gx and pixels for gw.

Where the mask is applied, in maps of y's size moved (g, y and dz are one each):
    where g is made, by a kernel that reads y for it     (1 of y) gw 1 + gx 1                 3
    the same, of LRN and a pool, which reads y anyway             gw 1 + gx 1                 2
    a pass of its own, then both products                pass 3 + gw 1 + gx 1                 5
    at load in gw, no gx wanted (a network's first layer)         gw 2                        2, else 4
    at load in both products                                      gw 2 + gx 2                 4
The first two are for maps that nobody else sees, inside a chain of layers (fastalex/ops/_chain.py): g
is the gradient of y, which a hook or autograd.grad may ask for whole. The paper's network is three such
chains, so no pass is left in it: of 650,080 values an image in its maps, 3 x 359,680 are moved less,
276 MB a step of 128 in bfloat16, for 173,056 (conv3 to conv5) read once more; and conv1, masked at load
before, reads 290,400 fewer. A convolution that stands alone keeps the pass, or, as a first layer, masks
at load. At load in both products moves a map less than the pass, but copies y beside g for every tile
of products again, and gw, which is bound by the instructions it issues, issues 29 % more of them (conv2
on sm_90: 38 us of issue at least, against 43 us of the pass's bytes), gx some more still; on sm_8x they
are 75 % more and registers spill.

Padding of the products at batch 128, per cent of gx and of gw: conv2 0 and 6.7, conv3 0 and 0, conv4 0
and 0, conv5 0 and 3.7, conv1 28 (_conv_image_gradient.py; training never asks for it) and 5.8 (eleven
rows of 33 values, 34 apart). For conv2's 1200 products, tiles half as wide waste 1.3 % and
issue 10 % more instructions an output pixel (767 of a warp for 695, sm_90). sm_8x lacks the registers
for a tile of 96 outputs: there conv1 wastes 41 % and conv4 38 %, which issue less than any tile that
wastes less.

A stride is taken by phases: the input pixels of one phase see the same kernel taps, and are a
convolution of stride 1; few channels by blocks (_conv_image_gradient.py). The weight gradient's pixels
are split in parts that the shape alone decides, each a float32 sum of its own that sum_parts adds in
order: the same bits every run. A single part is the gradient itself, written once.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from .._geometry import empty_in_layout
from . import _layout as layout
from ._configs import (
    ConvTile,
    architecture,
    input_gradient_tiles,
    masks_at_load,
    outputs_first,
    weight_gradient_tiles,
)
from ._conv import Conv, float32_precision, geometry, refuse_conv
from ._conv_image_gradient import block_tiles, by_blocks, run_image_gradient
from ._conv_input_gradient import BLOCK, conv_input_gradient, masked
from ._conv_weight_gradient import conv_weight_gradient, sum_parts
from ._refuse import refuse_four_axes, refuse_tensors


def refuse_conv_relu_backward(
    grad: Tensor,
    output: Tensor,
    input: Tensor,
    weight: Tensor,
    stride,
    padding,
    dilation,
    groups: int,
    output_mask,
) -> str | None:
    reason = (
        refuse_tensors(grad, output, input, weight)
        or refuse_four_axes(input)
        or refuse_conv(input, weight, None, stride, padding, dilation, groups)
    )
    if reason is None and grad.shape != output.shape:
        shapes = tuple(grad.shape), tuple(output.shape)
        reason = f"a gradient of {shapes[0]} doesn't belong to an output of {shapes[1]}"
    return reason


def candidates_conv_relu_backward(
    grad: Tensor,
    output: Tensor,
    input: Tensor,
    weight: Tensor,
    stride,
    padding,
    dilation,
    groups: int,
    output_mask,
) -> dict[str, list[ConvTile]]:
    """Of each option, the tiles this call can choose from, the one it takes unmeasured first."""
    x = layout.readable(input)
    conv = geometry(x.shape[2:], weight, stride, padding, dilation, groups)
    batch, precision = x.shape[0], float32_precision()
    last, arch = layout.is_channels_last(x), architecture(x.device)
    found = {}
    if output_mask[0]:
        if by_blocks(conv):
            found["input_tile"] = block_tiles(conv, last, batch, x.dtype, precision)
        else:
            found["input_tile"] = input_gradient_tiles(conv, last, batch, x.dtype, precision, arch)
    if output_mask[1]:
        found["weight_tile"] = weight_gradient_tiles(conv, last, batch, x.dtype, precision, arch)
    return found


@layout.on_its_device
def conv_relu_backward(
    grad: Tensor,
    output: Tensor,
    input: Tensor,
    weight: Tensor,
    stride,
    padding,
    dilation,
    groups: int,
    output_mask,
    *,
    grad_is_masked: bool = False,
    rectified_input: bool = False,
    precision: str | None = None,
    input_tile: ConvTile | None = None,
    weight_tile: ConvTile | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(grad_input, grad_weight, grad_bias), each of size 0 where output_mask doesn't ask for it.

    grad_is_masked: grad is zero wherever output is. rectified_input: a ReLU made input, and grad_input shall take its
    mask.
    """
    x = layout.readable(input)
    last = layout.is_channels_last(x)
    conv = geometry(x.shape[2:], weight, stride, padding, dilation, groups)
    precision = precision or float32_precision()
    dz, y = grad, None
    if not grad_is_masked:
        if masks_at_load(output_mask, architecture(x.device)):
            y = layout.in_layout(output, last)
        else:
            dz = masked(grad, output, last)
    dz = layout.in_layout(dz, last)
    gx, gw, gb = (input.new_empty(0) for _ in range(3))
    if output_mask[0]:
        gx = layout.empty(x, tuple(x.shape), last)
        if gx.numel():
            masks = rectified_input and last and not by_blocks(conv)  # NCHW on sm_100 would spill
            if by_blocks(conv):
                run_image_gradient(dz, weight, gx, conv, last, precision, input_tile)
            else:
                made = x if masks else None
                run_input_gradient(dz, weight, gx, conv, last, precision, input_tile, made)
            if rectified_input and not masks:
                gx = masked(gx, x, last)
    if output_mask[1]:
        gw = empty_in_layout(weight, weight.shape)
        gb = weight.new_empty(weight.shape[0] if output_mask[2] else 0)
        run_weight_gradient(dz, y, x, gw, gb, conv, last, output_mask[2], precision, weight_tile)
    elif output_mask[2]:
        gb = dz.sum((0, 2, 3), dtype=torch.float32).to(weight.dtype)
    return gx, gw, gb


def run_input_gradient(
    dz: Tensor,
    w: Tensor,
    gx: Tensor,
    conv: Conv,
    last: bool,
    precision: str,
    tile: ConvTile | None,
    rectified: Tensor | None = None,
) -> None:
    """rectified: the input of which gx is the gradient, where a ReLU made it whose mask gx takes."""
    arch = architecture(gx.device)
    x = gx if rectified is None else rectified
    tile = tile or input_gradient_tiles(conv, last, dz.shape[0], dz.dtype, precision, arch)[0]
    pixels = dz.shape[0] * triton.cdiv(conv.rows, conv.sh) * triton.cdiv(conv.columns, conv.sw)
    columns = triton.cdiv(conv.inputs, tile.n + tile.n2) * conv.groups
    conv_input_gradient[triton.cdiv(pixels, tile.m) * columns, conv.sh * conv.sw](
        dz,
        w,
        gx,
        x,
        dz.shape[0],
        layout.strides(dz),
        layout.strides(w),
        layout.strides(gx),
        layout.strides(x),
        conv,
        rectified is not None,
        precision,
        layout.needs_wide(dz, gx, x),
        tile.m,
        tile.n,
        tile.n2,
        tile.k,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def aligned_run(conv: Conv, x: Tensor) -> tuple[int, bool]:
    """(pitch of a kernel row on the weight gradient's N axis, whether x may be read that far).

    The pitch is 0 where rows of x aren't taken whole.
    """
    run = conv.s * conv.inputs
    if (
        x.stride(1) != 1
        or x.stride(3) != conv.inputs
        or conv.dw != 1
        or conv.groups != 1
        or conv.inputs > 4
    ):
        return 0, False
    pitch = -(-run // 2) * 2
    end = (conv.out_columns - 1) * conv.sw * conv.inputs + pitch  # in a row of x
    last_row = sum(
        (n - 1) * stride for n, stride in ((x.shape[0], x.stride(0)), (conv.rows, x.stride(2)))
    )
    stored = x.untyped_storage().nbytes() // x.element_size() - x.storage_offset()
    return pitch, conv.inside and end <= x.stride(2) and last_row + end <= stored


def run_weight_gradient(
    g: Tensor,
    y: Tensor | None,
    x: Tensor,
    gw: Tensor,
    gb: Tensor,
    conv: Conv,
    last: bool,
    bias: bool,
    precision: str,
    tile: ConvTile | None,
) -> None:
    """y: the ReLU's output where g is still to be masked by it."""
    arch = architecture(x.device)
    tile = tile or weight_gradient_tiles(conv, last, g.shape[0], g.dtype, precision, arch)[0]
    run, read_past = aligned_run(conv, x)
    length = gw.numel() + gw.shape[0]
    split = tile.split
    parts = gw
    if split > 1:
        parts = torch.empty((split, length), dtype=torch.float32, device=x.device)
    grid = (
        triton.cdiv(conv.r * run if run else conv.products, tile.k),
        triton.cdiv(conv.outputs, tile.n + tile.n2) * conv.groups,
        split,
    )
    mask = g if y is None else y
    conv_weight_gradient[grid](
        g,
        mask,
        x,
        parts,
        gw,
        gb,
        g.shape[0],
        layout.strides(g),
        layout.strides(mask),
        layout.strides(x),
        layout.strides(gw),
        conv,
        y is not None,
        run,
        read_past,
        not last,
        outputs_first(tile, arch),
        bias,
        precision,
        layout.needs_wide(g, mask, x),
        split,
        tile.n,
        tile.n2,
        tile.k,
        tile.m,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    if split > 1:
        sum_parts[(triton.cdiv(length, BLOCK),)](
            parts, gw, gb, layout.strides(gw), conv, not last, split, bias, BLOCK
        )
