"""Crop, mirror, colour shift and mean subtraction of uint8 images in one pass: ``augment``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastalex import reference
from fastalex.backends import no_refusal
from fastalex.ops import _cpu, _triton
from fastalex.ops._arguments import Pair, pair, require_tensor
from fastalex.ops._operator import Operator, needs_dispatcher, needs_reference
from fastalex.reference.augment import check_corners

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_CODES = {torch.float32: 0, torch.bfloat16: 2, torch.float16: 3}  # DType of csrc/cpu/dtypes.h


def _fake(
    images: Tensor,
    corners: Tensor,
    mirrored: Tensor,
    shift: Tensor,
    mean: Tensor,
    size: Pair,
    scale: float,
    pitch: int,
    dtype: torch.dtype,
) -> Tensor:
    rows = images.new_empty((images.shape[0], size[0], pitch, images.shape[3]), dtype=dtype)
    return rows[:, :, : size[1]].permute(0, 3, 1, 2)


AUGMENT = Operator(
    "augment(Tensor images, Tensor corners, Tensor mirrored, Tensor shift, Tensor mean, int[2] size, float scale, "
    "SymInt pitch, ScalarType dtype) -> Tensor",
    _fake,
)


_NATIVE = _cpu.native("augment")


def _cpu_augment(
    images: Tensor,
    corners: Tensor,
    mirrored: Tensor,
    shift: Tensor,
    mean: Tensor,
    size: Pair,
    scale: float,
    pitch: int,
    dtype: torch.dtype,
) -> Tensor:
    arguments = (images, corners, mirrored, shift, mean, *size, scale, pitch, _CODES[dtype])
    try:
        rows: Tensor = _NATIVE(*arguments)
    except RuntimeError:  # the library checks corners too, and knows no other kind of error
        check_corners(images, corners, size)
        raise
    return rows if pitch == size[1] else rows[..., : size[1]]


def _refuse_cpu(images: Tensor, *rest: Any) -> str | None:
    return _cpu.refuse_device(images)


AUGMENT.kernels.add("torch", reference.augment, no_refusal)
AUGMENT.kernels.add("cpu", _cpu_augment, _refuse_cpu)
AUGMENT.kernels.add("triton", **_triton.kernel("augment", "augment"))
AUGMENT.register_vmap([0, 1, 2, 3])


def _require(
    name: str, value: Any, dtype: torch.dtype, shapes: tuple[tuple[int, ...], ...], images: Tensor
) -> None:
    require_tensor(value, "augment", name)
    if value.dtype is not dtype or tuple(value.shape) not in shapes:
        allowed = " or ".join(str(list(shape)) for shape in shapes)
        kind = str(dtype).removeprefix("torch.")
        raise ValueError(
            f"augment: {name} is {value.dtype} {list(value.shape)}; it must be {kind} {allowed}"
        )
    if value.device != images.device:
        raise ValueError(f"augment: {name} is on {value.device} and images on {images.device}")
    if value.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"augment: {name} requires a gradient; augment has none: detach it")


def augment(
    images: Tensor,
    corners: Tensor,
    mirrored: Tensor,
    shift: Tensor | None = None,
    mean: Tensor | None = None,
    size: int | Pair = 227,
    *,
    scale: float = 1.0,
    pitch: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The input pipeline of section 4.1 as one pass over memory, from stored pixels to what a network reads.

    Each image is cropped at its corner, mirrored where ``mirrored`` says so, and becomes
    ``(pixel + shift - mean) * scale``, each step rounded to float32 as torchvision's transforms round it, so that the
    results are theirs bit for bit. Random numbers are the caller's. The input is integer, so there is no gradient.

    Args:
        images: uint8 [N, H, W, C]; rows and images may have any stride.
        corners: int64 [N, 2], the top and left of each crop, with 0 <= top <= H - height and 0 <= left <= W - width.
            Checked on a CPU; on a GPU, where a check would wait for it, clamped to that range.
        mirrored: bool [N]: reverse the columns of the crop.
        shift: float32 [N, C], added to every pixel (PCA colour shift), in levels; None for none.
        mean: float32 [C], or [H, W, C] (cropped and mirrored with its image), in levels; None for none.
        size: side of the crop, or (height, width).
        scale: multiplies the result.
        pitch: pixels from one row of the result to the next, at least the width, its own when None; wide loads of a
            first layer want rows that start aligned (228 for 227). What lies between rows is zero.
        dtype: float32, bfloat16 or float16.

    Returns:
        [N, C, height, width] in channels_last, rows ``pitch`` pixels apart.

    Raises:
        TypeError: for an argument that is not a tensor where one is wanted.
        ValueError: for a wrong shape, dtype, device, size or pitch, a corner outside its range (CPU), or a shift or
            mean that requires a gradient.

    Scratch on a CPU: 16 C bytes a pixel of the crop's width, a thread; and a mean image once more, mirrored.
    """
    require_tensor(images, "augment", "images")
    if images.dtype is not torch.uint8 or images.dim() != 4:
        raise ValueError(
            f"augment: images is {images.dtype} {list(images.shape)}; it must be uint8 [N, H, W, C]"
        )
    count, height, width, channels = images.shape
    crop = pair(size, "augment: size", 1)
    if crop[0] > height or crop[1] > width:
        raise ValueError(f"augment: size is {crop}; the images are {(height, width)}")
    if pitch is None:
        pitch = crop[1]
    elif not isinstance(pitch, int) or pitch < crop[1]:
        raise ValueError(f"augment: pitch is {pitch!r}; it must be at least the width {crop[1]}")
    if dtype not in DTYPES:
        raise ValueError(f"augment: dtype is {dtype}; it can be float32, bfloat16 or float16")
    if shift is None:
        shift = torch.zeros(count, channels, device=images.device)
    if mean is None:
        mean = torch.zeros(channels, device=images.device)
    _require("corners", corners, torch.int64, ((count, 2),), images)
    _require("mirrored", mirrored, torch.bool, ((count,),), images)
    _require("shift", shift, torch.float32, ((count, channels),), images)
    _require("mean", mean, torch.float32, ((channels,), (height, width, channels)), images)
    arguments = (images, corners, mirrored, shift, mean, crop, float(scale), pitch, dtype)
    if needs_dispatcher(images, corners, mirrored, shift, mean):
        if needs_reference():
            return reference.augment(*arguments)
        output: Tensor = AUGMENT.dispatch(*arguments)
        return output
    return AUGMENT.run(*arguments)  # type: ignore[no-any-return]
