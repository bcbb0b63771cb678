"""y = max_pool(relu(conv2d(x, w) + b)) in one kernel at inference, for windows of 3 x 3 two apart.

A program computes a patch of the convolution's map in its registers, 16 x 16 pixels for 7 x 7 windows (8 x 16 for
3 x 7, 8 x 8 for 3 x 3), and writes the maxima alone. A window is its four pixels in one 2 x 2 cell and what it shares
with the next cell: pairs of columns, then of rows, are split apart, and one gather each brings the neighbour. Like
conv_relu and max_pool in turn, it rounds the map's values to x's type before it compares them.

Compulsory are x, w, b read and y written; the map, written and read by the two kernels, is not moved. In return the
pixels that patches share are computed in each: conv1 of CaffeNet 1.35 times the multiply-adds, for 58 MB moved at batch
128 instead of 206. Bounds of that against the pair's (as in docs/gpu-evidence.md, float16): 117 us for 132 on an A100,
57 for 62 on an H100, 58 for 41 on a B200. So it is measured before it is preferred. Where the extra
multiply-adds take longer than the map's bytes on every GPU (conv2, conv5), it is refused, and the two run in turn.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from . import _layout as layout
from ._common import narrow, program_index, widen
from ._configs import ConvTile, pooled_tiles
from ._conv import Conv, float32_precision, forward_scheme
from ._conv import geometry as conv_geometry
from ._pack import weight_matrix
from ._pool import Pool
from .conv_relu import products, refuse_conv_relu
from .max_pool import geometry as pool_geometry
from .max_pool import refuse_pool

PATCHES = {64: (8, 8), 128: (8, 16), 256: (16, 16)}  # rows and columns of a tile's pixels
MOST_FLOPS = 150  # extra multiply-adds, times two, a byte saved: what an A100, the lowest of the three, does meanwhile


@dataclass(frozen=True)
class Patch:
    """The pixels a program computes: a 2 x 2 cell of them starts a window, but the last cell of each axis."""

    rows: int
    columns: int

    @property
    def pooled_rows(self) -> int:
        return self.rows // 2 - 1

    @property
    def pooled_columns(self) -> int:
        return self.columns // 2 - 1


@triton.jit
def larger(a, b):
    """The maximum; NaN wins."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def neighbour(v, STEP: tl.constexpr):
    """v [P, N], each row replaced by the one STEP after it; the last ones don't matter."""
    P: tl.constexpr = v.shape[0]
    row = tl.minimum(tl.arange(0, P) + STEP, P - 1)
    return tl.gather(v, tl.broadcast_to(row[:, None], [P, v.shape[1]]), 0)


