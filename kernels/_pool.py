"""The kernel of max-pooling, of x itself or of LRN(x) computed on the way.

A lane owns VEC channels of one output column and walks down ROWS output rows, keeping the maxima of
the input rows that the next window shares. x is read from memory once; y and, for training, one
offset an output are written, and nothing else.
"""
# ruff: noqa: RET505, RUF005, B007 - Triton compiles what follows an `if` that returns, and its
# tuples are joined, not unpacked

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from ._common import narrow, program_index, store_tile, widen
from .lrn import locate, normalised

ROW_BY_ROW = tl.constexpr(4)  # taller windows aren't unrolled
UNROLLED_COLUMNS = tl.constexpr(8)


@dataclass(frozen=True)
class Pool:
    """The geometry of one pooling; compiled in, so that no division by it is left."""

    rows: int
    columns: int
    out_rows: int
    out_columns: int
    kh: int
    kw: int
    sh: int
    sw: int
    ph: int
    pw: int
    dh: int
    dw: int

    @property
    def shared_rows(self) -> int:
        """Input rows that a window shares with the next one down, and a lane keeps."""
        return max(self.kh - self.sh, 0) if self.dh == 1 and self.kh <= ROW_BY_ROW.value else 0

    @property
    def rows_inside(self) -> bool:
        return self.ph == 0 and (self.out_rows - 1) * self.sh + (self.kh - 1) * self.dh < self.rows

    @property
    def columns_inside(self) -> bool:
        return (
            self.pw == 0
            and (self.out_columns - 1) * self.sw + (self.kw - 1) * self.dw < self.columns
        )

    @property
    def windows_down(self) -> int:
        """Windows that may cover an input row."""
        return -(-((self.kh - 1) * self.dh + 1) // self.sh)

    @property
    def windows_across(self) -> int:
        return -(-((self.kw - 1) * self.dw + 1) // self.sw)

    @property
    def by_blocks(self) -> bool:
        """Whether a lane of backward owns sh x sw pixels, whose taps in each window are then
        constants.
        """
        return (
            self.dh == self.dw == 1
            and self.sh * self.sw <= 4
            and self.windows_down * self.windows_across <= 9
        )

    @property
    def block_rows(self) -> int:
        """Rows of lanes backward needs: blocks of sh pixels, the first of which starts ph above the
        image.
        """
        return -(-(self.rows + self.ph) // self.sh) if self.by_blocks else self.rows

    @property
    def block_columns(self) -> int:
        return -(-(self.columns + self.pw) // self.sw) if self.by_blocks else self.columns


@triton.jit
def better(new, best):
    """Whether `new`, met after `best`, replaces it: the first of equals stays, a NaN beats all, as
    in torch.
    """
    return (new > best) | (new != new)


@triton.jit
def first_tap(start, DILATION: tl.constexpr):
    """The first tap at or after 0 of a window that starts at `start`."""
    return (tl.maximum(-start, 0) + DILATION - 1) // DILATION


@triton.jit
def window_value(
    x, at, c, ok, DTYPE: tl.constexpr, NORM: tl.constexpr, STEP: tl.constexpr, VEC: tl.constexpr
):
    """[P, VEC] of x, or of LRN(x) rounded to DTYPE as the unfused LRN would store it; -inf where
    not ok.
    """
    if NORM is None:
        columns = tl.arange(0, VEC)[None, :] * STEP
        return widen(tl.load(x + at[:, None] + columns, mask=ok[:, None], other=float("-inf")))
    else:
        value = widen(narrow(normalised(x, at, c, ok, NORM, STEP, VEC), DTYPE))
        return tl.where(ok[:, None], value, float("-inf"))


@triton.jit
def choose(best, where, value, tap, SAVE: tl.constexpr):
    """(best, where) after meeting `value` at `tap`."""
    if SAVE:
        wins = better(value, best)
        return tl.where(wins, value, best), tl.where(wins, tap, where)
    else:
        return tl.maximum(best, value, propagate_nan=tl.PropagateNan.ALL), where


@triton.jit
def row_max(
    x,
    at,
    w0,
    c,
    ok,
    DTYPE: tl.constexpr,
    POOL: tl.constexpr,
    NORM: tl.constexpr,
    S: tl.constexpr,
    SAVE: tl.constexpr,
    VEC: tl.constexpr,
):
    """The maximum [P, VEC] of one row of a window from column w0, and its tap in that row."""
    best = tl.full((at.shape[0], VEC), float("-inf"), tl.float32)
    where = first_tap(w0, POOL.dw)[:, None] + tl.zeros((1, VEC), tl.int32)
    KW: tl.constexpr = POOL.kw
    if KW <= UNROLLED_COLUMNS:
        for kw in tl.static_range(KW):
            live = ok
            if not POOL.columns_inside:
                live = ok & (w0 + kw * POOL.dw >= 0) & (w0 + kw * POOL.dw < POOL.columns)
            value = window_value(
                x, at + kw * POOL.dw * S.column, c, live, DTYPE, NORM, S.channel, VEC
            )
            best, where = choose(best, where, value, kw, SAVE)
    else:
        for kw in range(KW):
            live = ok & (w0 + kw * POOL.dw >= 0) & (w0 + kw * POOL.dw < POOL.columns)
            value = window_value(
                x, at + kw * POOL.dw * S.column, c, live, DTYPE, NORM, S.channel, VEC
            )
            best, where = choose(best, where, value, kw, SAVE)
    return best, where


@triton.jit
def window_row(
    x,
    at,
    h,
    w0,
    c,
    ok,
    DTYPE: tl.constexpr,
    POOL: tl.constexpr,
    NORM: tl.constexpr,
    S: tl.constexpr,
    SAVE: tl.constexpr,
    VEC: tl.constexpr,
):
    """row_max of input row h, `at` being where row 0 of the image has the window's first column."""
    live = ok
    if not POOL.rows_inside:
        live = ok & (h >= 0) & (h < POOL.rows)
    at += h * S.row
    if S.channel == 1:
        at = tl.multiple_of(at, VEC)
    return row_max(x, at, w0, c, live, DTYPE, POOL, NORM, S, SAVE, VEC)


@triton.jit(do_not_specialize=["lanes"])
def pool_forward(
    x,
    y,
    offsets,
    lanes,
    XS: tl.constexpr,
    YS: tl.constexpr,
    CHANNELS: tl.constexpr,
    POOL: tl.constexpr,
    NORM: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    SAVE: tl.constexpr,
    WIDE: tl.constexpr,
    VEC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y [N, CHANNELS, out_rows, out_columns] and, where SAVE, each winner's tap kh * KW + kw,
    strided as y.

    lanes = N * out_columns * CHANNELS / VEC; program_id(1) picks ROWS output rows.
    """
    lane = program_index(0, WIDE) * BLOCK + tl.arange(0, BLOCK)
    ok = lane < lanes
    image, run, _, ow = locate(lane, CHANNELS // VEC, 1, POOL.out_columns, CHANNELS_LAST)
    channel = run * VEC
    c = 0
    if NORM is not None:
        c = channel % NORM.group
    oh = tl.program_id(1) * ROWS
    w0 = ow * POOL.sw - POOL.pw
    at = image * XS.image + channel * XS.channel + w0 * XS.column
    out = image * YS.image + channel * YS.channel + ow * YS.column
    dtype: tl.constexpr = y.dtype.element_ty
    SHARED: tl.constexpr = POOL.shared_rows
    KH: tl.constexpr = POOL.kh
    kept = ()
    for i in tl.static_range(SHARED):
        kept = kept + (
            window_row(
                x, at, oh * POOL.sh - POOL.ph + i, w0, c, ok, dtype, POOL, NORM, XS, SAVE, VEC
            ),
        )
    for step in range(ROWS):
        live = ok & (oh < POOL.out_rows)
        h0 = oh * POOL.sh - POOL.ph
        best = tl.full((BLOCK, VEC), float("-inf"), tl.float32)
        where = (
            first_tap(h0, POOL.dh) * POOL.kw
            + first_tap(w0, POOL.dw)[:, None]
            + tl.zeros((1, VEC), tl.int32)
        )
        if POOL.kh <= ROW_BY_ROW:
            rows = kept
            for i in tl.static_range(SHARED, KH):
                h = h0 + i * POOL.dh
                rows = rows + (window_row(x, at, h, w0, c, live, dtype, POOL, NORM, XS, SAVE, VEC),)
            for i in tl.static_range(KH):
                best, where = choose(best, where, rows[i][0], rows[i][1] + i * POOL.kw, SAVE)
            kept = rows[KH - SHARED :]
        else:
            for i in range(POOL.kh):
                h = h0 + i * POOL.dh
                value, tap = window_row(x, at, h, w0, c, live, dtype, POOL, NORM, XS, SAVE, VEC)
                best, where = choose(best, where, value, tap + i * POOL.kw, SAVE)
        place = out + oh * YS.row
        if YS.channel == 1:
            place = tl.multiple_of(place, VEC)
        store_tile(y, place, best, live, YS.channel)
        if SAVE:
            store_tile(offsets, place, where, live, YS.channel)
        oh += 1
