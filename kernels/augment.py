"""Crops of uint8 images, mirrored or not, to y = (x + shift - mean) * scale.

A lane owns one element of the output, so that stores are dense whatever the number of channels; the bytes it reads lie
as close together, and one image's constants stay in L1. One byte read and up to four written an element; finding an
element's image, row and pixel takes more instructions than that leaves time for (docs/gpu-evidence.md).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _layout as layout
from ._common import narrow, program_index
from ._refuse import refuse_tensors

BLOCK, WARPS = 1024, 4


@triton.jit(do_not_specialize=["elements"])
def crops(
    x,
    corners,
    mirrored,
    shift,
    mean,
    y,
    elements,
    XS: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    ROOM_BELOW: tl.constexpr,
    ROOM_RIGHT: tl.constexpr,
    CHANNELS: tl.constexpr,
    PITCH: tl.constexpr,
    MEAN_IS_IMAGE: tl.constexpr,
    SCALE: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y [N, HEIGHT, PITCH, CHANNELS]; elements counts all of it, the zeros between rows included."""
    at = program_index(0, WIDE) * BLOCK + tl.arange(0, BLOCK)
    ok = at < elements
    channel = at % CHANNELS
    column = at // CHANNELS % PITCH
    row = at // (CHANNELS * PITCH) % HEIGHT
    image = at // (CHANNELS * PITCH * HEIGHT)
    inside = ok & (column < WIDTH)
    top = tl.load(corners + 2 * image, mask=inside, other=0)
    left = tl.load(corners + 2 * image + 1, mask=inside, other=0)
    # Corners come unchecked, as a check would wait for the device: none reads outside its image.
    top = tl.minimum(tl.maximum(top, 0), ROOM_BELOW) + row
    left = tl.minimum(tl.maximum(left, 0), ROOM_RIGHT)
    flip = tl.load(mirrored + image, mask=inside, other=0) != 0
    left += tl.where(flip, WIDTH - 1 - column, column)
    source = image.to(tl.int64) * XS.image + top * XS.row + left * XS.column + channel * XS.channel
    value = tl.load(x + source, mask=inside, other=0).to(tl.float32)
    value += tl.load(shift + image * CHANNELS + channel, mask=inside, other=0.0)
    place = channel
    if MEAN_IS_IMAGE:
        place += (top * (ROOM_RIGHT + WIDTH) + left) * CHANNELS
    value -= tl.load(mean + place, mask=inside, other=0.0)
    value = value * tl.full([BLOCK], SCALE, tl.float32)
    value = tl.where(inside, value, 0.0)
    tl.store(y + at, narrow(value, y.dtype.element_ty), mask=ok)


def refuse_augment(images: Tensor, *rest: object) -> str | None:
    return refuse_tensors(images, *(value for value in rest[:4] if isinstance(value, Tensor)))


def candidates_augment(*arguments: object) -> dict[str, tuple[object, ...]]:
    """One configuration: its stores are dense in every one."""
    return {}


@layout.on_its_device
def augment(
    images: Tensor,
    corners: Tensor,
    mirrored: Tensor,
    shift: Tensor,
    mean: Tensor,
    size: tuple[int, int],
    scale: float,
    pitch: int,
    dtype: torch.dtype,
) -> Tensor:
    """The crops of images [N, H, W, C]; reads each of their pixels once and writes the result once."""
    n, h, w, channels = images.shape
    height, width = size
    y = torch.empty((n, height, pitch, channels), dtype=dtype, device=images.device)
    if y.numel():
        crops[(triton.cdiv(y.numel(), BLOCK),)](
            images,
            corners.contiguous(),
            mirrored.contiguous().view(torch.uint8),
            shift.contiguous(),
            mean.contiguous(),
            y,
            y.numel(),
            layout.strides(images.permute(0, 3, 1, 2)),
            height,
            width,
            h - height,
            w - width,
            channels,
            pitch,
            mean.dim() == 3,
            scale,
            layout.needs_wide(y),
            BLOCK,
            num_warps=WARPS,
        )
    return y[:, :, :width].permute(0, 3, 1, 2)
