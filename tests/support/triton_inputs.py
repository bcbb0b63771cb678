"""Inputs for the Triton tests: every layout, and NaN wherever a kernel has no business reading."""

from __future__ import annotations

import torch
from torch import Tensor

LAYOUTS = ("nchw", "nhwc", "nhwc-slice", "nhwc-pitch", "nchw-pitch")
MARGIN = 64  # NaN values before and after; a multiple of 16 bytes


def random(
    shape: tuple[int, ...], dtype: torch.dtype, layout: str = "nchw", seed: int = 0
) -> Tensor:
    """Normal values in the layout."""
    generator = torch.Generator().manual_seed(seed)
    return placed(torch.randn(shape, generator=generator).to(dtype), layout)


def placed(values: Tensor, layout: str) -> Tensor:
    """A copy of values [N, C, H, W] in the layout, all memory around and between its elements being
    NaN.
    """
    n, c, h, w = values.shape
    last = layout.startswith("nhwc")
    outer_c = c + 8 if layout == "nhwc-slice" else c
    outer_w = w + 1 if layout.endswith("pitch") else w
    strides = (outer_c * h * outer_w, 1, outer_w * outer_c, outer_c)
    if not last:
        strides = (c * h * outer_w, h * outer_w, outer_w, 1)
    size = n * outer_c * h * outer_w
    memory = torch.full((MARGIN + size + MARGIN,), float("nan"), dtype=values.dtype)
    first = MARGIN + (4 if layout == "nhwc-slice" else 0)
    view = memory.as_strided((n, c, h, w), strides, first)
    return view.copy_(values)


def like(values: Tensor, other: Tensor) -> Tensor:
    """values in the memory format of other's results."""
    dense_nhwc = other.stride(1) == 1 and not other.is_contiguous()
    return values.contiguous(
        memory_format=torch.channels_last if dense_nhwc else torch.contiguous_format
    )
