"""Rows of ``augment``: a batch of the paper's crops against torchvision's transforms, image by image and stacked."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.cases import DTYPES, Case, Prepared, Unavailable
from fastalex import costs, ops

STORED, CROP = 256, 227
MEAN = (123.68, 116.78, 103.94)  # of ImageNet, in levels


def inputs(batch: int, device: torch.device) -> tuple[Tensor, ...]:
    """Images, corners, mirrored, shift and mean."""
    generator = torch.Generator().manual_seed(0)
    made = (
        torch.randint(0, 256, (batch, STORED, STORED, 3), dtype=torch.uint8, generator=generator),
        torch.randint(0, STORED - CROP + 1, (batch, 2), generator=generator),
        torch.rand(batch, generator=generator) < 0.5,
        torch.randn(batch, 3, generator=generator) * 5,
        torch.tensor(MEAN),
    )
    return tuple(each.to(device) for each in made)


def stock(images: Tensor, corners: Tensor, mirrored: Tensor, shift: Tensor, mean: Tensor) -> Tensor:
    """What a loader does with decoded images: torchvision's functional transforms on each, then a stack."""
    from torchvision.transforms.v2 import functional as v2

    made = []
    places, flips = corners.tolist(), mirrored.tolist()
    levels, ones = mean.tolist(), [1.0] * 3
    for image, (top, left), flip, colour in zip(images, places, flips, shift, strict=True):
        value = v2.crop(image.permute(2, 0, 1), top, left, CROP, CROP)
        if flip:
            value = v2.horizontal_flip(value)
        value = v2.to_dtype(value, torch.float32, scale=False) + colour[:, None, None]
        made.append(v2.normalize(value, levels, ones))
    return torch.stack(made)


def prepare(batch: int, dtype: torch.dtype, provider: str, device: torch.device) -> Prepared:
    tensors = inputs(batch, device)
    if provider == "eager":
        return Prepared(lambda: stock(*tensors).to(dtype))
    if provider == "fastalex":
        return Prepared(lambda: ops.augment(*tensors, CROP, dtype=dtype))
    raise Unavailable("the transforms draw and branch image by image")


def cases() -> Iterator[Case]:
    for short, batch in (("f32", 32), ("bf16", 32), ("f32", 1)):
        dtype = DTYPES[short]
        meta = [each.to("meta") for each in inputs(batch, torch.device("cpu"))]
        cost = costs.augment(*meta, (CROP, CROP), 1.0, CROP, dtype)
        yield Case(
            f"augment/fwd/{short}/b{batch}",
            "augment",
            dtype,
            functools.partial(prepare, batch, dtype),
            (cost,),
            full=(short, batch) != ("f32", 32),
        )
