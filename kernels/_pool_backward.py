"""The kernel of max-pooling's gradient, of x itself or back through LRN(x) too.

It gathers: each input pixel looks up the windows that cover it, so there are no atomics. It reads
the gradient and the saved taps once (and x once where it goes back through LRN, or masks the gradient by the ReLU that
made x) and writes gx once.
"""
# ruff: noqa: RUF005, B007 - Triton's tuples are joined, not unpacked

from __future__ import annotations

import triton
import triton.language as tl

from ._common import load_span, pack, program_index, store_tile
from .lrn import input_gradient, locate


@triton.jit
def add_winners(total, grads, taps, TAP):
    """total + the gradients of the windows whose winner is TAP."""
    added = ()
    for i in tl.static_range(len(grads)):
        added = added + (total[i] + tl.where(taps[i] == TAP, grads[i], 0.0),)
    return added


@triton.jit
def window_span(
    g,
    offsets,
    at,
    at_offset,
    oh,
    ow,
    c,
    ok,
    BEFORE: tl.constexpr,
    AFTER: tl.constexpr,
    GROUP: tl.constexpr,
    GS: tl.constexpr,
    OS: tl.constexpr,
    POOL: tl.constexpr,
    VEC: tl.constexpr,
):
    """The gradients and winners' taps of window (oh, ow), over a span of channels; zero where there
    is none.
    """
    live = ok & (oh >= 0) & (oh < POOL.out_rows) & (ow >= 0) & (ow < POOL.out_columns)
    at += oh * GS.row + ow * GS.column
    at_offset += oh * OS.row + ow * OS.column
    if GS.channel == 1:
        at = tl.multiple_of(at, VEC)
        at_offset = tl.multiple_of(at_offset, VEC)
    grads = load_span(g, at, c, live, BEFORE, AFTER, GROUP, GS.channel, VEC)
    taps = load_span(offsets, at_offset, c, live, BEFORE, AFTER, GROUP, OS.channel, VEC)
    return grads, taps


@triton.jit
def write_gradient(
    grads,
    x,
    gx,
    at_x,
    at_gx,
    c,
    ok,
    XS: tl.constexpr,
    DS: tl.constexpr,
    NORM: tl.constexpr,
    RECTIFIED: tl.constexpr,
    VEC: tl.constexpr,
):
    """Stores a pixel's gradient, sent back through LRN where there is one, and zero where a RECTIFIED x is."""
    if DS.channel == 1:
        at_gx = tl.multiple_of(at_gx, VEC)
        at_x = tl.multiple_of(at_x, VEC)
    if NORM is None:
        tile = pack(grads)
        if RECTIFIED:
            v = load_span(x, at_x, c, ok, 0, 0, 1, XS.channel, VEC)
            tile = tl.where(pack(v) <= 0, 0.0, tile)
        store_tile(gx, at_gx, tile, ok, DS.channel)
    else:
        REACH: tl.constexpr = NORM.left + NORM.right
        v = load_span(x, at_x, c, ok, REACH, REACH, NORM.group, XS.channel, VEC)
        tile = input_gradient(v, grads, c, NORM, VEC)
        if RECTIFIED:
            tile = tl.where(pack(v[REACH : REACH + VEC]) <= 0, 0.0, tile)
        store_tile(gx, at_gx, tile, ok, DS.channel)


