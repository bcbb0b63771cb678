"""The kernels of a convolution's input gradient and of its ReLU's mask; the formulas are in conv_relu_backward.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _layout as layout
from ._common import mma, narrow, program_index, widen

BLOCK = 1024


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
    gx,
    x,
    image,
    h,
    v,
    c,
    group,
    m_ok,
    DS: tl.constexpr,
    XS: tl.constexpr,
    CONV: tl.constexpr,
    RECTIFIED: tl.constexpr,
):
    """A [BM, BN] tile of gx, zero where a RECTIFIED x is."""
    ok = m_ok[:, None] & (c < CONV.inputs)[None, :]
    channel = group * CONV.inputs + c
    if RECTIFIED:
        at = (image * XS.image + h * XS.row + v * XS.column)[:, None]
        made = tl.load(x + (at + (channel * XS.channel)[None, :]), mask=ok, other=0.0)
        acc = tl.where(widen(made) <= 0, 0.0, acc)
    at = (image * DS.image + h * DS.row + v * DS.column)[:, None] + (channel * DS.channel)[None, :]
    tl.store(gx + at, narrow(acc, gx.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["batch"])
def conv_input_gradient(
    dz,
    w,
    gx,
    x,
    batch,
    ZS: tl.constexpr,
    WS: tl.constexpr,
    DS: tl.constexpr,
    XS: tl.constexpr,
    CONV: tl.constexpr,
    RECTIFIED: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BN2: tl.constexpr,
    BK: tl.constexpr,
):
    """gx [N, C, H, W] from dz [N, O, OH, OW] and w [O, C/groups, R, S]; program_id(1) is the phase.
    x only where it is RECTIFIED: a ReLU's output, whose mask gx takes.

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
    store_gradient(acc, gx, x, image, h, v, c, group, m_ok, DS, XS, CONV, RECTIFIED)
    if BN2 > 0:
        store_gradient(acc2, gx, x, image, h, v, c2, group, m_ok, DS, XS, CONV, RECTIFIED)


def masked(grad: Tensor, output: Tensor, last: bool) -> Tensor:
    """The gradient behind the ReLU that made output, in one pass."""
    g, y = (t.contiguous(memory_format=layout.memory_format(last)) for t in (grad, output))
    dz = torch.empty_like(y)
    if dz.numel():
        mask_gradient[(triton.cdiv(dz.numel(), BLOCK),)](
            g, y, dz, dz.numel(), layout.needs_wide(dz), BLOCK
        )
    return dz
