"""y = relu(conv2d(x, w) + b) as an implicit matrix product on tensor cores, forward.

    M = N * OH * OW output pixels,  N = output channels of one group,  K = R * S * C/groups

x is never unfolded: a tile's pixels are gathered from x in the main loop. Four ways to walk K, and
the products they waste on the two-tower AlexNet:

    "taps"    one kernel tap at a time, BK channels of it, 1-D masks      conv3, 4, 5   0 %
    "flat"    blocks of BK run on across the taps                         conv2         1.3 %
    "rows"    whole kernel rows of S*C neighbouring values, BK at a       conv1         1.4 %
              time, then what is left of all rows together in one block
    "planes"  "flat" with K ordered c, r, s, as an NCHW weight is         any NCHW      < 6 %

at batch 128, and under 6 % at every batch but for 13 x 13 maps of one or two images (and NCHW below batch 32): 169
pixels are three tiles of 64, 13.6 % of them padding, or eleven of 16, 4.1 %. But those copy w eleven times, conv3's
in 19.5 MB where the former copy 10.6 in all: on an A100, whose L2 gives 5,120 bytes a clock, 1,700 clocks to
save 130 of its matrix units'. Compulsory are x, w, b read and y written once, and 2 M N K FLOPs a group.

A tile has BN + BN2 output channels, BN2 = 0 or a smaller power of two: 96 = 64 + 32 wastes nothing.
A program reads BM * K values of x (K * BM / (R*S*C) of them again where windows overlap, from L2),
K * (BN + BN2) of w, and writes BM * (BN + BN2) of y once: bias and ReLU happen in its registers.
With SPLIT > 1 it writes a float32 part instead, and finish_parts adds the parts in order.
"""
# ruff: noqa: RET505 - Triton compiles what follows an `if` that returns

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _layout as layout
from ._common import mma, narrow, program_index, widen
from ._configs import ConvTile, conv_tiles
from ._conv import Conv, float32_precision, forward_scheme, geometry, refuse_conv
from ._pack import weight_matrix
from ._refuse import refuse_four_axes, refuse_tensors


@triton.jit
def scattered_pixels(pixel, ih0, iw0, ok, r, s, c, XS: tl.constexpr, CONV: tl.constexpr):
    """[BM, BK] of x at taps r, s and channels c [BK], from each output's first tap; zero outside
    the image.
    """
    live = ok
    if not CONV.inside:
        ih = ih0[:, None] + (r * CONV.dh)[None, :]
        iw = iw0[:, None] + (s * CONV.dw)[None, :]
        live = live & (ih >= 0) & (ih < CONV.rows) & (iw >= 0) & (iw < CONV.columns)
    at = r * (CONV.dh * XS.row) + s * (CONV.dw * XS.column) + c * XS.channel
    return tl.load(pixel[:, None] + at[None, :], mask=live, other=0.0)


