"""The training loop: one network, one data set, one folder, and nothing lost when it stops."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastalex.models.processes import Spread
from fastalex.train import checkpoint
from fastalex.train.batches import (
    Batch,
    Pipeline,
    Positions,
    TrainingBatches,
    make_loader,
    mixed_seed,
)
from fastalex.train.data import Data, Images
from fastalex.train.errors import Interrupted, TrainingError
from fastalex.train.guards import StopSignals, explained_workers
from fastalex.train.metrics import Scores, predict, score
from fastalex.train.options import Options
from fastalex.train.recipe import make_optimizer, make_schedule
from fastalex.train.runtime import choose_device
from fastalex.train.screen import Screen
from fastalex.train.statistics import Statistics, measure, takes_levels


@dataclasses.dataclass
class Progress:
    """Where a run is; all of it is in every checkpoint."""

    epoch: int = 0
    step: int = 0  # of the epoch; the steps before it are done
    loss: float = 0.0  # sums over the epoch's images so far
    wrong: int = 0
    seen: int = 0
    best_loss: float = float("inf")
    best_epoch: int = -1
    unreadable: list[str] = dataclasses.field(default_factory=list)


class Trainer:
    """Trains ``model`` on ``data`` as ``options`` say, and keeps checkpoints in ``folder``.

    Args:
        model: any module from [N, 3, crop, crop] to logits [N, classes]; moved to the options' device unless it
            is spread over devices already (then it has ``placed = True``). A :class:`fastalex.models.processes.Spread`
            trains over its processes, of which the first writes and speaks.
        data: from ``fastalex.train.data.load``, which also fills in the options' defaults.
        options: the recipe.
        folder: made where it is missing.
        screen: where the run reports; by default the terminal.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Data,
        options: Options,
        folder: Path | str,
        *,
        screen: Screen | None = None,
    ) -> None:
        self.options = options
        self.data = data
        self.folder = Path(folder)
        self.device = choose_device(options.device)
        self.spread = model if isinstance(model, Spread) else None
        self.rank = 0 if self.spread is None else self.spread.rank
        self.screen = screen or Screen(quiet=self.rank != 0)
        self.model = model if getattr(model, "placed", False) else model.to(self.device)
        self.optimizer = make_optimizer(self.model, options)
        self.schedule = make_schedule(self.optimizer, options)
        self.progress = Progress()
        self.history: list[dict[str, Any]] = []
        self.statistics: Statistics | None = None
        #: Called with each epoch's numbers.
        self.listeners: list[Callable[[dict[str, Any]], None]] = []
        self._stop = StopSignals(
            lambda: self.screen.say("stopping at the end of this step; once more to leave at once")
        )
        if self.rank > 0:  # its dropout masks are its own
            torch.manual_seed(mixed_seed(options.seed, -1, self.rank))

    # --- running --------------------------------------------------------------------------------

    def fit(self) -> None:
        """Trains to the end, or to an early stop. The model then has the last epoch's weights.

        Raises:
            Interrupted: on SIGINT or SIGTERM, after the run was saved.
            TrainingError: where the run cannot go on; its message says what is safe.
        """
        self._prepare()
        options, progress = self.options, self.progress
        assert options.epochs is not None
        if progress.epoch >= options.epochs or self._has_stopped_early():
            self.screen.say(f"the run had ended after epoch {progress.epoch}: nothing is trained")
        batches = TrainingBatches(
            self.data.train,
            self.pipeline,
            options.batch or 1,
            options.seed,
            on_device=self.device.type != "cpu",
            shard=self._shard(),
        )
        positions = Positions(len(batches))
        loader = make_loader(batches, options.workers or 0, sampler=positions)
        with self._stop, self.screen.bar(options.epochs * len(batches)) as bar:
            while progress.epoch < options.epochs and not self._has_stopped_early():
                positions.epoch, positions.first = progress.epoch, progress.step
                began, before, waited = time.perf_counter(), progress.seen, 0.0
                self.model.train()
                with explained_workers():
                    asked = began
                    for batch in loader:
                        waited += time.perf_counter() - asked
                        self._step(batch)
                        bar.advance(progress, len(batches), progress.seen - before, began)
                        self._save_if_due()
                        asked = time.perf_counter()
                self._end_epoch(progress.seen - before, time.perf_counter() - began, waited)

    def _shard(self) -> tuple[int, int]:
        """Which images of every batch are this process's: (rank, of how many)."""
        if self.spread is None or not self.spread.own_images:
            return 0, 1
        return self.spread.rank, self.spread.ranks

    def _prepare(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as failure:
            raise TrainingError(
                f"{self.folder} cannot be made: {failure.strerror}; give a folder you may write to "
                "with --out"
            ) from failure
        if self.statistics is None:
            self.statistics = measure(self.data.train, takes_levels(self.options))
        side = min(self.statistics.mean.shape[:2])
        if not 0 < (self.options.crop or 0) <= side:
            raise TrainingError(f"--crop is {self.options.crop}; the images are {side} pixels wide")
        self.pipeline = Pipeline(self.options, self.statistics, len(self.data.classes))
        if self.rank == 0:
            checkpoint.save_json(dataclasses.asdict(self.options), self.folder / "options.json")

    def _step(self, batch: Batch) -> None:
        progress = self.progress
        self._count_unreadable(batch.failures)
        progress.step += 1
        if not len(batch.labels):
            if self.spread is not None:
                raise TrainingError(
                    f"step {progress.step} of epoch {progress.epoch + 1} has no image for process "
                    f"{self.rank}: use a larger --batch or fewer processes. {self._where_saved()}"
                )
            return
        images, labels = self._on_device(batch)
        self.optimizer.zero_grad(set_to_none=True)
        with self._precision():
            logits = self.model(images)
            loss = F.cross_entropy(logits.float(), labels)
        value = loss.item()
        if not math.isfinite(value):
            raise self._diverged(f"the loss became {value}")
        if self.spread is not None:
            loss = loss * self.spread.weight(len(images))
        loss.backward()
        if self.options.clip:
            if self.spread is None:
                nn.utils.clip_grad_norm_(self.model.parameters(), self.options.clip)
            else:
                self.spread.clip_gradients(self.options.clip)
        self.optimizer.step()
        targets = labels if labels.dim() == 1 else labels.argmax(1)
        progress.loss += value * len(images)
        progress.wrong += int((logits.argmax(1) != targets).sum())
        progress.seen += len(images)
        if self.spread is not None and progress.epoch == 0 and progress.step == 1:
            self.screen.say(f"{self.options.parallel}: {self.spread.communication()}")

    def _on_device(self, batch: Batch) -> tuple[Tensor, Tensor]:
        images = batch.images.to(self.device, non_blocking=True)
        labels = batch.labels.to(self.device, non_blocking=True)
        if batch.draws:
            images = self.pipeline.apply(images, batch.draws)
            images, labels = self.pipeline.regularise(images, labels)
        return images, labels

    def _precision(self) -> Any:
        if self.options.amp == "bf16":
            return torch.autocast(self.device.type, torch.bfloat16)
        return contextlib.nullcontext()

    def _end_epoch(self, images: int, seconds: float, waited: float) -> None:
        progress = self.progress
        if self.spread is not None and self.spread.own_images:
            images = sum(self.spread.collect(images))
            parts = self.spread.collect((progress.loss, progress.wrong, progress.seen))
            progress.loss, progress.wrong, progress.seen = map(sum, zip(*parts, strict=True))
        scores = self.score(self.data.validation)
        rate = max(group["lr"] for group in self.optimizer.param_groups)
        row = {
            "epoch": progress.epoch + 1,
            "lr": rate,
            "train_loss": progress.loss / max(1, progress.seen),
            "train_error": progress.wrong / max(1, progress.seen),
            "loss": scores.loss,
            "top1_error": scores.top1_error,
            "top5_error": scores.top5_error,
            "images_per_second": images / seconds,
            "waited": waited / seconds,  # for batches, as a share of the time
        }
        self.history.append(row)
        self.schedule.step(scores.loss)
        better = scores.loss < progress.best_loss
        if better:
            progress.best_loss, progress.best_epoch = scores.loss, progress.epoch
        progress.epoch += 1
        progress.step = progress.wrong = progress.seen = 0
        progress.loss = 0.0
        self.screen.epoch(row, better)
        for listener in self.listeners:
            listener(row)
        # The best first: killed between the two, the run repeats this epoch and writes the same again.
        if better:
            self.save(checkpoint.BEST)
        self.save()

    def _has_stopped_early(self) -> bool:
        stop, progress = self.options.stop, self.progress
        return bool(stop) and progress.epoch - 1 - progress.best_epoch >= (stop or 0)

    def score(self, images: Images) -> Scores:
        """Single view, with the weights the model has."""
        options = self.options
        with self._precision(), explained_workers():
            predictions = predict(
                self.model, images, self.pipeline, batch=options.batch or 1, device=self.device
            )
        return score(*predictions)

    def _count_unreadable(self, failures: list[str]) -> None:
        known = self.progress.unreadable
        fresh = [failure for failure in failures if failure not in known]
        known.extend(fresh)
        for failure in fresh:
            self.screen.say(f"skipped an unreadable image: {failure}")
        allowed = self.options.max_corrupt * len(self.data.train)
        if fresh and len(known) > allowed:
            raise TrainingError(
                f"{len(known)} of {len(self.data.train)} training images cannot be read, more than "
                f"--max-corrupt {self.options.max_corrupt:g} allows; the last is {fresh[-1]}. "
                f"{self._where_saved()}"
            )

    # --- saving ---------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        assert self.statistics is not None
        return {
            "options": dataclasses.asdict(self.options),
            "classes": self.data.classes,
            **self._weights(),
            "schedule": self.schedule.state_dict(),
            "progress": dataclasses.asdict(self.progress),
            "random": self._random_states(),
            "statistics": self.statistics.state(),
            "history": self.history,
        }

    def _weights(self) -> dict[str, Any]:
        """The whole network and optimiser, wherever their parts are."""
        if self.spread is None:
            return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        return {
            "model": self.spread.merged_state_dict(),
            "optimizer": self.spread.merged_optimizer_state(self.optimizer),
        }

    def _random_states(self) -> list[dict[str, Any]]:
        """Of every process, in order."""
        own = checkpoint.random_state()
        return [own] if self.spread is None else self.spread.collect(own)

    def _load_weights(self, model: dict[str, Any]) -> None:
        if self.spread is None:
            self.model.load_state_dict(model)
        else:
            self.spread.load_merged_state_dict(model)

    def save(self, name: str = checkpoint.LAST) -> None:
        """Writes the whole state as ``name``.

        Raises:
            TrainingError: where it cannot be written, or is worth nothing: a weight is not a number.
        """
        state = self.state()
        lost = [key for key, value in state["model"].items() if not value.isfinite().all()]
        if lost:
            raise self._diverged(f"{lost[0]} is no longer finite")
        if self.rank == 0:
            checkpoint.save(state, self.folder / name)
        if self.spread is not None:  # nobody reads it before it is there
            self.spread.barrier()

    def resume(self) -> bool:
        """Goes back to the folder's last checkpoint; False where the run had not come to one."""
        path = self.folder / checkpoint.LAST
        if not path.exists():
            return False
        state = checkpoint.load(path, self.device)
        self._load_weights(state["model"])
        if self.spread is None:
            self.optimizer.load_state_dict(state["optimizer"])
        else:
            self.spread.load_merged_optimizer_state(self.optimizer, state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.progress = Progress(**state["progress"])
        self.history = state["history"]
        self.statistics = Statistics(**state["statistics"])
        states = state["random"]
        if self.rank < len(states):
            checkpoint.restore_random_state(states[self.rank])
        return True

    def _save_if_due(self) -> None:
        asked = self._stop.asked
        if self.spread is not None:  # all of them, or none
            asked = self.spread.any(asked)
        if asked:
            self.save()
            raise Interrupted(
                f"saved in {self.folder} at epoch {self.progress.epoch + 1}, step "
                f"{self.progress.step}; go on with --resume {self.folder}"
            )
        every = self.options.save_every
        if every and self.progress.step % every == 0:
            self.save()

    def _diverged(self, what: str) -> TrainingError:
        return TrainingError(
            f"{what} in epoch {self.progress.epoch + 1}, step {self.progress.step}. No checkpoint was written "
            f"since: {self._where_saved()}. Lower --lr, or clip gradients with --clip 1"
        )

    def _where_saved(self) -> str:
        last = self.folder / checkpoint.LAST
        return (
            f"{last} is intact" if last.exists() else "the run had not come to its first checkpoint"
        )
