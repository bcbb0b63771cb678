"""The paper's ablations in one go: what each part is worth here, measured over seeds, whatever it shows."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastalex.train import checkpoint
from fastalex.train.build import make_model
from fastalex.train.data import Data, load
from fastalex.train.errors import TrainingError, extra
from fastalex.train.options import Options
from fastalex.train.runtime import make_deterministic
from fastalex.train.screen import Screen
from fastalex.train.trainer import Trainer

#: With every part of the paper in it, small enough for 32x32 images.
BASE = ("towers=2", "hidden=128", "dropout=0.5")
#: One part changed at a time, and what the paper claims of it.
VARIANTS: dict[str, tuple[tuple[str, ...], str]] = {
    "all parts": ((), "the network of the paper"),
    "tanh": (("activation=tanh",), "ReLU reaches 25 % training error six times sooner"),
    "no LRN": (("norm=none",), "LRN takes 1.4 points off the top-1 error"),
    "plain pooling": (("pool=plain",), "overlapping pooling takes 0.4 points off"),
    "no dropout": (("dropout=0.0",), "without dropout the network overfits"),
    "one tower": (("towers=1",), "two towers take 1.7 points off a net with half the kernels"),
}


def ablate(
    options: Options, folder: Path, seeds: int, threshold: float, screen: Screen
) -> list[dict[str, Any]]:
    """Trains every variant with ``seeds`` seeds; returns and writes the table.

    Args:
        options: the recipe that all variants share; its preset must take the options of :data:`BASE`.
        folder: gets a run a variant and seed, ``ablations.json``, ``ablations.md`` and ``ablations.png``.
        seeds: runs of each variant; the error bars are their standard deviation.
        threshold: training error whose first epoch is reported (section 3.1 of the paper takes 0.25).
        screen: where progress is reported.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as failure:
        raise TrainingError(f"{folder} cannot be made: {failure.strerror}") from failure
    data = load(options)
    rows = []
    for name, (changes, claim) in VARIANTS.items():
        runs = [
            _run(name, changes, options, data, folder, options.seed + seed) for seed in range(seeds)
        ]
        row = {"variant": name, "claim": claim, **_summary(runs, threshold)}
        rows.append(row)
        screen.say(
            f"{name:14} test error {row['test_error']:.2%} ± {row['test_error_deviation']:.2%}  "
            f"epochs to {threshold:.0%} training error {_epochs(row)}"
        )
        checkpoint.save_json(rows, folder / "ablations.json")
    (folder / "ablations.md").write_text(table(rows, options, seeds, threshold))
    plot(rows, folder / "ablations.png", threshold)
    screen.say(f"table and plots in {folder}")
    return rows


def _run(
    name: str, changes: Sequence[str], options: Options, data: Data, folder: Path, seed: int
) -> dict[str, Any]:
    chosen = dataclasses.replace(options, seed=seed, set=[*BASE, *options.set, *changes])
    make_deterministic(chosen)
    model = make_model(chosen, len(data.classes))
    where = folder / f"{name.replace(' ', '-')}-{seed}"
    trainer = Trainer(model, data, chosen, where, screen=Screen(quiet=True))
    trainer.resume()  # a table that was interrupted goes on
    trainer.fit()
    scores = trainer.score(data.test)
    return {
        "seed": seed,
        "test_error": scores.top1_error,
        "training_errors": [row["train_error"] for row in trainer.history],
        "validation_errors": [row["top1_error"] for row in trainer.history],
    }


def first_below(errors: Sequence[float], threshold: float) -> float | None:
    """The epoch, counted from one and between two by proportion, at which the error comes to the threshold."""
    for index, error in enumerate(errors):
        if error <= threshold:
            if index == 0:
                return 1.0
            before = errors[index - 1]
            return index + (before - threshold) / (before - error)
    return None


def _summary(runs: Sequence[Mapping[str, Any]], threshold: float) -> dict[str, Any]:
    errors = [run["test_error"] for run in runs]
    reached = [first_below(run["training_errors"], threshold) for run in runs]
    known = [epoch for epoch in reached if epoch is not None]
    complete = len(known) == len(runs)
    return {
        "runs": list(runs),
        "test_error": statistics.mean(errors),
        "test_error_deviation": _deviation(errors),
        "training_error": statistics.mean(run["training_errors"][-1] for run in runs),
        "epochs_to_threshold": statistics.mean(known) if complete else None,
        "epochs_to_threshold_deviation": _deviation(known) if complete else None,
    }


def _deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _epochs(row: Mapping[str, Any]) -> str:
    if row["epochs_to_threshold"] is None:
        return "not reached by all"
    return f"{row['epochs_to_threshold']:.1f} ± {row['epochs_to_threshold_deviation']:.1f}"


def table(rows: Sequence[Mapping[str, Any]], options: Options, seeds: int, threshold: float) -> str:
    lines = [
        f"# Ablations on {options.data}",
        "",
        f"Preset {options.preset} with {', '.join((*BASE, *options.set))}; {options.epochs} epochs of batch "
        f"{options.batch} at rate {options.lr}; mean and standard deviation of {seeds} seeds. All of "
        "it was measured here; the last column is what the paper says of ImageNet.",
        "",
        f"| variant | test error | training error | epochs to {threshold:.0%} training error | the paper |",
        "|---|---:|---:|---:|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['variant']} | {row['test_error']:.2%} ± {row['test_error_deviation']:.2%} | "
            f"{row['training_error']:.2%} | {_epochs(row)} | {row['claim']} |"
        )
    return "\n".join(lines) + "\n"


def plot(rows: Sequence[Mapping[str, Any]], path: Path, threshold: float) -> None:
    """Training error by epoch (Figure 1), and the test errors with their bars."""
    extra("matplotlib").use("Agg")
    pyplot = extra("matplotlib.pyplot")
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 4.5))
    for row in rows:
        errors = list(zip(*(run["training_errors"] for run in row["runs"]), strict=False))
        means = [statistics.mean(each) for each in errors]
        bars = [_deviation(each) for each in errors]
        epochs = range(1, len(means) + 1)
        left.errorbar(epochs, means, bars, label=row["variant"], capsize=2, linewidth=1.2)
    left.axhline(threshold, color="grey", linewidth=0.7, linestyle="--")
    left.set(xlabel="epoch", ylabel="training error, with augmentation", yscale="log")
    left.grid(alpha=0.3)
    left.legend()
    names = [row["variant"] for row in rows]
    right.bar(
        names,
        [100 * row["test_error"] for row in rows],
        yerr=[100 * row["test_error_deviation"] for row in rows],
        capsize=4,
        color="tab:blue",
    )
    right.set_ylabel("test error, %")
    right.tick_params(axis="x", rotation=25)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