@triton.jit
def pixels(
    pixel,
    ih0,
    iw0,
    m_ok,
    step,
    XS: tl.constexpr,
    CONV: tl.constexpr,
    SCHEME: tl.constexpr,
    BK: tl.constexpr,
):
    """[BM, BK] of x that block `step` of K multiplies."""
    k = tl.arange(0, BK)
    S: tl.constexpr = CONV.s
    INPUTS: tl.constexpr = CONV.inputs
    if SCHEME == "taps":
        BLOCKS: tl.constexpr = INPUTS // BK
        r = step // BLOCKS // S
        s = step // BLOCKS % S
        live = m_ok
        if not CONV.inside:
            ih = ih0 + r * CONV.dh
            iw = iw0 + s * CONV.dw
            live = m_ok & (ih >= 0) & (ih < CONV.rows) & (iw >= 0) & (iw < CONV.columns)
        at = r * (CONV.dh * XS.row) + s * (CONV.dw * XS.column) + step % BLOCKS * BK
        return tl.load((pixel + at)[:, None] + k[None, :], mask=live[:, None], other=0.0)
    elif SCHEME == "rows":
        BODY_BLOCKS: tl.constexpr = S * INPUTS // BK
        r = step // BODY_BLOCKS
        j = step % BODY_BLOCKS * BK + k
        live = m_ok[:, None]
        if not CONV.inside:
            ih = ih0 + r * CONV.dh
            run = (iw0 * INPUTS)[:, None] + j[None, :]
            live = (
                (m_ok & (ih >= 0) & (ih < CONV.rows))[:, None]
                & (run >= 0)
                & (run < CONV.columns * INPUTS)
            )
        return tl.load((pixel + r * (CONV.dh * XS.row))[:, None] + j[None, :], mask=live, other=0.0)
    else:
        kk = step * BK + k
        ok = m_ok[:, None]
        if CONV.products % BK != 0:
            ok = ok & (kk < CONV.products)[None, :]
        if SCHEME == "flat":
            tap = kk // INPUTS
            c = kk % INPUTS
        else:
            tap = kk % (CONV.r * S)
            c = kk // (CONV.r * S)
        return scattered_pixels(pixel, ih0, iw0, ok, tap // S, tap % S, c, XS, CONV)


@triton.jit
def weights(w, n, n_end, kk, PITCH: tl.constexpr, LENGTH: tl.constexpr, BK: tl.constexpr):
    """[BK, BN] of w [O, PITCH], whose rows hold LENGTH values."""
    mask = (n < n_end)[None, :]
    if LENGTH % BK != 0:
        mask = mask & (kk < LENGTH)[:, None]
    return tl.load(w + n[None, :] * PITCH + kk[:, None], mask=mask, other=0.0)


@triton.jit
def finish(
    acc,
    b,
    y,
    part,
    m,
    n,
    m_end,
    n_end,
    CONV: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RELU: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Adds the bias, clamps where RELU, and stores a tile of y; or stores a float32 part as it is."""
    ok = (m < m_end)[:, None] & (n < n_end)[None, :]
    m = m.to(tl.int64)
    if CHANNELS_LAST:
        at = (m * CONV.out_channels)[:, None] + n[None, :]
    else:
        at = (m // CONV.out_pixels * (CONV.out_channels * CONV.out_pixels) + m % CONV.out_pixels)[
            :, None
        ] + (n * CONV.out_pixels)[None, :]
    if SPLIT > 1:
        tl.store(y + part * (m_end.to(tl.int64) * CONV.out_channels) + at, acc, mask=ok)
    else:
        if HAS_BIAS:
            acc += widen(tl.load(b + n, mask=n < n_end, other=0.0))[None, :]
        if RELU:
            acc = tl.where(acc < 0, 0.0, acc)  # keeps NaN, as torch does
        tl.store(y + at, narrow(acc, y.dtype.element_ty), mask=ok)


@triton.jit
def products(
    pixel,
    ih0,
    iw0,
    m_ok,
    w,
    n,
    n2,
    n_end,
    part,
    XS: tl.constexpr,
    CONV: tl.constexpr,
    PITCH: tl.constexpr,
    SCHEME: tl.constexpr,
    PRECISION: tl.constexpr,
    SPLIT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BN2: tl.constexpr,
    BK: tl.constexpr,
):
    """The sums of part of K over the pixels whose first taps lie at `pixel`, at channels n [BN] and n2 [BN2]."""
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    acc2 = acc
    if BN2 > 0:
        acc2 = tl.zeros((BM, BN2), dtype=tl.float32)
    k = tl.arange(0, BK)
    BODY: tl.constexpr = (
        CONV.r * (CONV.s * CONV.inputs // BK * BK) if SCHEME == "rows" else CONV.products
    )
    STEPS: tl.constexpr = (BODY + BK - 1) // BK
    SHARE: tl.constexpr = (STEPS + SPLIT - 1) // SPLIT
    begin = part * SHARE
    end = tl.minimum(begin + SHARE, STEPS)
    if SPLIT == 1:
        begin = 0
        end = STEPS
    for step in range(begin, end):
        a = pixels(pixel, ih0, iw0, m_ok, step, XS, CONV, SCHEME, BK)
        acc = mma(a, weights(w, n, n_end, step * BK + k, PITCH, BODY, BK), acc, PRECISION)
        if BN2 > 0:
            acc2 = mma(a, weights(w, n2, n_end, step * BK + k, PITCH, BODY, BK), acc2, PRECISION)
    if PITCH > BODY:  # "rows": what whole blocks left of each kernel row
        REST: tl.constexpr = CONV.s * CONV.inputs - BODY // CONV.r
        TAIL: tl.constexpr = PITCH - BODY
        t = tl.arange(0, TAIL)
        j = BODY // CONV.r + t % REST
        ok = m_ok[:, None] & (t < CONV.r * REST)[None, :]
        a = scattered_pixels(
            pixel, ih0, iw0, ok, t // REST, j // CONV.inputs, j % CONV.inputs, XS, CONV
        )
        acc = mma(a, weights(w, n, n_end, BODY + t, PITCH, PITCH, TAIL), acc, PRECISION)
        if BN2 > 0:
            acc2 = mma(a, weights(w, n2, n_end, BODY + t, PITCH, PITCH, TAIL), acc2, PRECISION)
    return acc, acc2


@triton.jit(do_not_specialize=["batch"])
def conv_relu_forward(
    x,
    w,
    b,
    y,
    batch,
    XS: tl.constexpr,
    CONV: tl.constexpr,
    PITCH: tl.constexpr,
    SCHEME: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    SPLIT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BN2: tl.constexpr,
    BK: tl.constexpr,
):
    """x [N, C, H, W] by strides XS, w [O, PITCH] in SCHEME's order, y [N, O, OH, OW] or its SPLIT
    float32 parts.
    """
    N_TILES: tl.constexpr = (CONV.outputs + BN + BN2 - 1) // (BN + BN2)
    pid = program_index(0, WIDE)
    part = tl.program_id(1)
    column = pid % (CONV.groups * N_TILES)  # neighbours share their pixels in L2
    group = column // N_TILES if CONV.groups > 1 else 0
    m = pid // (CONV.groups * N_TILES) * BM + tl.arange(0, BM)
    if WIDE:
        batch = batch.to(tl.int64)
    m_end = batch * CONV.out_pixels
    m_ok = m < m_end
    n_end = (group + 1) * CONV.outputs
    n = group * CONV.outputs + column % N_TILES * (BN + BN2) + tl.arange(0, BN)
    n2 = n
    if BN2 > 0:
        n2 = group * CONV.outputs + column % N_TILES * (BN + BN2) + BN + tl.arange(0, BN2)
    ih0 = m // CONV.out_columns % CONV.out_rows * CONV.sh - CONV.ph
    iw0 = m % CONV.out_columns * CONV.sw - CONV.pw
    image = (m // CONV.out_pixels).to(tl.int64)
    pixel = (
        x + image * XS.image + (ih0 * XS.row + iw0 * XS.column) + group * (CONV.inputs * XS.channel)
    )
    acc, acc2 = products(
        pixel,
        ih0,
        iw0,
        m_ok,
        w,
        n,
        n2,
        n_end,
        part,
        XS,
        CONV,
        PITCH,
        SCHEME,
        PRECISION,
        SPLIT,
        BM,
        BN,
        BN2,
        BK,
    )
    finish(acc, b, y, part, m, n, m_end, n_end, CONV, CHANNELS_LAST, HAS_BIAS, RELU, SPLIT)
    if BN2 > 0:
        finish(acc2, b, y, part, m, n2, m_end, n_end, CONV, CHANNELS_LAST, HAS_BIAS, RELU, SPLIT)


@triton.jit(do_not_specialize=["length"])
def finish_parts(
    parts,
    b,
    y,
    length,
    CONV: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RELU: tl.constexpr,
    SPLIT: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y = relu(sum of parts [SPLIT, length] + b), in order: 4 * SPLIT bytes read an output."""
    at = program_index(0, WIDE) * BLOCK + tl.arange(0, BLOCK)
    ok = at < length
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for i in range(SPLIT):
        total += tl.load(parts + i * length.to(tl.int64) + at, mask=ok, other=0.0)
    if HAS_BIAS:
        channel = at if CHANNELS_LAST else at // CONV.out_pixels
        channel = channel % CONV.out_channels
        total += widen(tl.load(b + channel, mask=ok, other=0.0))
    if RELU:
        total = tl.where(total < 0, 0.0, total)
    tl.store(y + at, narrow(total, y.dtype.element_ty), mask=ok)


def refuse_conv_relu(
    input: Tensor, weight: Tensor, bias: Tensor | None, stride, padding, dilation, groups: int
) -> str | None:
    return (
        refuse_tensors(input, weight, bias)
        or refuse_four_axes(input)
        or refuse_conv(input, weight, bias, stride, padding, dilation, groups)
    )


def candidates_conv_relu(
    input: Tensor, weight: Tensor, bias: Tensor | None, stride, padding, dilation, groups: int
) -> dict[str, list[ConvTile]]:
    """Every tile conv_relu can choose from for this call, the one it takes unmeasured first."""
    x = layout.readable(input)
    conv = geometry(x.shape[2:], weight, stride, padding, dilation, groups)
    scheme = forward_scheme(conv, layout.strides(x), x.element_size())
    return {"tile": conv_tiles(conv, scheme, x.shape[0], x.dtype, float32_precision())}


@layout.on_its_device
def conv_relu(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride,
    padding,
    dilation,
    groups: int,
    *,
    tile: ConvTile | None = None,
    precision: str | None = None,
) -> Tensor:
    """relu(conv2d(input, weight) + bias); precision ("tf32", "ieee") of float32, by default what
    torch is set to.
    """
    x = layout.readable(input)
    last = layout.is_channels_last(x)
    conv = geometry(x.shape[2:], weight, stride, padding, dilation, groups)
    y = layout.empty(x, (x.shape[0], weight.shape[0], conv.out_rows, conv.out_columns), last)
    if not y.numel():
        return y
    run_forward(x, weight, bias, y, conv, last, True, precision or float32_precision(), tile)
    return y


def run_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    conv: Conv,
    last: bool,
    relu: bool,
    precision: str,
    tile: ConvTile | None,
) -> None:
    scheme = forward_scheme(conv, layout.strides(x), x.element_size())
    tile = tile or conv_tiles(conv, scheme, x.shape[0], x.dtype, precision)[0]
    w, pitch = weight_matrix(weight, conv, scheme, tile.k)
    columns = triton.cdiv(conv.outputs, tile.n + tile.n2) * conv.groups
    grid = (triton.cdiv(x.shape[0] * conv.out_pixels, tile.m) * columns, tile.split)
    out = y
    if tile.split > 1:
        out = torch.empty((tile.split, y.numel()), dtype=torch.float32, device=y.device)
    wide = layout.needs_wide(x, y)
    conv_relu_forward[grid](
        x,
        w,
        bias,
        out,
        x.shape[0],
        layout.strides(x),
        conv,
        pitch,
        scheme,
        last,
        bias is not None,
        relu,
        precision,
        wide,
        tile.split,
        tile.m,
        tile.n,
        tile.n2,
        tile.k,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    if tile.split > 1:
        block = 1024
        finish_parts[(triton.cdiv(y.numel(), block),)](
            out, bias, y, y.numel(), conv, last, bias is not None, relu, tile.split, wide, block
        )
