"""The configuration of a run: one dataclass that the command line, the checkpoints and the report share."""

from __future__ import annotations

import argparse
import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

from fastalex.train.errors import TrainingError

OPTIMIZERS = ("paper", "sgd")
DATASETS = ("digits", "cifar10", "folder")


def _option(default: Any, help: str, *, least: float | None = None, **argument: Any) -> Any:
    """A field with its command-line argument, and the least value it may have."""
    return field(default=default, metadata={"argument": {"help": help, **argument}, "least": least})


def _repeated(help: str, metavar: str) -> dict[str, Any]:
    """The metadata of an argument that may be given several times."""
    return {"argument": {"help": help, "action": "append", "metavar": metavar}}


@dataclass
class Options:
    """Every choice of a run. None stands for the data set's own default (see ``data.DEFAULTS``)."""

    # the data
    data: str = _option("digits", "the data set", choices=DATASETS)
    root: str | None = _option(
        None, "folder of cifar10, or of train/ and val/ with a folder a class"
    )
    download: bool = _option(False, "fetch cifar10 into --root where it is missing")
    labels: str | None = _option(None, "only these classes, such as 0-4 or 1,3,5", metavar="LABELS")
    crop: int | None = _option(None, "side of the crop the network sees", type=int, least=1)
    mirror: bool | None = _option(None, "random horizontal mirror images")
    colour: float = _option(
        0.1, "deviation of the PCA colour shift; 0 for none", type=float, least=0
    )
    cutout: int = _option(
        0, "side of a square set to zero in each image; 0 for none", type=int, least=0
    )
    mixup: float = _option(0.0, "alpha of mixup; 0 for none", type=float, least=0)
    max_corrupt: float = _option(
        0.01, "share of unreadable images that ends the run", type=float, least=0
    )
    levels: bool | None = _option(
        None, "give the network pixels of 0 to 255, not of unit deviation"
    )
    workers: int | None = _option(
        None, "processes that prepare batches ahead of the step", type=int, least=0
    )
    # the network
    preset: str | None = _option(
        None,
        "a preset of fastalex.models.alexnet, or a classification network of torchvision, such as resnet18",
    )
    set: list[str] = field(
        default_factory=list,
        metadata=_repeated(
            "an argument of the network, such as towers=1, or stochastic_depth_prob=0.2 for efficientnet_b0",
            "NAME=VALUE",
        ),
    )
    stock: bool = _option(False, "the same network from torch.nn instead of fastalex's layers")
    # the recipe
    batch: int | None = _option(None, "images a step", type=int, least=1)
    epochs: int | None = _option(
        None, "at most this many passes over the training set", type=int, least=1
    )
    optimizer: str = _option("paper", "the update rule", choices=OPTIMIZERS)
    lr: float | None = _option(None, "learning rate at the start", type=float, least=0)
    momentum: float = _option(0.9, "momentum", type=float, least=0)
    weight_decay: float = _option(5e-4, "weight decay", type=float, least=0)
    patience: int | None = _option(
        None, "epochs without a better validation loss before lr / 10", type=int, least=0
    )
    drops: int = _option(3, "times the learning rate is divided by ten", type=int, least=0)
    stop: int | None = _option(
        None,
        "epochs without a better validation loss that end the run; 0: never",
        type=int,
        least=0,
    )
    clip: float = _option(
        0.0, "largest norm of the gradient; 0 for no clipping", type=float, least=0
    )
    amp: str = _option("none", "mixed precision", choices=("none", "bf16"))
    parallel: str = _option(
        "none",
        "how processes that torchrun started share the network",
        choices=("none", "data", "towers", "hybrid"),
    )
    # fine-tuning
    start: str | None = _option(None, "checkpoint whose weights the run starts from")
    freeze: list[str] = field(
        default_factory=list, metadata=_repeated("a layer whose weights stay", "LAYER")
    )
    rate: list[str] = field(
        default_factory=list,
        metadata=_repeated("a layer's learning rate as a multiple of --lr", "LAYER=FACTOR"),
    )
    # the run
    seed: int = _option(0, "seed of weights, order, crops and dropout", type=int)
    deterministic: bool = _option(True, "only algorithms that repeat bit for bit")
    device: str = _option("auto", "cpu, cuda, cuda:1, ...; auto takes a GPU where there is one")
    save_every: int = _option(0, "steps between checkpoints; 0: one an epoch", type=int, least=0)
    tensorboard: bool = _option(False, "write TensorBoard logs beside the checkpoints")

    def __post_init__(self) -> None:
        for each in dataclasses.fields(self):
            value, least = getattr(self, each.name), each.metadata.get("least")
            if value is not None and least is not None and not value >= least:
                name = each.name.replace("_", "-")
                raise TrainingError(f"--{name} is {value}; it must be at least {least}")

    def model_arguments(self) -> dict[str, Any]:
        """--set as keyword arguments: JSON values, or else strings."""
        arguments: dict[str, Any] = {}
        for text in self.set:
            name, equals, value = text.partition("=")
            if not equals:
                raise TrainingError(f"--set {text}: write NAME=VALUE, such as towers=1")
            try:
                arguments[name] = json.loads(value)
            except json.JSONDecodeError:
                arguments[name] = value
        return arguments

    def classes(self, count: int) -> list[int]:
        """--labels as the indices of the classes kept, of ``count``."""
        if self.labels is None:
            return list(range(count))
        try:
            ends = [[int(end) for end in part.split("-")] for part in self.labels.split(",")]
            kept = sorted({label for part in ends for label in range(part[0], part[-1] + 1)})
        except ValueError:
            kept = []
        if not kept or kept[-1] >= count:
            raise TrainingError(
                f"--labels {self.labels}: write numbers from 0 to {count - 1}, such as 0-4 or 1,3,5"
            )
        return kept

    def rates(self) -> dict[str, float]:
        """--rate as layer -> factor."""
        factors: dict[str, float] = {}
        for text in self.rate:
            name, _, value = text.partition("=")
            try:
                factors[name] = float(value)
            except ValueError:
                raise TrainingError(f"--rate {text}: write LAYER=FACTOR, such as fc8=10") from None
        return factors


def add_options(parser: argparse.ArgumentParser) -> None:
    """One argument per field. Only those given reach the namespace, so that others keep their source."""
    for each in dataclasses.fields(Options):
        argument = {"default": argparse.SUPPRESS, **each.metadata["argument"]}
        if each.type in ("bool", "bool | None"):
            argument["action"] = argparse.BooleanOptionalAction
        elif each.default not in (None, dataclasses.MISSING):
            argument["help"] += f" (default: {each.default})"
        parser.add_argument("--" + each.name.replace("_", "-"), **argument)


def given(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options that were written on the command line."""
    names = {each.name for each in dataclasses.fields(Options)}
    return {name: value for name, value in vars(arguments).items() if name in names}
