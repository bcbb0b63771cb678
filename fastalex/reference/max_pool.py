"""Max-pooling in plain torch, with the one-byte window offsets that the operators save."""

from __future__ import annotations

from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from fastalex._geometry import offsets_dtype

Ints: TypeAlias = "torch.Size | list[int] | tuple[int, ...]"  # what torch takes for int[]


def _starts(windows: int, stride: int, padding: int, device: torch.device) -> Tensor:
    return torch.arange(windows, device=device) * stride - padding


def offsets_to_indices(
    offsets: Tensor,
    input_size: Ints,
    kernel_size: Ints,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
) -> Tensor:
    """Offsets inside the window as torch's indices into the flattened H*W plane (int64, as return_indices gives)."""
    height, width = offsets.shape[-2:]
    wide = offsets.long()
    rows = _starts(height, stride[0], padding[0], offsets.device)[:, None]
    columns = _starts(width, stride[1], padding[1], offsets.device)
    rows = rows + wide // kernel_size[1] * dilation[0]
    columns = columns + wide % kernel_size[1] * dilation[1]
    return rows * input_size[1] + columns


def _indices_to_offsets(
    indices: Tensor,
    input_size: Ints,
    kernel_size: Ints,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
) -> Tensor:
    height, width = indices.shape[-2:]
    rows = (
        indices // input_size[1] - _starts(height, stride[0], padding[0], indices.device)[:, None]
    )
    columns = indices % input_size[1] - _starts(width, stride[1], padding[1], indices.device)
    offsets = rows // dilation[0] * kernel_size[1] + columns // dilation[1]
    return offsets * _has_elements(
        indices.shape, input_size, kernel_size, stride, padding, dilation, indices.device
    )


def _has_elements(
    shape: Ints,
    input_size: Ints,
    kernel_size: Ints,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    device: torch.device,
) -> Tensor:
    """[oh, ow], False for windows of padding alone: a wide dilation can step over a small map."""
    along = []
    for d in (0, 1):
        starts = _starts(shape[d - 2], stride[d], padding[d], device)[:, None]
        taps = starts + torch.arange(kernel_size[d], device=device) * dilation[d]
        along.append(((taps >= 0) & (taps < input_size[d])).any(1))
    return along[0][:, None] & along[1]


def max_pool(
    input: Tensor,
    kernel_size: Ints,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    ceil_mode: bool,
    save_offsets: bool,
) -> tuple[Tensor, Tensor]:
    """F.max_pool2d, and for each output which of the kernel_h * kernel_w window elements it came from."""
    if not save_offsets:
        output = F.max_pool2d(input, kernel_size, stride, padding, dilation, ceil_mode)
        return output, input.new_empty(0, dtype=torch.uint8)
    output, indices = F.max_pool2d_with_indices(
        input, kernel_size, stride, padding, dilation, ceil_mode
    )
    offsets = _indices_to_offsets(indices, input.shape[-2:], kernel_size, stride, padding, dilation)
    return output, offsets.to(offsets_dtype(kernel_size))


def max_pool_backward(
    grad: Tensor,
    offsets: Tensor,
    input_size: Ints,
    kernel_size: Ints,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
) -> Tensor:
    """Adds each output's gradient to the element it came from."""
    indices = offsets_to_indices(offsets, input_size, kernel_size, stride, padding, dilation)
    alive = _has_elements(
        grad.shape, input_size, kernel_size, stride, padding, dilation, grad.device
    )
    indices = torch.where(alive, indices, 0)
    dtype = torch.float32 if grad.dtype in (torch.float16, torch.bfloat16) else grad.dtype
    source = torch.where(alive, grad, 0).to(dtype)
    plane = source.new_zeros(*grad.shape[:2], input_size[0] * input_size[1])
    summed = plane.scatter_add(2, indices.flatten(2), source.flatten(2))
    result: Tensor = summed.unflatten(2, tuple(input_size)).to(grad.dtype)
    in_channels_last = offsets.is_contiguous(memory_format=torch.channels_last)
    if grad.dim() == 4 and in_channels_last and not offsets.is_contiguous():
        result = result.contiguous(memory_format=torch.channels_last)
    return result
