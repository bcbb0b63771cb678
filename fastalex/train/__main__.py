"""``python -m fastalex.train``: the command line."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fastalex.train import build
from fastalex.train.errors import Interrupted, TrainingError
from fastalex.train.options import Options, add_options, given

COMMANDS = ("train",)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m fastalex.train",
        description="Trains and evaluates the networks of fastalex.models with the paper's recipe.",
        epilog="Without a command it trains; without arguments, on scikit-learn's digits.",
    )
    commands = top.add_subparsers(dest="command", metavar="command")
    train = commands.add_parser("train", help="train a network (the default)")
    train.add_argument(
        "--out", type=Path, help="folder of the run (default: out/train/<data>-<time>)"
    )
    train.add_argument(
        "--resume", type=Path, metavar="FOLDER", help="go on with the run in a folder"
    )
    add_options(train)
    return top


def train(arguments: argparse.Namespace) -> None:
    changes = given(arguments)
    if arguments.resume is not None:
        trainer = build.resume(arguments.resume, changes)
    else:
        trainer = build.start(Options(**changes), arguments.out)
    scores = trainer.fit()
    trainer.screen.say(
        f"test accuracy {scores.accuracy:.2%} on {scores.images} images "
        f"(best epoch {trainer.progress.best_epoch + 1}); {trainer.folder}"
    )


def main(words: list[str] | None = None) -> int:
    words = sys.argv[1:] if words is None else words
    if not words or (words[0] not in COMMANDS and words[0] not in ("-h", "--help")):
        words = ["train", *words]
    arguments = parser().parse_args(words)
    try:
        train(arguments)
    except TrainingError as failure:
        print(f"fastalex.train: {failure}", file=sys.stderr)
        return 1
    except (Interrupted, KeyboardInterrupt) as stop:
        print(f"fastalex.train: {stop or 'left at once'}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
