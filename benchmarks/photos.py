"""Real images: crops, flips and scales of the two photographs that scikit-learn ships."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

MEAN = (0.485, 0.456, 0.406)
DEVIATION = (0.229, 0.224, 0.225)


@functools.cache
def _photographs() -> tuple[Tensor, ...]:
    """Each [3, H, W] in 0..1."""
    from sklearn.datasets import load_sample_images

    images = load_sample_images().images
    return tuple(torch.tensor(image).permute(2, 0, 1).float() / 255 for image in images)


@functools.cache
def batch(count: int, size: int = 227, seed: int = 0) -> Tensor:
    """[count, 3, size, size], float32, normalised; the same for the same arguments."""
    generator = torch.Generator().manual_seed(seed)

    def below(limit: int) -> int:
        return int(torch.randint(limit, (), generator=generator))

    crops = []
    for index in range(count):
        photograph = _photographs()[index % 2]
        height, width = photograph.shape[1:]
        side = size // 2 + below(min(height, width) - size // 2 + 1)
        top, left = below(height - side + 1), below(width - side + 1)
        crop = photograph[None, :, top : top + side, left : left + side]
        crop = F.interpolate(crop, (size, size), mode="bilinear", antialias=True)
        crops.append(crop.flip(3) if below(2) else crop)
    mean, deviation = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, DEVIATION))
    return (torch.cat(crops) - mean) / deviation


def labels(count: int, classes: int = 1000, seed: int = 1) -> Tensor:
    """[count], int64: any labels do, the photographs have none."""
    return torch.randint(classes, (count,), generator=torch.Generator().manual_seed(seed))
