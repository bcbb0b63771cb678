"""The report of a run: a page, and the pictures the paper shows of its own."""

from __future__ import annotations

import dataclasses
import itertools
import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastalex
from fastalex import _native
from fastalex.train.data import Images
from fastalex.train.errors import extra
from fastalex.train.metrics import Scores
from fastalex.train.trainer import Trainer


def environment() -> dict[str, str]:
    """What the run ran on."""
    cuda = torch.cuda.is_available()
    return {
        "fastalex": fastalex.__version__,
        "cpu kernels": _native.isa() if _native.error is None else f"absent: {_native.error}",
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "torch": f"{torch.__version__}, {torch.get_num_threads()} threads",
        "gpu": torch.cuda.get_device_name() if cuda else "none",
    }


def write(trainer: Trainer, scores: Scores, comparison: Mapping[str, Any] | None = None) -> Path:
    """Writes ``report/`` in the run's folder; ``trainer.model`` holds the weights that were scored."""
    folder = trainer.folder / "report"
    folder.mkdir(exist_ok=True)
    plots = extra("matplotlib")
    plots.use("Agg")
    pictures = {
        "curves.png": curves(trainer.history),
        "confusion.png": confusion(scores, trainer.data.classes),
        "examples.png": examples(scores, trainer.data.test, trainer.data.classes),
    }
    first = first_filters(trainer.model)
    if first is not None:
        pictures["filters.png"] = filters(first)
    for name, figure in pictures.items():
        figure.savefig(folder / name, dpi=110, bbox_inches="tight")
    result = {
        "test": scores.numbers(),
        "best_epoch": trainer.progress.best_epoch + 1,
        "history": trainer.history,
        "unreadable": trainer.progress.unreadable,
        "fused_against_stock": comparison,
        "options": dataclasses.asdict(trainer.options),
        "environment": environment(),
    }
    (folder / "report.json").write_text(json.dumps(result, indent=2) + "\n")
    (folder / "report.md").write_text(page(trainer, scores, comparison, list(pictures)))
    return folder


def page(
    trainer: Trainer, scores: Scores, comparison: Mapping[str, Any] | None, pictures: Sequence[str]
) -> str:
    options = dataclasses.asdict(trainer.options)
    lines = [
        f"# {trainer.options.preset} on {trainer.options.data}",
        "",
        f"Test accuracy {scores.accuracy:.2%} (top-5 error {scores.top5_error:.2%}) on {scores.images} images, "
        f"with the weights of the last of {len(trainer.history)} epochs; centre view. The lowest validation loss was "
        f"epoch {trainer.progress.best_epoch + 1}'s, and `best.pt` has its weights.",
        f"Data: {trainer.data.note}. Unreadable training images: {len(trainer.progress.unreadable)}.",
        "",
    ]
    if comparison is not None:
        lines += [
            "## Fused against stock",
            "",
            "The same weights, batches and dropout through fastalex's network and torch's own, taking turns.",
            "",
            "| network | images/s | loss at the last step |",
            "|---|---:|---:|",
            f"| fastalex | {comparison['fused_rate']:.0f} | {comparison['fused_loss'][-1]:.6f} |",
            f"| torch.nn | {comparison['stock_rate']:.0f} | {comparison['stock_loss'][-1]:.6f} |",
            "",
            f"Median ratio of step times {comparison['speedup']:.2f}; largest difference of a loss over "
            f"{len(comparison['fused_loss'])} steps {comparison['largest_difference']:.1e}.",
            "",
        ]
    lines += [f"![{name.removesuffix('.png')}]({name})" for name in pictures]
    for title, table in (("Configuration", options), ("Environment", environment())):
        lines += ["", f"## {title}", "", "| what | value |", "|---|---|"]
        lines += [f"| {name} | {value} |" for name, value in table.items()]
    return "\n".join(lines) + "\n"


