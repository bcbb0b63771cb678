"""Sizes and memory layouts of results: one answer for kernels in Python, fakes and the reference."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def pooled_size(
    size: int, kernel: int, stride: int, padding: int, dilation: int, ceil_mode: bool
) -> int:
    """Windows along one dimension, as torch counts them; may be < 1, which callers refuse."""
    room = size + 2 * padding - dilation * (kernel - 1) - 1
    windows = (room + (stride - 1 if ceil_mode else 0)) // stride + 1
    # With ceil_mode a last window may not start in the padding beyond the input.
    if ceil_mode and (windows - 1) * stride >= size + padding:
        windows -= 1
    return windows


def convolved_size(
    input: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[int, int]:
    """Height and width of the map that a convolution makes of one of height and width ``input``."""
    return tuple(
        pooled_size(input[d], kernel[d], stride[d], padding[d], dilation[d], False) for d in (0, 1)
    )  # type: ignore[return-value]


def is_channels_last(tensor: Tensor) -> bool:
    """Whether channels are adjacent in memory and pixels are not: the layout results take."""
    if tensor.is_contiguous():
        return False
    if tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        return True
    if tensor.shape[1] > 1 and tensor.stride(1) != 1:
        return False
    return _rows_nest(tensor) and not _dense_planes(tensor)


def _rows_nest(tensor: Tensor) -> bool:
    """Whether all dims between the channels and the last step evenly, as one dim of rows would."""
    rows, step = 1, 0
    for size, stride in zip(tensor.shape[-2:1:-1], tensor.stride()[-2:1:-1], strict=True):
        if size == 1:
            continue
        if rows != 1 and stride != step * rows:
            return False
        if rows == 1:
            step = stride
        rows *= size
    return True


def _dense_planes(tensor: Tensor) -> bool:
    step = 1
    for size, stride in zip(reversed(tensor.shape[2:]), reversed(tensor.stride()[2:]), strict=True):
        if size != 1 and stride != step:
            return False
        step *= size
    return True


def empty_in_layout(like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised tensor of ``shape`` in ``like``'s layout."""
    dtype = like.dtype if dtype is None else dtype
    if not is_channels_last(like):
        return like.new_empty(shape, dtype=dtype)
    last = [shape[0], *shape[2:], shape[1]]
    return like.new_empty(last, dtype=dtype).movedim(-1, 1)


def in_layout_of(like: Tensor, result: Tensor) -> Tensor:
    """``result``, copied where torch chose another layout for it than ``like``'s."""
    if is_channels_last(like):
        return result.movedim(1, -1).contiguous().movedim(-1, 1)
    return result.contiguous()


def offsets_dtype(kernel_size: Sequence[int]) -> torch.dtype:
    """One byte says which of up to 256 window elements won."""
    return torch.uint8 if kernel_size[0] * kernel_size[1] <= 256 else torch.int32
