"""Loss, top-1 and top-5 error of a network over one view of an image or ten."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastalex.train.batches import Chunks, Pipeline, make_loader
from fastalex.train.data import Images


@dataclass
class Scores:
    """What an evaluation measured; errors are shares of the images."""

    loss: float
    top1_error: float
    top5_error: float
    images: int
    probabilities: Tensor  # [N, classes], averaged over views
    labels: Tensor  # [N]
    unreadable: int = 0

    @property
    def accuracy(self) -> float:
        return 1 - self.top1_error

    def numbers(self) -> dict[str, float]:
        names = ("loss", "top1_error", "top5_error", "images", "unreadable")
        return {name: getattr(self, name) for name in names}


def score(probabilities: Tensor, labels: Tensor, unreadable: int = 0) -> Scores:
    """Scores of probabilities [N, classes] against labels [N]."""
    if not len(labels):
        return Scores(
            float("nan"), float("nan"), float("nan"), 0, probabilities, labels, unreadable
        )
    likelihood = probabilities.gather(1, labels[:, None]).clamp(min=1e-38).log()
    ranked = probabilities.topk(min(5, probabilities.shape[1])).indices == labels[:, None]
    return Scores(
        -likelihood.mean().item(),
        1 - ranked[:, 0].double().mean().item(),
        1 - ranked.any(1).double().mean().item(),
        len(labels),
        probabilities,
        labels,
        unreadable,
    )


@torch.no_grad()
def predict(
    model: nn.Module,
    images: Images,
    pipeline: Pipeline,
    *,
    batch: int,
    device: torch.device,
    ten_views: bool = False,
    workers: int = 0,
) -> tuple[Tensor, Tensor, int]:
    """(probabilities [N, classes], labels [N], unreadable images): the softmax averaged over the views."""
    was_training = model.training
    model.eval()
    probabilities, labels, unreadable = [], [], 0
    for chunk in make_loader(Chunks(images, batch), workers):
        unreadable += len(chunk.failures)
        if not len(chunk.labels):
            continue
        pixels = chunk.images.to(device)
        total: Tensor | None = None
        views = list(pipeline.views(chunk.images, ten_views))
        for draws in views:
            logits = model(pipeline.apply(pixels, draws).to(next(model.parameters()).dtype))
            softmax = F.softmax(logits.float(), 1)
            total = softmax if total is None else total + softmax
        assert total is not None
        probabilities.append((total / len(views)).cpu())
        labels.append(chunk.labels)
    model.train(was_training)
    if not labels:
        return torch.empty(0, pipeline.classes), torch.empty(0, dtype=torch.long), unreadable
    return torch.cat(probabilities), torch.cat(labels), unreadable


def average(predictions: Sequence[Tensor]) -> Tensor:
    """The ensemble of section 6: the mean of the networks' probabilities."""
    return torch.stack(list(predictions)).mean(0)
