"""``python -m fastalex.train``: the command line."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastalex.train import build, checkpoint
from fastalex.train.errors import Interrupted, TrainingError, extra
from fastalex.train.options import Options, add_options, given
from fastalex.train.runtime import make_deterministic
from fastalex.train.screen import Screen
from fastalex.train.trainer import Trainer

#: Options of a fine-tuning run that are not a new run's: small steps, larger ones for the new head.
FINE_TUNING: dict[str, Any] = {"lr": 0.001}
HEAD_RATE = "10"


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m fastalex.train",
        description="Trains and evaluates the networks of fastalex.models with the paper's recipe.",
        epilog="Without a command it trains; without arguments, on scikit-learn's digits. COMMAND --help has more.",
    )
    commands = top.add_subparsers(dest="command", metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], None], help: str) -> Any:
        made = commands.add_parser(name, help=help, description=help)
        made.set_defaults(run=run)
        return made

    for name, run, help in (
        ("train", train, "train a network (the default command)"),
        (
            "finetune",
            finetune,
            "train on from a checkpoint, with a new head where the classes differ",
        ),
    ):
        made = command(name, run, help)
        if name == "finetune":
            made.add_argument("checkpoint", type=Path, help="checkpoint, or folder of a run")
        made.add_argument(
            "--out", type=Path, help="folder of the run (default: out/train/<data>-<time>)"
        )
        made.add_argument(
            "--resume", type=Path, metavar="FOLDER", help="go on with the run in a folder"
        )
        made.add_argument(
            "--compare",
            type=int,
            default=20,
            metavar="STEPS",
            help="steps of the report's comparison with the stock network; 0: none (default: 20)",
        )
        add_options(made)

    made = command("evaluate", evaluate, "score checkpoints, and their ensemble")
    made.add_argument("--checkpoints", nargs="+", required=True, type=Path, metavar="PATH")
    made.add_argument(
        "--views", type=int, choices=(1, 10), default=1, help="the centre, or ten crops"
    )
    made.add_argument("--split", choices=("train", "validation", "test"), default="test")
    made.add_argument("--root", help="where the data set is now")
    made.add_argument("--device", default="auto")
    made.add_argument("--workers", type=int, default=0)

    made = command("sweep", sweep, "find hyperparameters: sanity checks, a rate, random search")
    made.add_argument("--out", type=Path, default=Path("out/sweep"))
    made.add_argument(
        "--trials", type=int, default=8, help="of each of the two searches (default: 8)"
    )
    made.add_argument("--coarse-epochs", type=int, default=3)
    made.add_argument("--fine-epochs", type=int, default=8)
    add_options(made)

    made = command("ablate", ablate, "the paper's ablations, over seeds")
    made.add_argument("--out", type=Path, default=Path("out/ablate"))
    made.add_argument("--seeds", type=int, default=3)
    made.add_argument("--threshold", type=float, default=0.25, help="training error to reach")
    add_options(made)
    return top


def train(arguments: argparse.Namespace) -> None:
    changes = given(arguments)
    if arguments.resume is not None:
        finish(build.resume(arguments.resume, changes, _screen()), arguments.compare)
    else:
        finish(build.start(Options(**changes), arguments.out, _screen()), arguments.compare)


def _screen() -> Screen:
    """Of several processes, the first speaks."""
    return Screen(quiet=os.environ.get("RANK", "0") != "0")


def finetune(arguments: argparse.Namespace) -> None:
    """The checkpoint's network, data set and crops, unless other ones are given; the head learns faster."""
    if arguments.resume is not None:
        train(arguments)
        return
    path = _checkpoint(arguments.checkpoint)
    state = checkpoint.load(path)
    before = state["options"]
    kept = ("data", "root", "labels", "crop", "mirror", "preset", "set", "batch", "workers")
    options = {name: before[name] for name in kept} | FINE_TUNING | given(arguments)
    options["start"] = str(path)
    if "rate" not in options:
        made = Options(**{**options, "preset": options["preset"]})
        name = build.head(build.make_model(made, len(state["classes"]))).rpartition(".")[2]
        options["rate"] = [f"{name}={HEAD_RATE}"]
    finish(build.start(Options(**options), arguments.out, _screen()), arguments.compare)


