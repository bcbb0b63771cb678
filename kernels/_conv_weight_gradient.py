"""The kernels of a convolution's weight and bias gradients; the formulas are in conv_relu_backward.py."""
# ruff: noqa: RET505, SIM102, SIM108 - Triton compiles what follows an `if` that returns, and both sides of an `and` and
# of a conditional expression

from __future__ import annotations

import triton
import triton.language as tl

from ._common import mma, narrow, widen


@triton.jit
def weight_at(k, WS: tl.constexpr, CONV: tl.constexpr, PLANES: tl.constexpr):
    """Where product k of an output channel lies in a weight of strides WS."""
    if PLANES:
        taps: tl.constexpr = CONV.r * CONV.s
        return k // taps * WS.channel + k // CONV.s % CONV.r * WS.row + k % CONV.s * WS.column
    else:
        tap = k // CONV.inputs
        return k % CONV.inputs * WS.channel + tap // CONV.s * WS.row + tap % CONV.s * WS.column


@triton.jit
def store_weights(
    acc,
    bias,
    o,
    place,
    WS: tl.constexpr,
    CONV: tl.constexpr,
    PLANES: tl.constexpr,
    BIAS: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """A [BO, BN] tile of a part, which is [O, K] weights and then O biases; or of the gradients themselves."""
    parts, gw, gb, group, column, kept, tile_n = place
    o_ok = o < CONV.outputs
    o = group * CONV.outputs + o
    ok = o_ok[:, None] & kept[None, :]
    if SPLIT > 1:
        tl.store(parts + o[:, None] * CONV.products + column[None, :], acc, mask=ok)
        if tile_n == 0:
            tl.store(parts + CONV.weights + o, bias, mask=o_ok)
    else:
        at = o.to(tl.int64)[:, None] * WS.image + weight_at(column, WS, CONV, PLANES)[None, :]
        tl.store(gw + at, narrow(acc, gw.dtype.element_ty), mask=ok)
        if BIAS:
            if tile_n == 0:
                tl.store(gb + o, narrow(bias, gb.dtype.element_ty), mask=o_ok)


@triton.jit
def gradient_tile(
    g,
    y,
    g_row,
    y_row,
    o,
    m_ok,
    GS: tl.constexpr,
    YS: tl.constexpr,
    CONV: tl.constexpr,
    MASK: tl.constexpr,
):
    """[BP, BO] of dz: g at output channels o of the pixels at g_row, or MASK's part of it."""
    ok = m_ok[:, None] & (o < CONV.outputs)[None, :]
    dz = tl.load(g + g_row[:, None] + (o * GS.channel)[None, :], mask=ok, other=0.0)
    if MASK:
        at = y_row[:, None] + (o * YS.channel)[None, :]
        dz = tl.where(widen(tl.load(y + at, mask=ok, other=0.0)) <= 0, 0.0, dz)
    return dz


@triton.jit(do_not_specialize=["batch"])
def conv_weight_gradient(
    g,
    y,
    x,
    parts,
    gw,
    gb,
    batch,
    GS: tl.constexpr,
    YS: tl.constexpr,
    XS: tl.constexpr,
    WS: tl.constexpr,
    CONV: tl.constexpr,
    MASK: tl.constexpr,
    RUN: tl.constexpr,
    READ_PAST: tl.constexpr,
    PLANES: tl.constexpr,
    O_FIRST: tl.constexpr,
    BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    SPLIT: tl.constexpr,
    BO: tl.constexpr,
    BO2: tl.constexpr,
    BN: tl.constexpr,
    BP: tl.constexpr,
):
    """parts [SPLIT, O * R*S*C/groups + O] from g and, with MASK, y [N, O, OH, OW], and from x [N, C, H, W]; gw and gb
    where SPLIT is 1.

    The tile's products are ordered r, s, c, or c, r, s with PLANES. RUN > 0: whole kernel rows of
    S*C neighbouring values lie RUN apart on the N axis; for C = 3 at 11 taps 34 keeps pairs
    aligned, and the column too many, read where READ_PAST says that x's rows are long enough, is
    never stored. O_FIRST: [BO, BN] tiles, the order in which sm_80 copies both operands
    asynchronously; otherwise [BN, BO + BO2], where 96 = 64 + 32 wastes nothing.
    """
    O_TILES: tl.constexpr = (CONV.outputs + BO + BO2 - 1) // (BO + BO2)
    K: tl.constexpr = CONV.products
    tile_n = tl.program_id(0)
    group = tl.program_id(1) // O_TILES if CONV.groups > 1 else 0
    part = tl.program_id(2)
    o = tl.program_id(1) % O_TILES * (BO + BO2) + tl.arange(0, BO)
    n = tile_n * BN + tl.arange(0, BN)
    if RUN > 0:
        r = n // RUN
        j = n % RUN
        s = j // CONV.inputs
        column = r * (CONV.s * CONV.inputs) + j
        kept = (r < CONV.r) & (j < CONV.s * CONV.inputs)
        tap_at = r * (CONV.dh * XS.row) + j
        read = r < CONV.r if READ_PAST else kept
    else:
        if PLANES:
            tap = n % (CONV.r * CONV.s)
            channel = n // (CONV.r * CONV.s)
        else:  # by C, then by S: dividing a remainder again loses contiguity and wide loads
            tap = n // CONV.inputs
            channel = n % CONV.inputs
        r = tap // CONV.s
        s = tap % CONV.s
        column = n
        kept = n < K
        tap_at = (
            r * (CONV.dh * XS.row)
            + s * (CONV.dw * XS.column)
            + (channel + group * CONV.inputs) * XS.channel
        )
        read = kept
    if WIDE:
        batch = batch.to(tl.int64)
    total = batch * CONV.out_pixels
    share = tl.cdiv(tl.cdiv(total, BP), SPLIT) * BP
    begin = part * share
    end = tl.minimum(begin + share, total)
    acc = tl.zeros((BO, BN) if O_FIRST else (BN, BO), dtype=tl.float32)
    bias = tl.zeros((BO,), dtype=tl.float32)
    o2 = o
    acc2 = acc
    bias2 = bias
    if BO2 > 0:
        o2 = tl.program_id(1) % O_TILES * (BO + BO2) + BO + tl.arange(0, BO2)
        acc2 = tl.zeros((BN, BO2), dtype=tl.float32)
        bias2 = tl.zeros((BO2,), dtype=tl.float32)
    for m0 in range(begin, end, BP):
        m = m0 + tl.arange(0, BP)
        m_ok = m < end
        oh = m // CONV.out_columns % CONV.out_rows
        ow = m % CONV.out_columns
        image = (m // CONV.out_pixels).to(tl.int64)
        g_row = image * GS.image + (oh * GS.row + ow * GS.column)
        g_row += group * (CONV.outputs * GS.channel)
        y_row = image * YS.image + (oh * YS.row + ow * YS.column)
        y_row += group * (CONV.outputs * YS.channel)
        dz = gradient_tile(g, y, g_row, y_row, o, m_ok, GS, YS, CONV, MASK)
        ih = oh * CONV.sh - CONV.ph
        iw = ow * CONV.sw - CONV.pw
        ok = m_ok[:, None] & read[None, :]
        if not CONV.inside:
            ok = (
                ok
                & (ih[:, None] + (r * CONV.dh)[None, :] >= 0)
                & (ih[:, None] + (r * CONV.dh)[None, :] < CONV.rows)
            )
            ok = (
                ok
                & (iw[:, None] + (s * CONV.dw)[None, :] >= 0)
                & (iw[:, None] + (s * CONV.dw)[None, :] < CONV.columns)
            )
        first = image * XS.image + (ih * XS.row + iw * XS.column)
        v = tl.load(x + first[:, None] + tap_at[None, :], mask=ok, other=0.0)
        if O_FIRST:
            acc = mma(tl.trans(dz), v, acc, PRECISION)
        else:
            acc = mma(tl.trans(v), dz, acc, PRECISION)
        if tile_n == 0:
            bias += tl.sum(widen(dz), 0)
        if BO2 > 0:
            dz = gradient_tile(g, y, g_row, y_row, o2, m_ok, GS, YS, CONV, MASK)
            acc2 = mma(tl.trans(v), dz, acc2, PRECISION)
            if tile_n == 0:
                bias2 += tl.sum(widen(dz), 0)
    if O_FIRST:
        tile = acc
    else:
        tile = tl.trans(acc)
    parts += part.to(tl.int64) * (CONV.weights + CONV.out_channels)
    place = (parts, gw, gb, group, column, kept, tile_n)
    store_weights(tile, bias, o, place, WS, CONV, PLANES, BIAS, SPLIT)
    if BO2 > 0:
        store_weights(tl.trans(acc2), bias2, o2, place, WS, CONV, PLANES, BIAS, SPLIT)


@triton.jit
def sum_parts(
    parts,
    gw,
    gb,
    WS: tl.constexpr,
    CONV: tl.constexpr,
    PLANES: tl.constexpr,
    SPLIT: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """gw [O, C/groups, R, S] by strides WS and gb [O]: the sums of parts in order, 4 * SPLIT bytes
    read a value.
    """
    K: tl.constexpr = CONV.products
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for i in range(SPLIT):
        total += tl.load(
            parts + tl.cast(i, tl.int64) * (CONV.weights + CONV.out_channels) + at,
            mask=at < CONV.weights + CONV.out_channels,
            other=0.0,
        )
    tl.store(
        gw + at // K * WS.image + weight_at(at % K, WS, CONV, PLANES),
        narrow(total, gw.dtype.element_ty),
        mask=at < CONV.weights,
    )
    if BIAS:
        tl.store(
            gb + at - CONV.weights,
            narrow(total, gb.dtype.element_ty),
            mask=(at >= CONV.weights) & (at < CONV.weights + CONV.out_channels),
        )
