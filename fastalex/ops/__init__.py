"""Drop-in operators and layers: replacing an import is the whole migration."""

from fastalex.ops.augment import augment
from fastalex.ops.conv_relu import Conv2dReLU, conv2d_relu
from fastalex.ops.conv_relu_max_pool import (
    FusedSequential,
    conv2d_relu_lrn_max_pool2d,
    conv2d_relu_max_pool2d,
)
from fastalex.ops.linear_relu import Linear, LinearReLU, linear, linear_relu
from fastalex.ops.lrn import LocalResponseNorm, local_response_norm
from fastalex.ops.lrn_max_pool import LRNMaxPool2d, lrn_max_pool2d
from fastalex.ops.max_pool import MaxPool2d, max_pool2d

__all__ = [
    "Conv2dReLU",
    "FusedSequential",
    "LRNMaxPool2d",
    "Linear",
    "LinearReLU",
    "LocalResponseNorm",
    "MaxPool2d",
    "augment",
    "conv2d_relu",
    "conv2d_relu_lrn_max_pool2d",
    "conv2d_relu_max_pool2d",
    "linear",
    "linear_relu",
    "local_response_norm",
    "lrn_max_pool2d",
    "max_pool2d",
]
