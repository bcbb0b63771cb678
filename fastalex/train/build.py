"""From options to what a run needs: data, network, trainer."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from fastalex import models
from fastalex.models.processes import SPLITS
from fastalex.train import checkpoint
from fastalex.train.data import Data, load
from fastalex.train.errors import TrainingError
from fastalex.train.options import Options
from fastalex.train.screen import Screen
from fastalex.train.trainer import Trainer, choose_device, make_deterministic


def make_model(options: Options, classes: int) -> models.AlexNet:
    """The network that ``options`` name, newly initialised."""
    assert options.preset is not None
    arguments = {"num_classes": classes, "fused": not options.stock, **options.model_arguments()}
    try:
        return models.alexnet(options.preset, **arguments)
    except (TypeError, ValueError) as failure:
        raise TrainingError(f"--preset {options.preset}: {failure}") from failure


def new_folder(options: Options) -> Path:
    return Path("out/train") / f"{options.data}-{time.strftime('%Y%m%d-%H%M%S')}"


def start(options: Options, folder: Path | None = None, screen: Screen | None = None) -> Trainer:
    """A trainer for a new run.

    Raises:
        TrainingError: where the folder holds a run already.
    """
    join_processes(options)
    folder = folder or agreed_folder(options)
    if (folder / checkpoint.LAST).exists():
        raise TrainingError(
            f"{folder} holds a run already: go on with --resume {folder}, or give another --out"
        )
    make_deterministic(options)
    data = load(options)
    return Trainer(
        spread(_network(options, data, screen), options), data, options, folder, screen=screen
    )


def join_processes(options: Options) -> None:
    """Meets the other processes that torchrun started: gloo on CPUs, NCCL on GPUs.

    Raises:
        TrainingError: where --parallel asks for processes and torchrun started none.
    """
    if options.parallel == "none" or dist.is_initialized():
        return
    if "RANK" not in os.environ:
        raise TrainingError(
            f"--parallel {options.parallel} needs processes: start with torchrun --nproc-per-node 2 "
            "-m fastalex.train ..."
        )
    device = choose_device(options.device)
    if device.type == "cuda":  # one GPU a process
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")


def agreed_folder(options: Options) -> Path:
    """The folder of a new run, the first process's where there are several: the clock names it."""
    names = [str(new_folder(options))]
    if options.parallel != "none":
        dist.broadcast_object_list(names)
    return Path(names[0])


def spread(model: models.AlexNet, options: Options) -> nn.Module:
    """The network over the processes, as --parallel says.

    Raises:
        TrainingError: where it does not divide among them.
    """
    if options.parallel == "none":
        return model
    model = model.to(choose_device(options.device))
    try:
        return SPLITS[options.parallel](model)
    except ValueError as failure:
        raise TrainingError(f"--parallel {options.parallel}: {failure}") from failure


def _network(options: Options, data: Data, screen: Screen | None) -> models.AlexNet:
    """The network of a run; its weights are new, or those of the checkpoint it starts from."""
    model = make_model(options, len(data.classes))
    if options.start is not None:
        state = checkpoint.load(options.start)
        other_classes = state["classes"] != data.classes
        kept = take_weights(model, state["model"], head(model) if other_classes else "")
        if screen is not None:
            screen.say(
                f"starting from {options.start}; newly drawn: {', '.join(kept) or 'nothing'}"
            )
    return model


def head(model: nn.Module) -> str:
    """The path of the last linear layer: what names the classes."""
    paths = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    return str(paths[-1])


def take_weights(model: nn.Module, weights: dict[str, Any], without: str = "") -> list[str]:
    """Loads the weights whose name and shape fit, and returns the layers that keep their own.

    ``without`` names a layer that keeps its own in any case: a head that knew other classes.

    Raises:
        TrainingError: where none fits.
    """
    own = model.state_dict()
    fitting = {
        name: value
        for name, value in weights.items()
        if name in own and own[name].shape == value.shape and name.rpartition(".")[0] != without
    }
    if not fitting:
        raise TrainingError(
            "no weight of the checkpoint fits this network; give its --preset and --set"
        )
    model.load_state_dict(fitting, strict=False)
    return sorted({name.rpartition(".")[0] for name in own if name not in fitting})


def resume(folder: Path, changes: dict[str, Any], screen: Screen | None = None) -> Trainer:
    """A trainer that goes on where the run in ``folder`` stopped; ``changes`` override its options."""
    path = folder / "options.json"
    try:
        saved = json.loads(path.read_text())
    except FileNotFoundError as failure:
        raise TrainingError(f"{folder} holds no run: {path} is missing") from failure
    options = dataclasses.replace(Options(**saved), **changes)
    join_processes(options)
    make_deterministic(options)
    data: Data = load(options)
    # A checkpoint holds every weight: what the run once started from may be gone.
    begun = (folder / checkpoint.LAST).exists()
    model = make_model(options, len(data.classes)) if begun else _network(options, data, screen)
    trainer = Trainer(spread(model, options), data, options, folder, screen=screen)
    if not trainer.resume():
        trainer.screen.say(f"{folder} has no checkpoint yet: starting from the beginning")
    return trainer
