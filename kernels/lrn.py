"""Local response normalization across channels, forward and backward.

    s_c  = k + scale * sum of x_j^2 over j in [c - LEFT, c + RIGHT], inside c's group
    y_c  = x_c * s_c^-beta
    gx_c = g_c s_c^-beta - 2 scale beta x_c * sum of g_j x_j s_j^(-beta-1) over j in [c - RIGHT, c +
    LEFT]

A lane owns VEC channels of one pixel as vectors in its registers and loads the channels on each
side once more from L1, so nothing crosses lanes: no shuffle, no shared memory, no barrier. Forward
reads x [N, C, ...] once from memory and writes y once, size + 4 FLOPs an element; backward reads x
and g, writes gx and recomputes s from x, 2 size + 10 FLOPs. VEC divides the group, so no lane is
padding but the last block's.
"""
# ruff: noqa: RET505, RUF005 - Triton compiles what follows an `if` that returns, and its tuples are
# joined, not unpacked

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from . import _layout as layout
from ._common import load_span, pack, program_index, store_tile
from ._configs import Launch, lrn_launches
from ._refuse import refuse_normalisation, refuse_tensors

WIDEST_WINDOW = 33  # wider ones would unroll into too many registers: _lrn_wide.py loops over them


@dataclass(frozen=True)
class Normalisation:
    """The constants of one normalisation; compiled in, as a network has one or two of them."""

    group: int  # channels of a group
    left: int
    right: int
    scale: float
    beta: float
    k: float

    @property
    def window(self) -> int:
        return self.left + self.right + 1

    @property
    def edges_are_safe(self) -> bool:
        """Whether a channel outside the group, taken as zero, adds exactly zero to a gradient."""
        return self.k > 0 and self.scale >= 0 and self.beta >= 0


