"""Local response normalization over windows too wide to unroll: one element a lane, a loop over the
window.

Each x is read WINDOW times, from L1 and L2 but for the first. Backward writes q = g x s^(-beta-1)
in float32 once and sums it over the mirrored window: 4 more bytes written and read an element than
the narrow kernel.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _layout as layout
from ._common import narrow, program_index, widen
from .lrn import locate, offset, power, power_over

BLOCK = 1024


@triton.jit
def element(
    x,
    lanes,
    XS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PLANE: tl.constexpr,
    NORM: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Each lane's element: (whether there is one, image, channel, row, column, its x in float32, its s)."""
    lane = program_index(0, WIDE) * BLOCK + tl.arange(0, BLOCK)
    ok = lane < lanes
    image, channel, row, column = locate(lane, CHANNELS, PLANE.rows, PLANE.columns, CHANNELS_LAST)
    c = channel % NORM.group
    at = offset(image, channel, row, column, XS, 1)
    squares = tl.zeros(at.shape, tl.float32)
    for j in range(-NORM.left, NORM.right + 1):
        inside = ok & (c + j >= 0) & (c + j < NORM.group)
        v = widen(tl.load(x + at + j * XS.channel, mask=inside, other=0.0))
        squares += v * v
    own = widen(tl.load(x + at, mask=ok, other=0.0))
    return ok, image, channel, row, column, own, NORM.k + NORM.scale * squares


@triton.jit(do_not_specialize=["lanes"])
def wide_forward(
    x,
    y,
    lanes,
    XS: tl.constexpr,
    YS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PLANE: tl.constexpr,
    NORM: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y = LRN(x), [N, CHANNELS, rows, columns]; lanes = elements."""
    ok, image, channel, row, column, own, s = element(
        x, lanes, XS, CHANNELS, PLANE, NORM, CHANNELS_LAST, WIDE, BLOCK
    )
    value = narrow(own * power(s, NORM.beta), y.dtype.element_ty)
    tl.store(y + offset(image, channel, row, column, YS, 1), value, mask=ok)


@triton.jit(do_not_specialize=["lanes"])
def wide_parts(
    g,
    x,
    q,
    lanes,
    GS: tl.constexpr,
    XS: tl.constexpr,
    QS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PLANE: tl.constexpr,
    NORM: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """q = g x s^(-beta-1) in float32."""
    ok, image, channel, row, column, own, s = element(
        x, lanes, XS, CHANNELS, PLANE, NORM, CHANNELS_LAST, WIDE, BLOCK
    )
    grad = widen(tl.load(g + offset(image, channel, row, column, GS, 1), mask=ok, other=0.0))
    value = grad * own * power_over(power(s, NORM.beta), s, NORM.beta)
    tl.store(q + offset(image, channel, row, column, QS, 1), value, mask=ok)


@triton.jit(do_not_specialize=["lanes"])
def wide_input_gradient(
    g,
    x,
    q,
    gx,
    lanes,
    GS: tl.constexpr,
    XS: tl.constexpr,
    QS: tl.constexpr,
    DS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PLANE: tl.constexpr,
    NORM: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """gx from g, x and q; lanes as forward."""
    ok, image, channel, row, column, own, s = element(
        x, lanes, XS, CHANNELS, PLANE, NORM, CHANNELS_LAST, WIDE, BLOCK
    )
    c = channel % NORM.group
    at = offset(image, channel, row, column, QS, 1)
    spread = tl.zeros(s.shape, tl.float32)
    for j in range(-NORM.right, NORM.left + 1):
        inside = ok & (c + j >= 0) & (c + j < NORM.group)
        spread += tl.load(q + at + j * QS.channel, mask=inside, other=0.0)
    grad = widen(tl.load(g + offset(image, channel, row, column, GS, 1), mask=ok, other=0.0))
    value = grad * power(s, NORM.beta) - (2 * NORM.scale * NORM.beta) * own * spread
    place = gx + offset(image, channel, row, column, DS, 1)
    tl.store(place, narrow(value, gx.dtype.element_ty), mask=ok)


def forward(x: Tensor, y: Tensor, norm, last: bool) -> None:
    plane, (xs, ys) = layout.collapse(x, y)
    wide = layout.needs_wide(x, y)
    grid = (triton.cdiv(x.numel(), BLOCK),)
    wide_forward[grid](x, y, x.numel(), xs, ys, x.shape[1], plane, norm, last, wide, BLOCK)


def backward(g: Tensor, x: Tensor, gx: Tensor, norm, last: bool) -> None:
    q = torch.empty_like(gx, dtype=torch.float32)
    plane, (gs, xs, qs, ds) = layout.collapse(g, x, q, gx)
    wide = layout.needs_wide(g, x, gx)
    grid = (triton.cdiv(x.numel(), BLOCK),)
    wide_parts[grid](g, x, q, x.numel(), gs, xs, qs, x.shape[1], plane, norm, last, wide, BLOCK)
    wide_input_gradient[grid](
        g, x, q, gx, x.numel(), gs, xs, qs, ds, x.shape[1], plane, norm, last, wide, BLOCK
    )
