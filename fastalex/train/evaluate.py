"""Scores of checkpoints, one by one and as an ensemble: the mean of their softmaxes, whatever networks they hold."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from fastalex.train import checkpoint
from fastalex.train.batches import Pipeline
from fastalex.train.build import make_model
from fastalex.train.data import Data, load
from fastalex.train.errors import TrainingError
from fastalex.train.metrics import Scores, average, predict, score
from fastalex.train.options import Options
from fastalex.train.runtime import choose_device
from fastalex.train.statistics import Statistics


@dataclass
class Evaluation:
    """The scores of each checkpoint by path, and of all together."""

    single: dict[str, Scores]
    ensemble: Scores


def restore(path: Path | str, device: torch.device) -> tuple[nn.Module, Pipeline, Options]:
    """The network of a checkpoint with its weights, and the pipeline it was trained with."""
    state = checkpoint.load(path, device)
    options = Options(**state["options"])
    model = make_model(options, len(state["classes"])).to(device)
    model.load_state_dict(state["model"])
    statistics = Statistics(**checkpoint.load(path)["statistics"])
    return model, Pipeline(options, statistics, len(state["classes"])), options


def evaluate(
    paths: Sequence[Path | str],
    *,
    ten_views: bool = False,
    split: str = "test",
    root: str | None = None,
    device: str = "auto",
    workers: int = 0,
) -> Evaluation:
    """Scores checkpoints of one data set, which may differ in seed, network, width or dropout.

    Args:
        paths: checkpoints, or folders of runs, of which the last epoch is taken.
        ten_views: four corners, the centre and their mirror images, their softmaxes averaged; else the centre alone.
        split: ``"train"``, ``"validation"`` or ``"test"``.
        root: where the data set is now, if it has moved.
        device: as in Options.
        workers: processes that read images ahead.

    Raises:
        TrainingError: for a file that is no checkpoint, or checkpoints of different classes.
    """
    place = choose_device(device)
    loaded: dict[tuple[object, ...], Data] = {}
    classes: list[str] | None = None
    single: dict[str, Scores] = {}
    for path in paths:
        file = Path(path) / checkpoint.LAST if Path(path).is_dir() else Path(path)
        model, pipeline, options = restore(file, place)
        if root is not None:
            options = dataclasses.replace(options, root=root)
        key = (options.data, options.root, options.labels, options.crop)
        data = loaded[key] if key in loaded else loaded.setdefault(key, load(options))
        if classes is not None and data.classes != classes:
            raise TrainingError(f"{file} knows other classes than {paths[0]}: no ensemble of both")
        classes = data.classes
        images = {"train": data.train, "validation": data.validation, "test": data.test}[split]
        predictions = predict(
            model,
            images,
            pipeline,
            batch=options.batch or 1,
            device=place,
            ten_views=ten_views,
            workers=workers,
        )
        single[str(path)] = score(*predictions)
    scores = list(single.values())
    if any(not torch.equal(each.labels, scores[0].labels) for each in scores):
        raise TrainingError("the checkpoints were trained on different images: no ensemble of them")
    combined = average([each.probabilities for each in scores])
    return Evaluation(single, score(combined, scores[0].labels, scores[0].unreadable))
