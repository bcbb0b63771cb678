"""While ``torch.onnx.export`` looks, operators are what ONNX has: standard ones, and LRN as ``LRN``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastalex import reference

_EXPORTER = "torch.onnx._internal.exporter._flags"


def exporting() -> bool:
    """Whether a call is being exported to ONNX. (A program of torch.export keeps fastalex's operators.)"""
    if torch.compiler.is_dynamo_compiling():
        return False
    # Asking torch imports its exporter; where nobody did yet, nothing is exported.
    might_be = _EXPORTER in sys.modules or torch._C._get_tracing_state() is not None
    return might_be and torch.onnx.is_in_onnx_export()


def lrn(input: Tensor, size: int, scale: float, beta: float, k: float, groups: int) -> Tensor:
    """The operator ``LRN``, whose alpha is divided by its size as torch's is.

    Its window leans to later channels where torch's leans to earlier ones: an even one is written out in plain
    operators, and so is everything for the exporter before torch 2.9's, which has no way to name an operator.
    """
    if size % 2 == 0 or torch._C._get_tracing_state() is not None:
        return reference.lrn(input, size, scale, beta, k, groups)
    towers = input.unflatten(1, (groups, -1)).flatten(0, 1) if groups > 1 else input
    normalised: Tensor = torch.onnx.ops.symbolic(
        "LRN",
        (towers,),
        {"alpha": scale * size, "beta": beta, "bias": k, "size": size},
        dtype=input.dtype,
        shape=towers.shape,
        version=13,
    )
    return normalised.reshape(input.shape) if groups > 1 else normalised


def lrn_max_pool(
    input: Tensor,
    size: int,
    scale: float,
    beta: float,
    k: float,
    groups: int,
    kernel_size: Any,
    stride: Any,
    padding: Any,
    ceil_mode: bool,
    save_offsets: bool,
) -> tuple[Tensor, Tensor]:
    """The two in turn; nothing is saved in a file."""
    normalised = lrn(input, size, scale, beta, k, groups)
    pooled = F.max_pool2d(normalised, kernel_size, stride, padding, ceil_mode=ceil_mode)
    return pooled, input.new_empty(0, dtype=torch.uint8)


def conv_relu_pool(*args: Any) -> Tensor:
    """Both operators of a convolution and its pool: their parts in turn."""
    map = reference.conv_relu(*args[:7])
    *norm, kernel_size, stride, padding, ceil_mode = args[7:]
    if norm:
        map = lrn(map, *norm)
    return F.max_pool2d(map, kernel_size, stride, padding, ceil_mode=ceil_mode)


#: By operator; the others are written as their references.
FORMS: dict[str, Callable[..., Any]] = {
    "conv_relu_lrn_max_pool": conv_relu_pool,
    "conv_relu_max_pool": conv_relu_pool,
    "lrn": lrn,
    "lrn_max_pool": lrn_max_pool,
}
