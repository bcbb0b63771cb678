"""What the pipeline learns from the training set: its mean image, and the axes of its colours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastalex.models.alexnet import PRESETS
from fastalex.train.data import Images, Unreadable
from fastalex.train.errors import TrainingError
from fastalex.train.options import Options

SAMPLE = 10_000  # images; of a larger set a seeded sample


@dataclass
class Statistics:
    """Saved with the run, so that evaluation sees what training saw."""

    mean: Tensor  # float32 [H, W, 3], in levels of 0 to 255
    eigenvalues: Tensor  # float32 [3], of the covariance of RGB values between 0 and 1
    eigenvectors: Tensor  # float32 [3, 3], in columns
    scale: float  # multiplies what the network is given
    images: int  # how many were seen

    def colour_shift(self, draws: Tensor) -> Tensor:
        """Section 4.1: [p1 p2 p3] [a1 l1, a2 l2, a3 l3]^T for draws a [N, 3], in levels of 0 to 255.

        The formula is not free of scale. Covariances of levels would shift by hundreds of them; values between 0
        and 1, as everybody reads it, shift by a few.
        """
        return 255 * (draws * self.eigenvalues) @ self.eigenvectors.T

    def state(self) -> dict[str, Any]:
        return dict(vars(self))


def takes_levels(options: Options) -> bool:
    """Weights as the paper and its successors draw them expect pixels of 0 to 255, torch's own unit deviation."""
    if options.levels is not None:
        return options.levels
    preset = PRESETS.get(options.preset or "", {"init": "torch"})
    return bool({**preset, **options.model_arguments()}.get("init") != "torch")


def measure(images: Images, levels: bool, seed: int = 0) -> Statistics:
    """The statistics of a training set; the network gets levels of 0 to 255, or values of unit deviation.

    Raises:
        TrainingError: where no image can be read.
    """
    rows = torch.arange(len(images))
    if len(images) > SAMPLE:
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randperm(len(images), generator=generator)[:SAMPLE]
    total: Tensor | None = None
    products = torch.zeros(3, 3, dtype=torch.float64)
    seen = 0
    for row in rows.tolist():
        try:
            image = images.read(row).double()
        except Unreadable:
            continue  # the run reports it when it meets it
        total = image if total is None else total.add_(image)
        pixels = image.reshape(-1, 3) / 255
        products += pixels.T @ pixels
        seen += 1
    if total is None:
        raise TrainingError("no image of the training set can be read")
    mean = total / seen
    colour = mean.reshape(-1, 3).mean(0) / 255
    covariance = products / (seen * mean[..., 0].numel()) - torch.outer(colour, colour)
    eigenvalues, eigenvectors = torch.linalg.eigh(covariance)
    deviation = 255 * (covariance.trace().item() / 3) ** 0.5
    return Statistics(
        mean.float(),
        eigenvalues.clamp(min=0).float(),
        eigenvectors.float(),
        1.0 if levels else 1 / max(1.0, deviation),
        seen,
    )
