"""Max-pooling of a local response normalization in one pass: the normalised map is never written.

Equals max_pool(lrn(x)) bit for bit, as the normalised value is rounded to x's type before
comparing. Forward reads x once and writes y and one offset byte an output; backward reads x, the
gradient and the offsets, recomputes the normalisation and writes the gradient of x. FLOPs are
the pool's and LRN's, those of the forward pass 1 + 1 / (ROWS stride) times down, as the first row a lane
walks isn't shared, and KW / stride times across. No lane is padding but the last block's. The kernels
are in _pool.py and _pool_backward.py.
"""

from __future__ import annotations

from torch import Tensor

from . import _layout as layout
from ._configs import Launch, pool_launches
from ._conv_input_gradient import masked
from ._refuse import refuse_four_axes, refuse_normalisation, refuse_tensors
from .lrn import WIDEST_WINDOW, lrn, lrn_backward, normalisation
from .max_pool import (
    Pool,
    geometry,
    max_pool,
    max_pool_backward,
    refuse_pool,
    refuse_saved,
    run_backward,
    run_forward,
)


def refuse_lrn_max_pool(
    input: Tensor,
    size: int,
    scale: float,
    beta: float,
    k: float,
    groups: int,
    kernel_size,
    stride,
    padding,
    ceil_mode: bool,
    save_offsets: bool,
) -> str | None:
    return (
        refuse_tensors(input)
        or refuse_four_axes(input)
        or refuse_normalisation(input, size, scale, beta, k, groups)
        or refuse_pool(tuple(input.shape[2:]), kernel_size, stride, padding, (1, 1), ceil_mode)
    )


def refuse_lrn_max_pool_backward(
    grad: Tensor,
    input: Tensor,
    offsets: Tensor,
    size: int,
    scale: float,
    beta: float,
    k: float,
    groups: int,
    kernel_size,
    stride,
    padding,
) -> str | None:
    return (
        refuse_tensors(grad, input, offsets)
        or refuse_four_axes(input)
        or refuse_normalisation(input, size, scale, beta, k, groups)
        or refuse_saved(grad, offsets, kernel_size)
    )


def candidates_lrn_max_pool(input: Tensor, *arguments) -> dict[str, tuple[Launch, ...]]:
    """Every launch the kernel can choose from, the one it takes unmeasured first; the pair of operators has none."""
    return launches("forward", input, *arguments[:5])


def candidates_lrn_max_pool_backward(
    grad: Tensor, input: Tensor, offsets: Tensor, *arguments
) -> dict[str, tuple[Launch, ...]]:
    return launches("backward", input, *arguments[:5])


def launches(direction: str, input: Tensor, *norm) -> dict[str, tuple[Launch, ...]]:
    """norm: size, scale, beta, k, groups."""
    if normalisation(input.shape[1], *norm).window > WIDEST_WINDOW:
        return {}
    return {"launch": pool_launches(direction, input, True)}


@layout.on_its_device
def lrn_max_pool(
    input: Tensor,
    size: int,
    scale: float,
    beta: float,
    k: float,
    groups: int,
    kernel_size,
    stride,
    padding,
    ceil_mode: bool,
    save_offsets: bool,
    *,
    launch: Launch | None = None,
) -> tuple[Tensor, Tensor]:
    """(output, offsets) of max_pool(lrn(input)); a window too wide to unroll runs as the two
    operators in turn.
    """
    norm = normalisation(input.shape[1], size, scale, beta, k, groups)
    if norm.window > WIDEST_WINDOW:
        normal = lrn(input, size, scale, beta, k, groups)
        return max_pool(normal, kernel_size, stride, padding, (1, 1), ceil_mode, save_offsets)
    pool = geometry(input.shape[2:], kernel_size, stride, padding, (1, 1), ceil_mode)
    return run_forward(input, pool, norm, save_offsets, launch)


@layout.on_its_device
def lrn_max_pool_backward(
    grad: Tensor,
    input: Tensor,
    offsets: Tensor,
    size: int,
    scale: float,
    beta: float,
    k: float,
    groups: int,
    kernel_size,
    stride,
    padding,
    *,
    launch: Launch | None = None,
    rectified: Tensor | None = None,
) -> Tensor:
    """The gradient of input; rectified: input again, where a ReLU made it whose mask the gradient shall take."""
    norm = normalisation(input.shape[1], size, scale, beta, k, groups)
    if norm.window > WIDEST_WINDOW:
        g = max_pool_backward(grad, offsets, input.shape[2:], kernel_size, stride, padding, (1, 1))
        gx = lrn_backward(g, input, size, scale, beta, k, groups)
        return gx if rectified is None else masked(gx, input, layout.is_channels_last(gx))
    pool = Pool(*input.shape[2:], *grad.shape[2:], *kernel_size, *stride, *padding, 1, 1)
    return run_backward(grad, offsets, input, pool, norm, rectified is not None, launch)
