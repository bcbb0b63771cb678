"""LRN and then max-pooling, in plain torch."""

from __future__ import annotations

from torch import Tensor

from fastalex.reference.lrn import lrn, lrn_backward
from fastalex.reference.max_pool import Ints, max_pool, max_pool_backward


def lrn_max_pool(
    input: Tensor,
    size: int,
    scale: float,
    beta: float,
    k: float,
    groups: int,
    kernel_size: Ints,
    stride: Ints,
    padding: Ints,
    ceil_mode: bool,
    save_offsets: bool,
) -> tuple[Tensor, Tensor]:
    """The two in turn, the normalised map rounded to the input's dtype between them."""
    normalised = lrn(input, size, scale, beta, k, groups)
    return max_pool(normalised, kernel_size, stride, padding, (1, 1), ceil_mode, save_offsets)


def lrn_max_pool_backward(
    grad: Tensor,
    input: Tensor,
    offsets: Tensor,
    size: int,
    scale: float,
    beta: float,
    k: float,
    groups: int,
    kernel_size: Ints,
    stride: Ints,
    padding: Ints,
) -> Tensor:
    """:func:`lrn_backward` of :func:`max_pool_backward`."""
    unpooled = max_pool_backward(
        grad, offsets, input.shape[-2:], kernel_size, stride, padding, (1, 1)
    )
    return lrn_backward(unpooled, input, size, scale, beta, k, groups)
