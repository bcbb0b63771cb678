"""The input pipeline in plain torch: what the fused operator computes, and its oracle."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def augment(
    images: Tensor,
    corners: Tensor,
    mirrored: Tensor,
    shift: Tensor,
    mean: Tensor,
    size: Sequence[int],
    scale: float,
    pitch: int,
    dtype: torch.dtype,
) -> Tensor:
    """y = ((crop of x, mirrored or not) + shift - mean) * scale, each step rounded to float32, then to ``dtype``.

    images: uint8 [N, H, W, C]; corners: int64 [N, 2], top and left; mirrored: bool [N]; shift: float32 [N, C]; mean:
    float32 [C] or [H, W, C], cropped and mirrored with its image. Returns [N, C, *size] in channels_last, its rows
    ``pitch`` pixels apart (zeros fill them up).
    """
    height, width = size
    if corners.device.type == "cpu":
        check_corners(images, corners, size)
    room = torch.tensor([images.shape[1] - height, images.shape[2] - width], device=images.device)
    corners = corners.clamp(min=0).minimum(room)
    rows = corners[:, :1] + torch.arange(height, device=images.device)
    steps = torch.arange(width, device=images.device).expand(len(images), width)
    columns = corners[:, 1:] + torch.where(mirrored[:, None], width - 1 - steps, steps)
    image = torch.arange(len(images), device=images.device)[:, None, None]
    rows, columns = rows[:, :, None], columns[:, None, :]
    shifted = images[image, rows, columns].float() + shift[:, None, None, :]
    values = (shifted - (mean if mean.dim() == 1 else mean[rows, columns])) * scale
    padded = values.new_zeros((len(images), height, pitch, images.shape[3]), dtype=dtype)
    padded[:, :, :width] = values.to(dtype)
    return padded[:, :, :width].permute(0, 3, 1, 2)


def check_corners(images: Tensor, corners: Tensor, size: Sequence[int]) -> None:
    """Raises ValueError unless every crop lies in its image."""
    room = torch.tensor([images.shape[1] - size[0], images.shape[2] - size[1]])
    outside = ((corners < 0) | (corners > room)).any(1).nonzero().flatten().tolist()
    if outside:
        first = outside[0]
        raise ValueError(
            f"augment: corners[{first}] is {corners[first].tolist()}; for crops of {size[0]}x{size[1]} in images of "
            f"{images.shape[1]}x{images.shape[2]} it must lie between [0, 0] and {room.tolist()}"
        )
