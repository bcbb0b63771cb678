"""Max-pooling with torch's semantics, forward and backward: reads x once, writes y and one offset
an output.

The offset of a window's winner is kh * KW + kw: one byte up to 256 taps where torch keeps eight.
With save_offsets=False none is computed. KH KW - 1 comparisons an output; backward
reads g and the offsets once, writes gx once and adds each gradient once. VEC divides C: no lane is
padding but the last block's. The kernels are in _pool.py and _pool_backward.py.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from . import _layout as layout
from ._configs import Launch, pool_launches
from ._pool import Pool, pool_forward
from ._pool_backward import pool_backward
from ._refuse import refuse_four_axes, refuse_tensors

MOST_ROW_TILES = 65535  # of a CUDA grid's second axis


def output_size(
    size: int, kernel: int, stride: int, padding: int, dilation: int, ceil_mode: bool
) -> int:
    """torch's rule: in ceil_mode the last window still starts in the input or its left padding."""
    reach = size + 2 * padding - dilation * (kernel - 1) - 1
    out = (-(-reach // stride) if ceil_mode else reach // stride) + 1
    return out - 1 if ceil_mode and (out - 1) * stride >= size + padding else out


def geometry(size, kernel_size, stride, padding, dilation, ceil_mode: bool) -> Pool:
    out = [
        output_size(size[i], kernel_size[i], stride[i], padding[i], dilation[i], ceil_mode)
        for i in (0, 1)
    ]
    return Pool(*size, *out, *kernel_size, *stride, *padding, *dilation)


def offset_dtype(kernel_size) -> torch.dtype:
    return torch.uint8 if kernel_size[0] * kernel_size[1] <= 256 else torch.int32


def refuse_pool(size, kernel_size, stride, padding, dilation, ceil_mode: bool) -> str | None:
    if min(*kernel_size, *stride, *dilation) < 1 or min(padding) < 0:
        return "kernel_size, stride and dilation must be positive, padding not negative"
    if any(2 * p > d * (k - 1) + 1 for p, k, d in zip(padding, kernel_size, dilation, strict=True)):
        return (
            f"padding {tuple(padding)} is more than half the window, which could hold nothing else"
        )
    pool = geometry(size, kernel_size, stride, padding, dilation, ceil_mode)
    if min(pool.out_rows, pool.out_columns) < 1:
        return f"a map of {tuple(size)} is smaller than the window {tuple(kernel_size)}"
    return None


def refuse_max_pool(
    input: Tensor, kernel_size, stride, padding, dilation, ceil_mode: bool, save_offsets: bool
) -> str | None:
    return (
        refuse_tensors(input)
        or refuse_four_axes(input)
        or refuse_pool(tuple(input.shape[2:]), kernel_size, stride, padding, dilation, ceil_mode)
    )


def refuse_max_pool_backward(
    grad: Tensor, offsets: Tensor, input_size, kernel_size, stride, padding, dilation
) -> str | None:
    return (
        refuse_tensors(grad, offsets)
        or refuse_four_axes(grad)
        or refuse_saved(grad, offsets, kernel_size)
    )


def refuse_saved(grad: Tensor, offsets: Tensor, kernel_size) -> str | None:
    if offsets.shape != grad.shape:
        shapes = tuple(offsets.shape), tuple(grad.shape)
        return f"offsets of {shapes[0]} don't belong to a gradient of {shapes[1]}"
    if offsets.dtype != offset_dtype(kernel_size):
        return f"offsets are {offsets.dtype}, not {offset_dtype(kernel_size)}: pass the forward's"
    return None


def candidates_max_pool(input: Tensor, *arguments) -> dict[str, tuple[Launch, ...]]:
    """Every launch the kernel can choose from, the one it takes unmeasured first."""
    return {"launch": pool_launches("forward", input, False)}


def candidates_max_pool_backward(
    grad: Tensor, offsets: Tensor, *arguments
) -> dict[str, tuple[Launch, ...]]:
    return {"launch": pool_launches("backward", offsets, False)}


@layout.on_its_device
def max_pool(
    input: Tensor,
    kernel_size,
    stride,
    padding,
    dilation,
    ceil_mode: bool,
    save_offsets: bool,
    *,
    launch: Launch | None = None,
) -> tuple[Tensor, Tensor]:
    """(output, offsets) of pooling input [N, C, H, W]; offsets are empty unless save_offsets."""
    pool = geometry(input.shape[2:], kernel_size, stride, padding, dilation, ceil_mode)
    return run_forward(input, pool, None, save_offsets, launch)


def run_forward(
    input: Tensor, pool: Pool, norm, save: bool, launch: Launch | None
) -> tuple[Tensor, Tensor]:
    x = layout.readable(input)
    last = layout.is_channels_last(x)
    n, channels = x.shape[:2]
    shape = (n, channels, pool.out_rows, pool.out_columns)
    y = layout.empty(x, shape, last)
    taps = layout.empty(
        x,
        shape if save else (0,) * 4,
        last,
        offset_dtype((pool.kh, pool.kw)) if save else torch.uint8,
    )
    if y.numel():
        launch = launch or pool_launches("forward", x, norm is not None)[0]
        vec = 1
        if last or norm is not None:
            vec = layout.vector_length(
                norm.group if norm else channels, x.element_size(), last, x, y
            )
        rows = max(launch.rows, triton.cdiv(pool.out_rows, MOST_ROW_TILES))
        lanes = n * pool.out_columns * (channels // vec)
        pool_forward[triton.cdiv(lanes, launch.block), triton.cdiv(pool.out_rows, rows)](
            x,
            y,
            taps if save else y,
            lanes,
            layout.strides(x),
            layout.strides(y),
            channels,
            pool,
            norm,
            last,
            save,
            layout.needs_wide(x, y),
            vec,
            rows,
            launch.block,
            num_warps=launch.warps,
        )
    return y, taps if save else taps.view(0)


@layout.on_its_device
def max_pool_backward(
    grad: Tensor,
    offsets: Tensor,
    input_size,
    kernel_size,
    stride,
    padding,
    dilation,
    *,
    launch: Launch | None = None,
    rectified: Tensor | None = None,
) -> Tensor:
    """The gradient of max_pool's input, of size input_size, in the layout of the saved offsets.

    rectified: the input, where a ReLU made it whose mask the gradient shall take.
    """
    out = tuple(grad.shape[2:])
    pool = Pool(*input_size, *out, *kernel_size, *stride, *padding, *dilation)
    return run_backward(grad, offsets, rectified, pool, None, rectified is not None, launch)


def run_backward(
    grad: Tensor,
    offsets: Tensor,
    input: Tensor | None,
    pool: Pool,
    norm,
    rectified: bool,
    launch: Launch | None,
) -> Tensor:
    """input: what was pooled, needed with norm or where rectified."""
    taps = layout.readable(offsets)
    last = layout.is_channels_last(taps if norm is None else layout.readable(input))
    taps, g = layout.in_layout(taps, last), layout.in_layout(grad, last)
    n, channels = g.shape[:2]
    gx = layout.empty(g, (n, channels, pool.rows, pool.columns), last)
    x = gx if input is None else layout.in_layout(input, last)
    if gx.numel():
        launch = launch or pool_launches("backward", gx, norm is not None)[0]
        vec = 1
        if last or norm is not None:
            vec = layout.vector_length(
                norm.group if norm else channels, g.element_size(), last, g, taps, x, gx
            )
        lanes = n * pool.block_rows * pool.block_columns * (channels // vec)
        pool_backward[(triton.cdiv(lanes, launch.block),)](
            g,
            taps,
            x,
            gx,
            lanes,
            layout.strides(g),
            layout.strides(taps),
            layout.strides(x),
            layout.strides(gx),
            channels,
            pool,
            norm,
            rectified,
            last,
            layout.needs_wide(g, taps, x, gx),
            vec,
            launch.block,
            num_warps=launch.warps,
        )
    return gx
