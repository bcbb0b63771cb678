"""The known steps to good hyperparameters: sanity checks, a rate that learns, then coarse and fine random search."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastalex.train import checkpoint
from fastalex.train.batches import Pipeline, TrainingBatches
from fastalex.train.build import make_model
from fastalex.train.data import Data, load
from fastalex.train.errors import TrainingError, extra
from fastalex.train.options import Options
from fastalex.train.recipe import make_optimizer
from fastalex.train.runtime import choose_device, make_deterministic
from fastalex.train.screen import Screen
from fastalex.train.statistics import measure, takes_levels
from fastalex.train.trainer import Trainer

#: Rates tried for one that makes the loss fall, large ones first.
RATES = tuple(10.0**-power for power in (0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4))
SMALL_SAMPLE = 20
SEARCHES = ("coarse", "fine")


class Sweep:
    """The steps in turn; each says what it found, and the results end up in ``folder``."""

    def __init__(self, options: Options, folder: Path, screen: Screen) -> None:
        self.options = options
        self.folder = folder
        self.screen = screen
        self.data: Data = load(options)
        self.device = choose_device(options.device)
        self.statistics = measure(self.data.train, takes_levels(options))
        self.results: dict[str, Any] = {}

    def run(self, trials: int, coarse_epochs: int, fine_epochs: int) -> dict[str, Any]:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as failure:
            raise TrainingError(f"{self.folder} cannot be made: {failure.strerror}") from failure
        self.check_initial_loss()
        self.find_rate()
        self.overfit_small_sample()
        centre = self.results["rate"]["chosen"]
        coarse = self.search("coarse", trials, coarse_epochs, centre, 10.0)
        best = min(coarse, key=lambda trial: trial["loss"])
        fine = self.search("fine", trials, fine_epochs, best["lr"], 10**0.5)
        best = min([*coarse, *fine], key=lambda trial: trial["loss"])
        self.results["best"] = best
        checkpoint.save_json(self.results, self.folder / "sweep.json")
        self.plot()
        self.screen.say(
            f"best: --lr {best['lr']:.2g} --weight-decay {best['weight_decay']:.2g} "
            f"(validation loss {best['loss']:.4f}, error {best['error']:.2%}); {self.folder}"
        )
        return self.results

    def check_initial_loss(self) -> None:
        """A network that knows nothing gives every class its share: the loss is ln(classes)."""
        model = self._network().eval()
        images, labels = self._batch(min(256, len(self.data.train)))
        with torch.no_grad():
            loss = F.cross_entropy(model(images), labels).item()
        expected = math.log(len(self.data.classes))
        close = abs(loss - expected) < 0.25 * expected
        self.results["initial_loss"] = {"loss": loss, "expected": expected, "close": close}
        verdict = "as expected" if close else "far from it: look at the initialisation or the scale"
        self.screen.say(f"1. initial loss {loss:.3f}, ln(classes) {expected:.3f}: {verdict}")

    def find_rate(self, steps: int = 25) -> None:
        """The largest rate whose loss falls, over a few steps with augmentation; a third of what diverges."""
        rows = {}
        for rate in RATES:
            losses = self._losses(rate, steps, self._batch, self.options.batch or 1)
            rows[rate] = losses
        fallen = {rate: _fall(losses) for rate, losses in rows.items()}
        useful = [rate for rate, fall in fallen.items() if fall < -0.02]
        if not useful:
            raise TrainingError("no learning rate makes the loss fall; see step 1, and the data")
        chosen = min(useful, key=lambda rate: fallen[rate])
        self.results["rate"] = {
            "chosen": chosen,
            "falls": [{"lr": rate, "fall": fall} for rate, fall in fallen.items()],
        }
        self.screen.say(
            f"2. the loss falls fastest over {steps} steps with --lr {chosen:.2g} "
            f"(it falls at all from {min(useful):.2g} to {max(useful):.2g})"
        )

    def overfit_small_sample(self, steps: int = 200) -> None:
        """A network that cannot learn 20 images by heart is broken; without regularisers it must.

        At the chosen rate, or at a lower one: what a changing batch bears can kill the ReLUs on a fixed one.
        """
        chosen = self.results["rate"]["chosen"]
        for rate in (chosen, chosen / 3, chosen / 10):
            losses = self._losses(rate, steps, self._same_batch, SMALL_SAMPLE, regularised=False)
            done = next((step for step, loss in enumerate(losses) if loss < 0.05), None)
            if done is not None:
                break
        self.results["overfit"] = {"lr": rate, "losses": losses, "step": done}
        found = (
            f"in {done} steps with --lr {rate:.2g}"
            if done is not None
            else f"not in {steps} steps, nor with a tenth of that rate: something is broken"
        )
        self.screen.say(f"3. {SMALL_SAMPLE} images learnt by heart (loss below 0.05): {found}")

    def search(
        self, name: str, trials: int, epochs: int, centre: float, reach: float
    ) -> list[dict[str, Any]]:
        """Random rates within a factor of ``reach`` of ``centre``, and random weight decays."""
        optuna = extra("optuna")
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        rows: list[dict[str, Any]] = []

        def objective(trial: Any) -> float:
            row = {
                "lr": trial.suggest_float("lr", centre / reach, centre * reach, log=True),
                "weight_decay": trial.suggest_float("weight_decay", 1e-5, 1e-2, log=True),
            }
            row |= self._try(f"{name}-{trial.number}", epochs, row)
            rows.append(row)
            self.screen.say(
                f"   {name} {trial.number + 1}/{trials}: --lr {row['lr']:.2g} --weight-decay "
                f"{row['weight_decay']:.2g}  validation loss {row['loss']:.4f}"
            )
            return float(row["loss"])

        self.screen.say(f"{'4' if name == 'coarse' else '5'}. {name} search, {epochs} epochs each")
        sampler = optuna.samplers.RandomSampler(seed=self.options.seed)
        optuna.create_study(sampler=sampler).optimize(objective, n_trials=trials)
        self.results[name] = rows
        return rows

    def _try(self, name: str, epochs: int, chosen: dict[str, float]) -> dict[str, Any]:
        options = dataclasses.replace(
            self.options,
            epochs=epochs,
            stop=0,
            lr=chosen["lr"],
            weight_decay=chosen["weight_decay"],
        )
        make_deterministic(options)
        model = make_model(options, len(self.data.classes))
        run = Trainer(model, self.data, options, self.folder / name, screen=Screen(quiet=True))
        try:
            run.fit()
        except TrainingError:  # it diverged
            return {"loss": float("inf"), "error": 1.0, "curve": []}
        best = min(run.history, key=lambda row: row["loss"])
        return {
            "loss": best["loss"],
            "error": best["top1_error"],
            "curve": [row["loss"] for row in run.history],
        }

    def _network(self, regularised: bool = True) -> nn.Module:
        make_deterministic(self.options)
        model = make_model(self.options, len(self.data.classes)).to(self.device)
        if not regularised:
            for module in model.modules():
                if isinstance(getattr(module, "p", None), float):  # of any kind of dropout
                    module.p = 0.0  # type: ignore[assignment]
        return model.train()

    def _batch(self, count: int, step: int = 0) -> tuple[Tensor, Tensor]:
        pipeline = Pipeline(self.options, self.statistics, len(self.data.classes))
        batches = TrainingBatches(self.data.train, pipeline, count, self.options.seed)
        batch = batches[divmod(step, len(batches))]
        return batch.images.to(self.device), batch.labels.to(self.device)

    def _same_batch(self, count: int, step: int = 0) -> tuple[Tensor, Tensor]:
        return self._batch(count)

    def _losses(
        self,
        rate: float,
        steps: int,
        batch: Callable[[int, int], tuple[Tensor, Tensor]],
        count: int,
        regularised: bool = True,
    ) -> list[float]:
        decay = self.options.weight_decay if regularised else 0.0
        options = dataclasses.replace(self.options, lr=rate, weight_decay=decay)
        model = self._network(regularised)
        optimizer = make_optimizer(model, options)
        losses: list[float] = []
        for step in range(steps):
            images, labels = batch(count, step)
            loss = F.cross_entropy(model(images), labels)
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                return losses
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        return losses

    def plot(self) -> None:
        """Each step as a picture: the rates, the small sample, the searches with the curve of every trial."""
        plots = extra("matplotlib")
        plots.use("Agg")
        pyplot = extra("matplotlib.pyplot")
        figure, axes = pyplot.subplots(2, 3, figsize=(16, 8), layout="constrained")
        rates, small = axes[:, 0]
        found = self.results["rate"]["falls"]
        rates.semilogx([row["lr"] for row in found], [min(row["fall"], 1) for row in found], "o-")
        rates.axhline(0, color="grey", linewidth=0.7)
        rates.set(
            xlabel="learning rate", ylabel="change of the loss", title="2. a rate that learns"
        )
        small.semilogy(self.results["overfit"]["losses"])
        small.set(xlabel="step", ylabel="loss", title=f"3. {SMALL_SAMPLE} images by heart")
        for number, name, (points, curves) in zip((4, 5), SEARCHES, axes.T[1:], strict=True):
            rows = [row for row in self.results[name] if math.isfinite(row["loss"])]
            failed = [row for row in self.results[name] if not math.isfinite(row["loss"])]
            norm = extra("matplotlib.colors").LogNorm()
            norm.autoscale([row["loss"] for row in rows] or [1.0])
            shades = extra("matplotlib.cm").ScalarMappable(norm, "viridis_r")
            for row in rows:
                colour = shades.to_rgba(row["loss"])
                points.loglog(row["lr"], row["weight_decay"], "o", color=colour)
                curves.semilogy(range(1, len(row["curve"]) + 1), row["curve"], color=colour)
            for row in failed:
                points.loglog(row["lr"], row["weight_decay"], "rx")
            points.set(xlabel="learning rate", ylabel="weight decay")
            points.set_title(f"{number}. {name} search (x: diverged)")
            curves.set(xlabel="epoch", ylabel="validation loss")
            figure.colorbar(shades, ax=[points, curves], label="lowest validation loss")
        figure.savefig(self.folder / "sweep.png", dpi=110)
        pyplot.close(figure)


def _fall(losses: list[float]) -> float:
    """The last fifth of the losses less the first value; infinite where they blew up."""
    if not math.isfinite(losses[-1]):
        return math.inf
    last = losses[-max(1, len(losses) // 5) :]
    return sum(last) / len(last) - losses[0]
