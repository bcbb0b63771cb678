"""The kernels of a convolution's gradients; what they compute is in conv_relu_backward.py."""
# ruff: noqa: RET505, SIM102 - Triton compiles what follows an `if` that returns, and both branches of an `and`

from __future__ import annotations

import triton
import triton.language as tl

from ._common import mma, narrow, program_index, widen


@triton.jit(do_not_specialize=["length"])
def mask_gradient(g, y, dz, length, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """dz = g where y > 0 or y is NaN: three tensors' bytes."""
    at = program_index(0, WIDE) * BLOCK + tl.arange(0, BLOCK)
    ok = at < length
    value = tl.where(
        widen(tl.load(y + at, mask=ok, other=0.0)) <= 0,
        0.0,
        widen(tl.load(g + at, mask=ok, other=0.0)),
    )
    tl.store(dz + at, narrow(value, dz.dtype.element_ty), mask=ok)


@triton.jit
def first_tap(
    phase,
    PADDING: tl.constexpr,
    STRIDE: tl.constexpr,
    DILATION: tl.constexpr,
    TAPS: tl.constexpr,
    STEP: tl.constexpr,
):
    """The first kernel tap that reaches the input pixels of this phase, or TAPS where none does."""
    first = phase * 0 + TAPS
    for i in tl.static_range(min(STEP, TAPS)):
        tap = min(STEP, TAPS) - 1 - i
        first = tl.where((phase + PADDING - tap * DILATION) % STRIDE == 0, tap, first)
    return first


@triton.jit
def weights(w, o, c, CONV: tl.constexpr, WS: tl.constexpr, BK: tl.constexpr):
    """[BK, BN] of one tap's w, at output channels o and input channels c of a group."""
    ok = (c < CONV.inputs)[None, :]
    if CONV.outputs % BK != 0:
        ok = ok & (o < CONV.outputs)[:, None]
    return tl.load(w + (o * WS.image)[:, None] + (c * WS.channel)[None, :], mask=ok, other=0.0)


@triton.jit
def store_gradient(
    acc,
    x,
    gx,
    image,
    h,
    v,
    c,
    group,
    m_ok,
    XS: tl.constexpr,
    DS: tl.constexpr,
    CONV: tl.constexpr,
    MASK: tl.constexpr,
):
    """A [BM, BN] tile of gx. MASK: x is a ReLU's output, so the gradient stops where x <= 0."""
    ok = m_ok[:, None] & (c < CONV.inputs)[None, :]
    channel = group * CONV.inputs + c
    if MASK:
        at = (image * XS.image + h * XS.row + v * XS.column)[:, None] + (channel * XS.channel)[
            None, :
        ]
        acc = tl.where(widen(tl.load(x + at, mask=ok, other=0.0)) <= 0, 0.0, acc)
    at = (image * DS.image + h * DS.row + v * DS.column)[:, None] + (channel * DS.channel)[None, :]
    tl.store(gx + at, narrow(acc, gx.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["batch"])
def conv_input_gradient(
    dz,
    w,
    x,
    gx,
    batch,
    ZS: tl.constexpr,
    WS: tl.constexpr,
    XS: tl.constexpr,
    DS: tl.constexpr,
    CONV: tl.constexpr,
    MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BN2: tl.constexpr,
    BK: tl.constexpr,
):
    """gx [N, C, H, W] from dz [N, O, OH, OW] and w [O, C/groups, R, S]; program_id(1) is the phase.

    M = N * ceil(H/SH) * ceil(W/SW) pixels of the phase, N = input channels of one group, K = its
    taps x O/groups.
    """
    INPUTS: tl.constexpr = CONV.inputs
    OUTPUTS: tl.constexpr = CONV.outputs
    SH: tl.constexpr = CONV.sh
    SW: tl.constexpr = CONV.sw
    HQ: tl.constexpr = (CONV.rows + SH - 1) // SH
    WQ: tl.constexpr = (CONV.columns + SW - 1) // SW
    N_TILES: tl.constexpr = (INPUTS + BN + BN2 - 1) // (BN + BN2)
    pid = program_index(0, WIDE)
    column = pid % (CONV.groups * N_TILES)
    group = column // N_TILES if CONV.groups > 1 else 0
    m = pid // (CONV.groups * N_TILES) * BM + tl.arange(0, BM)
    c = column % N_TILES * (BN + BN2) + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    c2 = c
    acc2 = acc
    if BN2 > 0:
        c2 = column % N_TILES * (BN + BN2) + BN + tl.arange(0, BN2)
        acc2 = tl.zeros((BM, BN2), dtype=tl.float32)
    if SH * SW == 1:
        down = 0
        across = 0
        r0 = 0
        s0 = 0
        taps_across = CONV.s
        taps = CONV.r * CONV.s
    else:
        down = tl.program_id(1) // SW
        across = tl.program_id(1) % SW
        ROW_STEP: tl.constexpr = CONV.row_step
        COLUMN_STEP: tl.constexpr = CONV.column_step
        R: tl.constexpr = CONV.r
        S: tl.constexpr = CONV.s
        r0 = first_tap(down, CONV.ph, SH, CONV.dh, R, ROW_STEP)
        s0 = first_tap(across, CONV.pw, SW, CONV.dw, S, COLUMN_STEP)
        taps_across = tl.maximum((S - s0 + COLUMN_STEP - 1) // COLUMN_STEP, 1)
        taps = (R - r0 + ROW_STEP - 1) // ROW_STEP * tl.where(s0 < S, taps_across, 0)
    h = m // WQ % HQ * SH + down
    v = m % WQ * SW + across
    if WIDE:
        batch = batch.to(tl.int64)
    m_ok = (m < batch * (HQ * WQ)) & (h < CONV.rows) & (v < CONV.columns)
    image = (m // (HQ * WQ)).to(tl.int64)
    oh0 = (h + CONV.ph - r0 * CONV.dh) // SH
    ow0 = (v + CONV.pw - s0 * CONV.dw) // SW
    source = (
        dz + image * ZS.image + (oh0 * ZS.row + ow0 * ZS.column) + group * (OUTPUTS * ZS.channel)
    )
    k = tl.arange(0, BK)
    BLOCKS: tl.constexpr = (OUTPUTS + BK - 1) // BK
    for step in range(taps * BLOCKS):
        a_r = step // BLOCKS // taps_across
        a_s = step // BLOCKS % taps_across
        o = step % BLOCKS * BK + k
        oh = oh0 - a_r * (CONV.row_step * CONV.dh // SH)
        ow = ow0 - a_s * (CONV.column_step * CONV.dw // SW)
        live = m_ok & (oh >= 0) & (oh < CONV.out_rows) & (ow >= 0) & (ow < CONV.out_columns)
        at = step % BLOCKS * (BK * ZS.channel)
        at -= a_r * (CONV.row_step * CONV.dh // SH * ZS.row) + a_s * (
            CONV.column_step * CONV.dw // SW * ZS.column
        )
        ok = live[:, None]
        if OUTPUTS % BK != 0:
            ok = ok & (o < OUTPUTS)[None, :]
        a = tl.load((source + at)[:, None] + (k * ZS.channel)[None, :], mask=ok, other=0.0)
        tap = w + (r0 + a_r * CONV.row_step) * WS.row + (s0 + a_s * CONV.column_step) * WS.column
        tap += group * (OUTPUTS * WS.image)
        acc = mma(a, weights(tap, o, c, CONV, WS, BK), acc, PRECISION)
        if BN2 > 0:
            acc2 = mma(a, weights(tap, o, c2, CONV, WS, BK), acc2, PRECISION)
    store_gradient(acc, x, gx, image, h, v, c, group, m_ok, XS, DS, CONV, MASK)
    if BN2 > 0:
        store_gradient(acc2, x, gx, image, h, v, c2, group, m_ok, XS, DS, CONV, MASK)


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
    parts,
    gw,
    gb,
    o,
    o_ok,
    column,
    kept,
    tile_n,
    WS: tl.constexpr,
    CONV: tl.constexpr,
    PLANES: tl.constexpr,
    BIAS: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """A [BO, BN] tile of a part, which is [O, K] weights and then O biases; or of the gradients themselves."""
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


@triton.jit(do_not_specialize=["batch"])
def conv_weight_gradient(
    dz,
    x,
    parts,
    gw,
    gb,
    batch,
    ZS: tl.constexpr,
    XS: tl.constexpr,
    WS: tl.constexpr,
    CONV: tl.constexpr,
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
    """parts [SPLIT, O * R*S*C/groups + O] from dz [N, O, OH, OW] and x [N, C, H, W]; gw and gb where SPLIT is 1.

    The tile's products are ordered r, s, c, or c, r, s with PLANES. RUN > 0: whole kernel rows of
    S*C neighbouring values lie RUN apart on the N axis; for C = 3 at 11 taps 36 keeps fours
    aligned, and the three columns too many, read where READ_PAST says that x's rows are long
    enough, are never stored. O_FIRST: [BO, BN] tiles, the order in which sm_80 copies both operands
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
        dz_row = (
            image * ZS.image + (oh * ZS.row + ow * ZS.column) + group * (CONV.outputs * ZS.channel)
        )
        g = tl.load(
            dz + dz_row[:, None] + (o * ZS.channel)[None, :],
            mask=m_ok[:, None] & (o < CONV.outputs)[None, :],
            other=0.0,
        )
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
        acc = (
            mma(tl.trans(g), v, acc, PRECISION) if O_FIRST else mma(tl.trans(v), g, acc, PRECISION)
        )
        if tile_n == 0:
            bias += tl.sum(widen(g), 0)
        if BO2 > 0:
            g2 = tl.load(
                dz + dz_row[:, None] + (o2 * ZS.channel)[None, :],
                mask=m_ok[:, None] & (o2 < CONV.outputs)[None, :],
                other=0.0,
            )
            acc2 = mma(tl.trans(v), g2, acc2, PRECISION)
            if tile_n == 0:
                bias2 += tl.sum(widen(g2), 0)
    parts += part.to(tl.int64) * (CONV.weights + CONV.out_channels)
    o_ok = o < CONV.outputs
    store_weights(
        acc if O_FIRST else tl.trans(acc),
        bias,
        parts,
        gw,
        gb,
        group * CONV.outputs + o,
        o_ok,
        column,
        kept,
        tile_n,
        WS,
        CONV,
        PLANES,
        BIAS,
        SPLIT,
    )
    if BO2 > 0:
        o_ok = o2 < CONV.outputs
        store_weights(
            tl.trans(acc2),
            bias2,
            parts,
            gw,
            gb,
            group * CONV.outputs + o2,
            o_ok,
            column,
            kept,
            tile_n,
            WS,
            CONV,
            PLANES,
            BIAS,
            SPLIT,
        )


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
