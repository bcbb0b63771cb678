"""Which of the two layouts a tensor is in, and what a kernel needs to know of its strides."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .._geometry import is_channels_last as is_channels_last  # the rule the fakes follow too

WIDE_FROM = 2**31 - 2**20  # a block's last lanes lie beyond the tensor's end


@dataclass(frozen=True)
class Strides:
    """Distances in elements between neighbours along each axis of an [N, C, H, W] tensor."""

    image: int
    channel: int
    row: int
    column: int


@dataclass(frozen=True)
class Plane:
    """The pixels of an image, as a kernel that works pixel by pixel sees them."""

    rows: int
    columns: int


def strides(x: Tensor) -> Strides:
    return Strides(x.stride(0), x.stride(1), x.stride(2), x.stride(3))


def layout_note(x: Tensor) -> str | None:
    """Why x is copied before a kernel reads it, or None where it is read in place."""
    if is_channels_last(x) or x.stride(-1) == 1 or x.numel() == 0:
        return None
    return f"copied first: strides {tuple(x.stride())} have no dense channel or column axis"


def readable(x: Tensor) -> Tensor:
    """x itself where its channels or its columns are dense, else one contiguous copy."""
    return x if layout_note(x) is None else x.contiguous()


def in_layout(x: Tensor, channels_last: bool) -> Tensor:
    """x itself where the layout's innermost axis is dense, else one copy in that layout."""
    if x.stride(1 if channels_last else 3) == 1:
        return x
    return x.contiguous(memory_format=memory_format(channels_last))


def memory_format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def empty(
    x: Tensor, shape: tuple[int, ...], channels_last: bool, dtype: torch.dtype | None = None
) -> Tensor:
    return torch.empty(
        shape, dtype=dtype or x.dtype, device=x.device, memory_format=memory_format(channels_last)
    )


def needs_wide(*tensors: Tensor) -> bool:
    """Whether any element's offset, or the count of elements, passes 32 bits."""
    return any(
        max(t.numel(), 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)))
        >= WIDE_FROM
        for t in tensors
    )


def vector_length(group_channels: int, itemsize: int, channels_last: bool, *tensors: Tensor) -> int:
    """Channels one lane owns: up to 16 bytes of them, dividing the group and every stride between
    pixels.
    """
    step = math.gcd(16 // itemsize, group_channels)
    if channels_last:
        for t in tensors:
            for axis in (0, 2, 3):
                if t.shape[axis] > 1:
                    step = math.gcd(step, t.stride(axis))
    return step


def collapse(*tensors: Tensor) -> tuple[Plane, list[Strides]]:
    """The fewest pixel axes that describe all tensors: each division a kernel need not do is issue
    slots saved.
    """
    n, channels, h, w = tensors[0].shape
    planes = [strides(t) for t in tensors]
    if all(s.row == w * s.column or h == 1 for s in planes):
        if all((s.image == h * w * s.column or n == 1) and s.column >= channels for s in planes):
            return Plane(1, 1), [Strides(s.column, s.channel, 0, 0) for s in planes]
        return Plane(1, h * w), [Strides(s.image, s.channel, 0, s.column) for s in planes]
    return Plane(h, w), planes


def on_its_device(operator: Callable) -> Callable:
    """The operator on its first argument's device: Triton launches on the current one."""

    @functools.wraps(operator)
    def run(tensor: Tensor, *arguments, **options):
        if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
            with torch.cuda.device(tensor.device):
                return operator(tensor, *arguments, **options)
        return operator(tensor, *arguments, **options)

    return run