@triton.jit
def window_max(v, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """[ROWS COLUMNS, N] -> [ROWS COLUMNS / 4, N]: the maximum of the 3 x 3 window that starts in each 2 x 2 cell."""
    N: tl.constexpr = v.shape[1]
    HALF: tl.constexpr = ROWS * COLUMNS // 2
    left, right = tl.split(v.reshape([ROWS, COLUMNS // 2, 2, N]).permute(0, 1, 3, 2))
    left = left.reshape([HALF, N])
    v = larger(larger(left, right.reshape([HALF, N])), neighbour(left, 1))
    up, down = tl.split(v.reshape([ROWS // 2, 2, COLUMNS // 2, N]).permute(0, 2, 3, 1))
    up = up.reshape([HALF // 2, N])
    return larger(larger(up, down.reshape([HALF // 2, N])), neighbour(up, COLUMNS // 2))


@triton.jit
def finish_patch(
    acc,
    b,
    y,
    n,
    n_end,
    m_ok,
    image,
    row,
    column,
    YS: tl.constexpr,
    POOL: tl.constexpr,
    PATCH: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """Adds the bias, clamps, rounds, pools, and stores the windows of a patch whose first is (row, column)."""
    if HAS_BIAS:
        acc += widen(tl.load(b + n, mask=n < n_end, other=0.0))[None, :]
    acc = tl.where(acc < 0, 0.0, acc)  # keeps NaN, as torch does
    acc = widen(narrow(acc, y.dtype.element_ty))
    acc = tl.where(m_ok[:, None], acc, float("-inf"))
    best = window_max(acc, PATCH.rows, PATCH.columns)
    COLUMNS: tl.constexpr = PATCH.columns // 2
    cell = tl.arange(0, PATCH.rows // 2 * COLUMNS)
    i = cell // COLUMNS
    j = cell % COLUMNS
    ok = (i < PATCH.pooled_rows) & (j < PATCH.pooled_columns)
    ok = ok & (row + i < POOL.out_rows) & (column + j < POOL.out_columns)
    at = image * YS.image + (row + i) * YS.row + (column + j) * YS.column
    ok = ok[:, None] & (n < n_end)[None, :]
    tl.store(y + at[:, None] + (n * YS.channel)[None, :], narrow(best, y.dtype.element_ty), mask=ok)


@triton.jit
def conv_relu_pool_forward(
    x,
    w,
    b,
    y,
    XS: tl.constexpr,
    YS: tl.constexpr,
    CONV: tl.constexpr,
    POOL: tl.constexpr,
    PATCH: tl.constexpr,
    PITCH: tl.constexpr,
    SCHEME: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BN2: tl.constexpr,
    BK: tl.constexpr,
):
    """x [N, C, H, W] by strides XS, w [O, PITCH] in SCHEME's order, y [N, O, pooled rows, pooled columns] by YS."""
    N_TILES: tl.constexpr = (CONV.outputs + BN + BN2 - 1) // (BN + BN2)
    DOWN: tl.constexpr = (POOL.out_rows + PATCH.pooled_rows - 1) // PATCH.pooled_rows
    ACROSS: tl.constexpr = (POOL.out_columns + PATCH.pooled_columns - 1) // PATCH.pooled_columns
    pid = program_index(0, WIDE)
    tile_n = pid % (CONV.groups * N_TILES)  # neighbours share their pixels in L2
    group = tile_n // N_TILES if CONV.groups > 1 else 0
    patch = pid // (CONV.groups * N_TILES)
    image = (patch // (DOWN * ACROSS)).to(tl.int64)
    row = patch // ACROSS % DOWN * PATCH.pooled_rows
    column = patch % ACROSS * PATCH.pooled_columns
    m = tl.arange(0, BM)
    oh = row * 2 - POOL.ph + m // PATCH.columns
    ow = column * 2 - POOL.pw + m % PATCH.columns
    m_ok = (oh >= 0) & (oh < CONV.out_rows) & (ow >= 0) & (ow < CONV.out_columns)
    n_end = (group + 1) * CONV.outputs
    n = group * CONV.outputs + tile_n % N_TILES * (BN + BN2) + tl.arange(0, BN)
    n2 = n
    if BN2 > 0:
        n2 = group * CONV.outputs + tile_n % N_TILES * (BN + BN2) + BN + tl.arange(0, BN2)
    ih0 = oh * CONV.sh - CONV.ph
    iw0 = ow * CONV.sw - CONV.pw
    pixel = x + image * XS.image + (ih0 * XS.row + iw0 * XS.column)
    pixel += group * (CONV.inputs * XS.channel)
    # fmt: off
    acc, acc2 = products(
        pixel, ih0, iw0, m_ok, w, n, n2, n_end, 0, XS, CONV, PITCH, SCHEME, PRECISION, 1, BM, BN, BN2, BK
    )
    # fmt: on
    finish_patch(acc, b, y, n, n_end, m_ok, image, row, column, YS, POOL, PATCH, HAS_BIAS)
    if BN2 > 0:
        finish_patch(acc2, b, y, n2, n_end, m_ok, image, row, column, YS, POOL, PATCH, HAS_BIAS)


def patches(pool: Pool, m: int) -> int:
    """Programs an image takes, for each tile of channels."""
    patch = Patch(*PATCHES[m])
    down, across = patch.pooled_rows, patch.pooled_columns
    return triton.cdiv(pool.out_rows, down) * triton.cdiv(pool.out_columns, across)


def refuse_pooling(conv: Conv, pool: Pool, itemsize: int) -> str | None:
    """Why one kernel doesn't take the call: another window, or counts say that it can't pay."""
    window = pool.kh, pool.kw, pool.sh, pool.sw
    if window != (3, 3, 2, 2):
        return (
            f"its windows are 3 x 3, two apart, not {pool.kh} x {pool.kw}, {pool.sh} by {pool.sw} apart: the two "
            "operators run in turn"
        )
    extra = min(patches(pool, m) * m for m in PATCHES) / conv.out_pixels - 1
    flops = 2 * extra * conv.products / (2 * itemsize)
    if flops > MOST_FLOPS:
        return (
            f"what patches share costs {flops:.0f} FLOP for each byte of the map it saves, and a GPU does {MOST_FLOPS} "
            "meanwhile: the two operators run in turn"
        )
    return None


def refuse_conv_relu_max_pool(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride,
    padding,
    dilation,
    groups: int,
    pool_size,
    pool_stride,
    pool_padding,
    ceil_mode: bool,
) -> str | None:
    reason = refuse_conv_relu(input, weight, bias, stride, padding, dilation, groups)
    if reason is not None:
        return reason
    pooling = (pool_size, pool_stride, pool_padding)
    conv = conv_geometry(input.shape[2:], weight, stride, padding, dilation, groups)
    reason = refuse_pool((conv.out_rows, conv.out_columns), *pooling, (1, 1), ceil_mode)
    if reason is not None:
        return reason
    pool = pool_geometry((conv.out_rows, conv.out_columns), *pooling, (1, 1), ceil_mode)
    return refuse_pooling(conv, pool, input.element_size())


def geometries(
    x: Tensor, weight: Tensor, stride, padding, dilation, groups: int, *pool
) -> tuple[Conv, Pool]:
    conv = conv_geometry(x.shape[2:], weight, stride, padding, dilation, groups)
    size, step, margin, ceil_mode = pool
    out = conv.out_rows, conv.out_columns
    return conv, pool_geometry(out, size, step, margin, (1, 1), ceil_mode)


def tiles(conv: Conv, pool: Pool, x: Tensor, precision: str) -> list[ConvTile]:
    """Every tile that can be chosen, the one with the fewest multiply-adds first."""
    found = pooled_tiles(conv, x.dtype, precision)
    return sorted(found, key=lambda t: work(conv, pool, t))


def work(conv: Conv, pool: Pool, tile: ConvTile) -> int:
    """Pixels times channels computed, of an image and group."""
    n = tile.n + tile.n2
    return patches(pool, tile.m) * tile.m * triton.cdiv(conv.outputs, n) * n


def candidates_conv_relu_max_pool(
    input: Tensor, weight: Tensor, bias: Tensor | None, *geometry
) -> dict[str, list[ConvTile]]:
    """Every tile this call can choose from, the one it takes unmeasured first."""
    return {"tile": tiles(*geometries(input, weight, *geometry), input, float32_precision())}


@layout.on_its_device
def conv_relu_max_pool(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride,
    padding,
    dilation,
    groups: int,
    pool_size,
    pool_stride,
    pool_padding,
    ceil_mode: bool,
    *,
    tile: ConvTile | None = None,
    precision: str | None = None,
) -> Tensor:
    """max_pool(relu(conv2d(input, weight) + bias)); precision ("tf32", "ieee") as conv_relu's."""
    pooling = (pool_size, pool_stride, pool_padding, ceil_mode)
    conv, pool = geometries(input, weight, stride, padding, dilation, groups, *pooling)
    precision = precision or float32_precision()
    x = layout.readable(input)
    last = layout.is_channels_last(x)
    y = layout.empty(x, (x.shape[0], weight.shape[0], pool.out_rows, pool.out_columns), last)
    if not y.numel():
        return y
    tile = tile or tiles(conv, pool, x, precision)[0]
    scheme = forward_scheme(conv, layout.strides(x), x.element_size())
    w, pitch = weight_matrix(weight, conv, scheme, tile.k)
    columns = triton.cdiv(conv.outputs, tile.n + tile.n2) * conv.groups
    conv_relu_pool_forward[(x.shape[0] * patches(pool, tile.m) * columns,)](
        x,
        w,
        bias,
        y,
        layout.strides(x),
        layout.strides(y),
        conv,
        pool,
        Patch(*PATCHES[tile.m]),
        pitch,
        scheme,
        bias is not None,
        precision,
        layout.needs_wide(x, y),
        tile.m,
        tile.n,
        tile.n2,
        tile.k,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return y