@triton.jit(do_not_specialize=["lanes"])
def pool_backward(
    g,
    offsets,
    x,
    gx,
    lanes,
    GS: tl.constexpr,
    OS: tl.constexpr,
    XS: tl.constexpr,
    DS: tl.constexpr,
    CHANNELS: tl.constexpr,
    POOL: tl.constexpr,
    NORM: tl.constexpr,
    RECTIFIED: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """gx [N, CHANNELS, rows, columns] from g and the taps [N, CHANNELS, out_rows, out_columns]; x
    only with NORM, or where it is RECTIFIED: a ReLU's output, whose mask gx takes.

    lanes = N * block_rows * block_columns * CHANNELS / VEC. By blocks, a lane owns sh x sw pixels:
    3x3/2 then looks at 9 window-pixel pairs for 4 pixels and loads each of its 4 windows once.
    """
    lane = program_index(0, WIDE) * BLOCK + tl.arange(0, BLOCK)
    ok = lane < lanes
    image, run, bh, bw = locate(
        lane, CHANNELS // VEC, POOL.block_rows, POOL.block_columns, CHANNELS_LAST
    )
    channel = run * VEC
    BEFORE: tl.constexpr = 0 if NORM is None else NORM.right
    AFTER: tl.constexpr = 0 if NORM is None else NORM.left
    GROUP: tl.constexpr = CHANNELS if NORM is None else NORM.group
    c = channel % GROUP
    at = image * GS.image + channel * GS.channel
    at_offset = image * OS.image + channel * OS.channel
    at_x = image * XS.image + channel * XS.channel
    at_gx = image * DS.image + channel * DS.channel
    DOWN: tl.constexpr = POOL.windows_down
    ACROSS: tl.constexpr = POOL.windows_across
    SH: tl.constexpr = POOL.sh
    SW: tl.constexpr = POOL.sw
    if POOL.by_blocks:
        windows = ()
        for a in tl.static_range(DOWN):
            for b in tl.static_range(ACROSS):
                windows = windows + (
                    window_span(
                        g,
                        offsets,
                        at,
                        at_offset,
                        bh - a,
                        bw - b,
                        c,
                        ok,
                        BEFORE,
                        AFTER,
                        GROUP,
                        GS,
                        OS,
                        POOL,
                        VEC,
                    ),
                )
        for i in tl.static_range(SH):
            for j in tl.static_range(SW):
                h = bh * SH + (i - POOL.ph)
                w = bw * SW + (j - POOL.pw)
                live = ok & (h >= 0) & (h < POOL.rows) & (w >= 0) & (w < POOL.columns)
                total = [tl.zeros((BLOCK,), tl.float32) for value in windows[0][0]]
                for a in tl.static_range(DOWN):
                    for b in tl.static_range(ACROSS):
                        if i + a * SH < POOL.kh and j + b * SW < POOL.kw:
                            grads, taps = windows[a * ACROSS + b]
                            total = add_winners(
                                total, grads, taps, (i + a * SH) * POOL.kw + j + b * SW
                            )
                write_gradient(
                    total,
                    x,
                    gx,
                    at_x + h * XS.row + w * XS.column,
                    at_gx + h * DS.row + w * DS.column,
                    c,
                    live,
                    XS,
                    DS,
                    NORM,
                    RECTIFIED,
                    VEC,
                )
    else:
        total = ()
        for i in tl.static_range(BEFORE + VEC + AFTER):
            total = total + (tl.zeros((BLOCK,), tl.float32),)
        for window in range(DOWN * ACROSS):
            oh = (bh + POOL.ph) // SH - window // ACROSS
            ow = (bw + POOL.pw) // SW - window % ACROSS
            down = bh + POOL.ph - oh * SH
            across = bw + POOL.pw - ow * SW
            covers = (down % POOL.dh == 0) & (across % POOL.dw == 0)
            covers = covers & (down < POOL.kh * POOL.dh) & (across < POOL.kw * POOL.dw)
            tap = down // POOL.dh * POOL.kw + across // POOL.dw
            grads, taps = window_span(
                g,
                offsets,
                at,
                at_offset,
                oh,
                ow,
                c,
                ok & covers,
                BEFORE,
                AFTER,
                GROUP,
                GS,
                OS,
                POOL,
                VEC,
            )
            total = add_winners(total, grads, taps, tap)
        write_gradient(
            total,
            x,
            gx,
            at_x + bh * XS.row + bw * XS.column,
            at_gx + bh * DS.row + bw * DS.column,
            c,
            ok,
            XS,
            DS,
            NORM,
            RECTIFIED,
            VEC,
        )