def normalisation(
    channels: int, size: int, scale: float, beta: float, k: float, groups: int
) -> Normalisation:
    group = channels // groups
    left, right = min(size // 2, group - 1), min(size - 1 - size // 2, group - 1)
    return Normalisation(group, left, right, float(scale), float(beta), float(k))


@triton.jit
def window_sums(v, WINDOW: tl.constexpr):
    """n + WINDOW - 1 vectors -> the n sums of WINDOW neighbours."""
    sums = ()
    for i in tl.static_range(len(v) - WINDOW + 1):
        total = v[i]
        for j in tl.static_range(1, WINDOW):
            total += v[i + j]
        sums = sums + (total,)
    return sums


@triton.jit
def power(s, BETA: tl.constexpr):
    """s ** -BETA"""
    if BETA == 0.75:
        r = tl.math.rsqrt(s)
        return r * tl.sqrt(r)
    elif BETA == 0.5:
        return tl.math.rsqrt(s)
    elif BETA == 1:
        return 1.0 / s
    elif BETA == 0:
        return tl.full(s.shape, 1.0, tl.float32)
    else:
        return tl.exp2(-BETA * tl.log2(s))


@triton.jit
def power_over(u, s, BETA: tl.constexpr):
    """u / s where u = s ** -BETA, without a division where there is a cheaper way."""
    if BETA == 0.75 or BETA == 0.5:
        r = tl.math.rsqrt(s)
        return u * r * r
    elif BETA == 1:
        return u * u
    else:
        return u / s


@triton.jit
def normalised(x, at, c, ok, NORM: tl.constexpr, STEP: tl.constexpr, VEC: tl.constexpr):
    """[P, VEC] of LRN(x) in float32, from the VEC channels at `at`."""
    v = load_span(x, at, c, ok, NORM.left, NORM.right, NORM.group, STEP, VEC)
    sums = window_sums([a * a for a in v], NORM.window)
    z = ()
    for i in tl.static_range(VEC):
        z = z + (v[i + NORM.left] * power(NORM.k + NORM.scale * sums[i], NORM.beta),)
    return pack(z)


@triton.jit
def input_gradient(v, g, c, NORM: tl.constexpr, VEC: tl.constexpr):
    """[P, VEC] of gx from x, left + right channels beyond each side, and g, right before and left
    after.
    """
    REACH: tl.constexpr = NORM.left + NORM.right
    s = [NORM.k + NORM.scale * a for a in window_sums([a * a for a in v], NORM.window)]
    u = [power(a, NORM.beta) for a in s]
    q = ()
    for i in tl.static_range(VEC + REACH):
        part = g[i] * v[i + NORM.left] * power_over(u[i], s[i], NORM.beta)
        if not NORM.edges_are_safe:
            j = c + (i - NORM.right)
            part = tl.where((j >= 0) & (j < NORM.group), part, 0.0)
        q = q + (part,)
    sums = window_sums(q, NORM.window)
    d = ()
    for i in tl.static_range(VEC):
        own = v[i + REACH]
        value = g[i + NORM.right] * u[i + NORM.right] - (2 * NORM.scale * NORM.beta) * own * sums[i]
        d = d + (value,)
    return pack(d)


@triton.jit
def locate(
    lane, RUNS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS_LAST: tl.constexpr
):
    """lane -> (image, run of channels, row, column), neighbours in memory side by side."""
    if CHANNELS_LAST:
        run = lane % RUNS
        pixel = lane // RUNS
        image = pixel // (ROWS * COLUMNS)
    else:
        pixel = lane % (ROWS * COLUMNS)
        run = lane // (ROWS * COLUMNS) % RUNS
        image = lane // (ROWS * COLUMNS) // RUNS
    return image, run, pixel // COLUMNS % ROWS, pixel % COLUMNS


@triton.jit
def offset(image, channel, row, column, S: tl.constexpr, VEC: tl.constexpr):
    """Of a run of VEC channels, in elements."""
    at = image * S.image + channel * S.channel + row * S.row + column * S.column
    if S.channel == 1:
        at = tl.multiple_of(at, VEC)
    return at


@triton.jit(do_not_specialize=["lanes"])
def lrn_forward(
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
    VEC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y = LRN(x), [N, CHANNELS, rows, columns]; lanes = N * rows * columns * CHANNELS / VEC."""
    lane = program_index(0, WIDE) * BLOCK + tl.arange(0, BLOCK)
    ok = lane < lanes
    image, run, row, column = locate(
        lane, CHANNELS // VEC, PLANE.rows, PLANE.columns, CHANNELS_LAST
    )
    channel = run * VEC
    at = offset(image, channel, row, column, XS, VEC)
    tile = normalised(x, at, channel % NORM.group, ok, NORM, XS.channel, VEC)
    store_tile(y, offset(image, channel, row, column, YS, VEC), tile, ok, YS.channel)


@triton.jit(do_not_specialize=["lanes"])
def lrn_input_gradient(
    g,
    x,
    gx,
    lanes,
    GS: tl.constexpr,
    XS: tl.constexpr,
    DS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PLANE: tl.constexpr,
    NORM: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """gx from g and x, all [N, CHANNELS, rows, columns]; lanes as forward."""
    lane = program_index(0, WIDE) * BLOCK + tl.arange(0, BLOCK)
    ok = lane < lanes
    image, run, row, column = locate(
        lane, CHANNELS // VEC, PLANE.rows, PLANE.columns, CHANNELS_LAST
    )
    channel = run * VEC
    c = channel % NORM.group
    at_x = offset(image, channel, row, column, XS, VEC)
    at_g = offset(image, channel, row, column, GS, VEC)
    REACH: tl.constexpr = NORM.left + NORM.right
    v = load_span(x, at_x, c, ok, REACH, REACH, NORM.group, XS.channel, VEC)
    grads = load_span(g, at_g, c, ok, NORM.right, NORM.left, NORM.group, GS.channel, VEC)
    tile = input_gradient(v, grads, c, NORM, VEC)
    store_tile(gx, offset(image, channel, row, column, DS, VEC), tile, ok, DS.channel)


def refuse_lrn(
    input: Tensor, size: int, scale: float, beta: float, k: float, groups: int
) -> str | None:
    return refuse_tensors(input) or refuse_normalisation(input, size, scale, beta, k, groups)


def refuse_lrn_backward(
    grad: Tensor, input: Tensor, size: int, scale: float, beta: float, k: float, groups: int
) -> str | None:
    return refuse_tensors(grad, input) or refuse_normalisation(input, size, scale, beta, k, groups)


def candidates_lrn(input: Tensor, *arguments) -> dict[str, tuple[Launch, ...]]:
    """Every launch the kernel can choose from, the one it takes unmeasured first; wide windows have one."""
    return launches("forward", input, *arguments)


def candidates_lrn_backward(
    grad: Tensor, input: Tensor, *arguments
) -> dict[str, tuple[Launch, ...]]:
    return launches("backward", input, *arguments)


def launches(direction: str, input: Tensor, *norm) -> dict[str, tuple[Launch, ...]]:
    """norm: size, scale, beta, k, groups."""
    if normalisation(input.shape[1], *norm).window > WIDEST_WINDOW:
        return {}
    return {"launch": lrn_launches(direction, as_images(input))}


def as_images(x: Tensor) -> Tensor:
    """[N, C, ...] of any rank -> [N, C, H, W] over the same memory where the axes allow it."""
    if x.dim() == 3:
        return x.unsqueeze(2)
    return x if x.dim() == 4 else x.flatten(2, -2)


@layout.on_its_device
def lrn(
    input: Tensor,
    size: int,
    scale: float,
    beta: float,
    k: float,
    groups: int,
    *,
    launch: Launch | None = None,
) -> Tensor:
    """LRN of input [N, C, ...]; reads it once and writes the result once."""
    x = layout.readable(as_images(input))
    last = layout.is_channels_last(x)
    y = layout.empty(x, tuple(x.shape), last)
    if x.numel():
        norm = normalisation(x.shape[1], size, scale, beta, k, groups)
        if norm.window > WIDEST_WINDOW:
            from ._lrn_wide import forward

            forward(x, y, norm, last)
        else:
            forward_narrow(x, y, norm, last, launch or lrn_launches("forward", x)[0])
    return y.view(input.shape) if input.dim() != 4 else y


def forward_narrow(x: Tensor, y: Tensor, norm: Normalisation, last: bool, launch: Launch) -> None:
    plane, (xs, ys) = layout.collapse(x, y)
    vec = layout.vector_length(norm.group, x.element_size(), last, x, y)
    lanes = x.numel() // vec
    lrn_forward[(triton.cdiv(lanes, launch.block),)](
        x,
        y,
        lanes,
        xs,
        ys,
        x.shape[1],
        plane,
        norm,
        last,
        layout.needs_wide(x, y),
        vec,
        launch.block,
        num_warps=launch.warps,
    )


@layout.on_its_device
def lrn_backward(
    grad: Tensor,
    input: Tensor,
    size: int,
    scale: float,
    beta: float,
    k: float,
    groups: int,
    *,
    launch: Launch | None = None,
) -> Tensor:
    """The gradient of lrn with respect to input; keeps nothing from forward but input itself."""
    x = layout.readable(as_images(input))
    last = layout.is_channels_last(x)
    g = layout.in_layout(as_images(grad), last)
    gx = layout.empty(x, tuple(x.shape), last)
    if x.numel():
        norm = normalisation(x.shape[1], size, scale, beta, k, groups)
        if norm.window > WIDEST_WINDOW:
            from ._lrn_wide import backward

            backward(g, x, gx, norm, last)
        else:
            backward_narrow(g, x, gx, norm, last, launch or lrn_launches("backward", x)[0])
    return gx.view(input.shape) if input.dim() != 4 else gx


def backward_narrow(
    g: Tensor, x: Tensor, gx: Tensor, norm: Normalisation, last: bool, launch: Launch
) -> None:
    plane, (gs, xs, ds) = layout.collapse(g, x, gx)
    vec = layout.vector_length(norm.group, x.element_size(), last, g, x, gx)
    lanes = x.numel() // vec
    lrn_input_gradient[(triton.cdiv(lanes, launch.block),)](
        g,
        x,
        gx,
        lanes,
        gs,
        xs,
        ds,
        x.shape[1],
        plane,
        norm,
        last,
        layout.needs_wide(g, x, gx),
        vec,
        launch.block,
        num_warps=launch.warps,
    )
