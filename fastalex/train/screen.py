"""What a run shows: a bar with rate and time left, a line an epoch."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

from fastalex.train.errors import extra


class Screen:
    """The terminal; ``quiet`` says nothing."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self.console = extra("rich.console").Console(quiet=quiet, highlight=False)

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, soft_wrap=True)

    def epoch(self, row: dict[str, Any], better: bool) -> None:
        self.say(
            f"epoch {row['epoch']:3}  rate {row['lr']:<8.2g} loss {row['train_loss']:.4f}  "
            f"validation loss {row['loss']:.4f}  error {row['top1_error']:.2%}  "
            f"{row['images_per_second']:.0f} images/s{'  best' if better else ''}"
        )

    @contextlib.contextmanager
    def bar(self, total: int) -> Iterator[Bar]:
        progress = extra("rich.progress")
        columns = (
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.fields[rate]}"),
            progress.TimeRemainingColumn(),
        )
        with progress.Progress(*columns, console=self.console, transient=True) as shown:
            yield Bar(shown, shown.add_task("", total=total, rate=""))


class Bar:
    """The bar of a run, over the steps of all its epochs."""

    def __init__(self, shown: Any, task: Any) -> None:
        self._shown = shown
        self._task = task

    def advance(self, progress: Any, steps: int, images: int, began: float) -> None:
        rate = images / max(1e-9, time.perf_counter() - began)
        loss = progress.loss / max(1, progress.seen)
        self._shown.update(
            self._task,
            completed=progress.epoch * steps + progress.step,
            description=f"epoch {progress.epoch + 1}  loss {loss:.4f}",
            rate=f"{rate:.0f} images/s, left:",
        )