def finish(trainer: Trainer, steps: int) -> None:
    """Trains to the end, scores the last epoch as the paper did, and writes the report."""
    from fastalex.train import report
    from fastalex.train.compare import compare

    if trainer.options.tensorboard and trainer.rank == 0:
        trainer.listeners.append(_tensorboard(trainer))
    trainer.fit()
    scores = trainer.score(trainer.data.test)
    if trainer.rank != 0:
        return
    say = trainer.screen.say
    say(
        f"test accuracy {scores.accuracy:.2%} on {scores.images} images, top-5 error "
        f"{scores.top5_error:.2%} (last of {trainer.progress.epoch} epochs)"
    )
    comparison = None
    if steps:
        assert trainer.statistics is not None
        comparison = compare(trainer.options, trainer.data, trainer.statistics, steps)
        say(
            f"training {comparison['fused_rate']:.0f} images/s, the stock network "
            f"{comparison['stock_rate']:.0f}"
        )
    say(f"report in {report.write(trainer, scores, comparison)}")


def _tensorboard(trainer: Trainer) -> Callable[[dict[str, Any]], None]:
    writer = extra("torch.utils.tensorboard").SummaryWriter(
        trainer.folder / "tensorboard", purge_step=trainer.progress.epoch + 1
    )

    def log(row: dict[str, Any]) -> None:
        for name, value in row.items():
            if name != "epoch":
                writer.add_scalar(name, value, row["epoch"])
        writer.flush()

    return log


def evaluate(arguments: argparse.Namespace) -> None:
    from fastalex.train.evaluate import evaluate as scored

    found = scored(
        [_checkpoint(path) for path in arguments.checkpoints],
        ten_views=arguments.views == 10,
        split=arguments.split,
        root=arguments.root,
        device=arguments.device,
        workers=arguments.workers,
    )
    rows = list(found.single.items())
    if len(rows) > 1:
        rows.append((f"ensemble of {len(rows)}", found.ensemble))
    width = max(len(name) for name, _ in rows)
    say = Screen().say
    say(f"{'':{width}}  top-1 error  top-5 error    loss  ({rows[0][1].images} images)")
    for name, scores in rows:
        say(
            f"{name:{width}}  {scores.top1_error:10.2%}  {scores.top5_error:10.2%}  {scores.loss:7.4f}"
        )


def _checkpoint(path: Path) -> Path:
    return path / checkpoint.LAST if path.is_dir() else path


def sweep(arguments: argparse.Namespace) -> None:
    from fastalex.train.sweep import Sweep

    options = Options(**given(arguments))
    run = Sweep(options, arguments.out, Screen())
    run.run(arguments.trials, arguments.coarse_epochs, arguments.fine_epochs)


def ablate(arguments: argparse.Namespace) -> None:
    from fastalex.train.ablate import ablate as run

    options = Options(**{"epochs": 12, "stop": 0, **given(arguments)})
    make_deterministic(options)
    run(options, arguments.out, arguments.seeds, arguments.threshold, Screen())


COMMANDS = ("train", "finetune", "evaluate", "sweep", "ablate")


def main(words: list[str] | None = None) -> int:
    words = sys.argv[1:] if words is None else words
    if not words or (words[0] not in COMMANDS and words[0] not in ("-h", "--help")):
        words = ["train", *words]
    arguments = parser().parse_args(words)
    try:
        arguments.run(arguments)
    except TrainingError as failure:
        print(f"fastalex.train: {failure}", file=sys.stderr)
        return 1
    except (Interrupted, KeyboardInterrupt) as stop:
        print(f"fastalex.train: {stop or 'left at once'}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
