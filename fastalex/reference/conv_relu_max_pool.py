"""Convolution, ReLU and max-pooling, with or without LRN between them, in plain torch."""

from __future__ import annotations

from torch import Tensor

from fastalex.reference.conv_relu import conv_relu
from fastalex.reference.lrn_max_pool import lrn_max_pool
from fastalex.reference.max_pool import Ints, max_pool


def conv_relu_max_pool(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    groups: int,
    pool_size: Ints,
    pool_stride: Ints,
    pool_padding: Ints,
    ceil_mode: bool,
) -> Tensor:
    """The two in turn, the map rounded to the input's dtype between them."""
    map = conv_relu(input, weight, bias, stride, padding, dilation, groups)
    return max_pool(map, pool_size, pool_stride, pool_padding, (1, 1), ceil_mode, False)[0]


def conv_relu_lrn_max_pool(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    groups: int,
    size: int,
    scale: float,
    beta: float,
    k: float,
    lrn_groups: int,
    pool_size: Ints,
    pool_stride: Ints,
    pool_padding: Ints,
    ceil_mode: bool,
) -> Tensor:
    """The three in turn, the maps rounded to the input's dtype between them."""
    map = conv_relu(input, weight, bias, stride, padding, dilation, groups)
    norm, pool = (size, scale, beta, k, lrn_groups), (pool_size, pool_stride, pool_padding)
    return lrn_max_pool(map, *norm, *pool, ceil_mode, False)[0]
