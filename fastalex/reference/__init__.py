"""Every operator in plain torch: what it means, what it is tested against, and what runs where no kernel does."""

from fastalex.reference.augment import augment
from fastalex.reference.conv_relu import conv_relu, conv_relu_backward
from fastalex.reference.conv_relu_max_pool import conv_relu_lrn_max_pool, conv_relu_max_pool
from fastalex.reference.linear_relu import linear_relu, linear_relu_backward
from fastalex.reference.lrn import lrn, lrn_backward
from fastalex.reference.lrn_max_pool import lrn_max_pool, lrn_max_pool_backward
from fastalex.reference.max_pool import max_pool, max_pool_backward, offsets_to_indices

__all__ = [
    "augment",
    "conv_relu",
    "conv_relu_backward",
    "conv_relu_lrn_max_pool",
    "conv_relu_max_pool",
    "linear_relu",
    "linear_relu_backward",
    "lrn",
    "lrn_backward",
    "lrn_max_pool",
    "lrn_max_pool_backward",
    "max_pool",
    "max_pool_backward",
    "offsets_to_indices",
]
