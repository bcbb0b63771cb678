"""A run small enough to be killed many times: `python -m tests.support.train_tiny FOLDER POINT`."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastalex import ops
from fastalex.train import Options, Trainer, checkpoint
from fastalex.train.data import Arrays, Data
from fastalex.train.runtime import make_deterministic
from fastalex.train.screen import Screen

CLASSES = 3


def net() -> nn.Module:
    """Every kind of state: fused layers, dropout, batch statistics."""
    return nn.Sequential(
        ops.Conv2dReLU(3, 8, 3, padding=1),
        ops.LRNMaxPool2d(5, 1e-4, 0.75, 2.0, 3, 2),
        nn.Conv2d(8, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(8 * 3 * 3, CLASSES),
    )


def data(count: int = 40) -> Data:
    """Blurred squares whose place is their class."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(count) % CLASSES
    images = torch.randint(0, 90, (count, 14, 14, 3), generator=generator)
    for image, label in zip(images, labels.tolist(), strict=True):
        image[3 * label + 2 : 3 * label + 6, 4:10] += 150
    images = images.clamp(max=255).byte()
    parts = [Arrays(images[i::4], labels[i::4]) for i in range(4)]
    train = Arrays(
        torch.cat([p.images for p in parts[:2]]), torch.cat([p.labels for p in parts[:2]])
    )
    return Data(train, parts[2], parts[3], [str(c) for c in range(CLASSES)], "made up")


def options(**changes: object) -> Options:
    chosen = {
        "preset": "tiny",
        "crop": 12,
        "mirror": True,
        "batch": 4,
        "lr": 0.05,
        "epochs": 3,
        "patience": 1,
        "stop": 0,
        "workers": 0,
        "device": "cpu",
        "seed": 7,
    }
    return Options(**{**chosen, **changes})


def trainer(folder: Path | str, **changes: object) -> Trainer:
    chosen = options(**changes)
    make_deterministic(chosen)
    return Trainer(net(), data(), chosen, folder, screen=Screen(quiet=True))


def kill_at(point: str) -> None:
    """SIGKILL, which nothing can catch, at the n-th time that a run comes to a place: ``step:7``, say."""
    place, count = point.split(":")
    left = int(count)

    def killing(original: Callable[..., Any], after: bool) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0 and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = original(*args, **kwargs)
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return run

    owner, name, after = {
        "step": (Trainer, "_step", True),
        "backward": (torch.Tensor, "backward", True),
        "write": (checkpoint._Watched, "write", True),  # in the middle of a file
        "rename": (
            checkpoint.os,
            "replace",
            False,
        ),  # the whole file is there, under its first name
        "renamed": (checkpoint.os, "replace", True),  # the first is best.pt: last.pt is older
    }[place]
    setattr(owner, name, killing(getattr(owner, name), after))


if __name__ == "__main__":
    kill_at(sys.argv[2])
    trainer(sys.argv[1], save_every=2).fit()