def curves(history: Sequence[Mapping[str, Any]]) -> Any:
    """Loss and error of training and validation by epoch, and the learning rate's steps."""
    figure, axes = extra("matplotlib.pyplot").subplots(1, 2, figsize=(11, 4))
    epochs = [row["epoch"] for row in history]
    drops = [
        now["epoch"] - 0.5
        for before, now in itertools.pairwise(history)
        if now["lr"] < before["lr"]
    ]
    pairs = (
        ("train_loss", "loss", "cross-entropy"),
        ("train_error", "top1_error", "top-1 error"),
    )
    for axis, (training, validation, label) in zip(axes, pairs, strict=True):
        axis.plot(epochs, [row[training] for row in history], label="training, with augmentation")
        axis.plot(epochs, [row[validation] for row in history], label="validation")
        for number, epoch in enumerate(drops):
            axis.axvline(epoch, color="grey", linewidth=0.7, label=None if number else "rate / 10")
        axis.set(
            xlabel="epoch", ylabel=label, yscale="log" if label == "cross-entropy" else "linear"
        )
        axis.grid(alpha=0.3)
        axis.legend()
    return figure


def first_filters(model: nn.Module) -> Tensor | None:
    """The first convolution over colours: [K, 3, R, S]."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.in_channels == 3:
            return module.weight.detach().float().cpu()
    return None


def filters(weight: Tensor) -> Any:
    """Figure 3: each filter stretched to the range of colours, those of the first tower above."""
    rows = -(-len(weight) // 16)
    figure, axes = extra("matplotlib.pyplot").subplots(
        rows, min(16, len(weight)), figsize=(10, 0.7 * rows), squeeze=False
    )
    for axis, kernel in zip(axes.flat, weight, strict=False):
        low, high = kernel.min(), kernel.max()
        axis.imshow(((kernel - low) / (high - low).clamp(min=1e-12)).permute(1, 2, 0).numpy())
    for axis in axes.flat:
        axis.axis("off")
    figure.suptitle(f"The {len(weight)} filters of conv1, {weight.shape[2]}x{weight.shape[3]}x3")
    return figure


def confusion(scores: Scores, classes: Sequence[str]) -> Any:
    """How often each class was taken for each other, as shares of the class."""
    count = len(classes)
    guesses = scores.probabilities.argmax(1)
    table = (scores.labels * count + guesses).bincount(minlength=count**2).view(count, count)
    shares = table / table.sum(1, keepdim=True).clamp(min=1)
    figure, axis = extra("matplotlib.pyplot").subplots(figsize=(6, 5.5))
    image = axis.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, label="share of the class")
    axis.set(xlabel="predicted", ylabel="true", title=f"{scores.images} test images")
    if count <= 20:
        axis.set_xticks(range(count), classes, rotation=45 if max(map(len, classes)) > 2 else 0)
        axis.set_yticks(range(count), classes)
        for (row, column), number in _cells(table):
            if number:
                colour = "white" if shares[row, column] > 0.5 else "black"
                axis.text(
                    column, row, str(number), ha="center", va="center", color=colour, fontsize=8
                )
    return figure


def _cells(table: Tensor) -> list[tuple[tuple[int, int], int]]:
    return [
        ((row, column), int(table[row, column]))
        for row in range(table.shape[0])
        for column in range(table.shape[1])
    ]


def examples(scores: Scores, images: Images, classes: Sequence[str]) -> Any:
    """Figure 4: test images with their five likeliest classes; the true one is red. The least certain come first."""
    pyplot = extra("matplotlib.pyplot")
    figure, axes = pyplot.subplots(2, 8, figsize=(15, 4.6), height_ratios=(2, 1.3), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    if scores.unreadable:  # rows no longer count images
        return figure
    shown = scores.probabilities.max(1).values.argsort()[:8].tolist()
    for column, row in enumerate(shown):
        picture, bars = axes[0, column], axes[1, column]
        label = int(scores.labels[row])
        picture.imshow(images.read(row).numpy())
        picture.set_title(classes[label], fontsize=10)
        values, guesses = scores.probabilities[row].topk(min(5, len(classes)))
        colours = ["tab:red" if guess == label else "tab:blue" for guess in guesses.tolist()]
        bars.axis("on")
        bars.barh(range(len(guesses)), values.tolist(), color=colours)
        bars.set_yticks(range(len(guesses)), [classes[guess] for guess in guesses.tolist()])
        bars.set(xlim=(0, 1), xticks=(0, 1))
        bars.invert_yaxis()
    figure.suptitle("The eight test images the network is least certain of, and its five guesses")
    return figure
