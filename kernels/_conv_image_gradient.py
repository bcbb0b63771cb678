"""The input gradient of a strided convolution of few channels, such as the gradient of images, by blocks of pixels.

Phase by phase (_conv_input_gradient.py), 3 channels fill 3 columns of a tile's 16. Here all SH x SW pixels between two
strides are one pixel of SH SW C channels, and their gradient is a stride-1 convolution of dz with the kernel's taps
regrouped the same way:

    z[(q, u), (a, b, c)] = sum over i, j, o   dz[(q - i, u - j), o] w[o, c, a + SH i, b + SW j]      zero beyond R, S
    gx[(h, v), c]        = z[(h + PH) / SH, (v + PW) / SW, ((h + PH) % SH, (v + PW) % SW, c)]

It runs on the forward kernel, and place_blocks puts z where it belongs: dz read and z written once, z read and gx
written once, 2 x's bytes more than compulsory. Padding of the products of conv1: 28 % (3 x 3 blocks of 4 x 4 taps for
11 x 11, 57 x 57 blocks for 55 x 55 pixels of dz), where phases take 473 %.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _layout as layout
from ._common import program_index
from ._configs import ConvTile, conv_tiles
from ._conv import Conv, forward_scheme
from .conv_relu import run_forward

BLOCK = 1024
MOST_CHANNELS = 8  # with more, a tile of 16 is at least half full


def by_blocks(conv: Conv) -> bool:
    """Whether this file takes the convolution's input gradient."""
    few = conv.groups == 1 and conv.inputs <= MOST_CHANNELS
    return few and conv.sh * conv.sw > 1 and conv.dh == conv.dw == 1


def block_convolution(conv: Conv) -> Conv:
    """The stride-1 convolution of dz that gives z."""
    r, s = -(-conv.r // conv.sh), -(-conv.s // conv.sw)
    image = conv.out_rows, conv.out_columns, conv.out_rows + r - 1, conv.out_columns + s - 1
    channels = conv.out_channels, conv.sh * conv.sw * conv.inputs
    return Conv(*image, r, s, 1, 1, r - 1, s - 1, 1, 1, 1, *channels)


def block_tiles(
    conv: Conv, last: bool, batch: int, dtype: torch.dtype, precision: str
) -> list[ConvTile]:
    """Every tile that can be chosen, the one expected best first."""
    inner = block_convolution(conv)
    scheme = forward_scheme(inner, dense_strides(inner, last), dtype.itemsize)
    return conv_tiles(inner, scheme, batch, dtype, precision)


def dense_strides(conv: Conv, last: bool) -> layout.Strides:
    """Of the convolution's input, where nothing lies between its values."""
    c, h, w = conv.inputs, conv.rows, conv.columns
    return layout.Strides(c * h * w, *((1, c * w, c) if last else (h * w, w, 1)))


def block_weight(w: Tensor, conv: Conv, inner: Conv, last: bool) -> Tensor:
    """w [O, C, R, S] regrouped as [SH SW C, O, r, s], zero beyond R and S, taps in the order a correlation takes."""
    o, c = w.shape[:2]
    whole = w.new_zeros(o, c, inner.r * conv.sh, inner.s * conv.sw)
    whole[:, :, : conv.r, : conv.s] = w
    taps = whole.view(o, c, inner.r, conv.sh, inner.s, conv.sw).flip(2, 4)
    regrouped = taps.permute(3, 5, 1, 0, 2, 4).reshape(inner.outputs, o, inner.r, inner.s)
    return regrouped.contiguous(memory_format=layout.memory_format(last))


@triton.jit(do_not_specialize=["length"])
def place_blocks(
    z,
    gx,
    length,
    CONV: tl.constexpr,
    BLOCKS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """gx [N, C, H, W] from z [N, SH SW C, ...] that the convolution BLOCKS made; zero where no window reaches."""
    at = program_index(0, WIDE) * BLOCK + tl.arange(0, BLOCK)
    if CHANNELS_LAST:
        c = at % CONV.inputs
        pixel = at // CONV.inputs
        image = pixel // (CONV.rows * CONV.columns)
    else:
        pixel = at % (CONV.rows * CONV.columns)
        c = at // (CONV.rows * CONV.columns) % CONV.inputs
        image = at // (CONV.rows * CONV.columns) // CONV.inputs
    h = pixel // CONV.columns % CONV.rows + CONV.ph
    v = pixel % CONV.columns + CONV.pw
    q = h // CONV.sh
    u = v // CONV.sw
    channel = (h % CONV.sh * CONV.sw + v % CONV.sw) * CONV.inputs + c
    ok = (at < length) & (q < BLOCKS.out_rows) & (u < BLOCKS.out_columns)
    if CHANNELS_LAST:
        source = ((image * BLOCKS.out_rows + q) * BLOCKS.out_columns + u) * BLOCKS.outputs + channel
    else:
        source = ((image * BLOCKS.outputs + channel) * BLOCKS.out_rows + q) * BLOCKS.out_columns + u
    tl.store(gx + at, tl.load(z + source, mask=ok, other=0.0), mask=at < length)


def run_image_gradient(
    dz: Tensor,
    w: Tensor,
    gx: Tensor,
    conv: Conv,
    last: bool,
    precision: str,
    tile: ConvTile | None,
) -> None:
    inner = block_convolution(conv)
    dz = dz.contiguous(memory_format=layout.memory_format(last))
    z = layout.empty(dz, (dz.shape[0], inner.outputs, inner.out_rows, inner.out_columns), last)
    weight = block_weight(w, conv, inner, last)
    run_forward(dz, weight, None, z, inner, last, False, precision, tile)
    place_blocks[(triton.cdiv(gx.numel(), BLOCK),)](
        z, gx, gx.numel(), conv, inner, last, layout.needs_wide(z, gx), BLOCK
    )
