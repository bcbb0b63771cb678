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

import fastalex
from fastalex import models
from fastalex.models.alexnet import PRESETS
from fastalex.models.processes import SPLITS
from fastalex.train import checkpoint
from fastalex.train.data import Data, load
from fastalex.train.errors import TrainingError, extra
from fastalex.train.options import Options
from fastalex.train.runtime import choose_device, make_deterministic
from fastalex.train.screen import Screen
from fastalex.train.trainer import Trainer


def make_model(options: Options, classes: int) -> nn.Module:
    """The network that ``options`` name, newly initialised: one of fastalex's, or torchvision's on its operators."""
    assert options.preset is not None
    arguments = {"num_classes": classes, **options.model_arguments()}
    try:
        if options.preset in PRESETS:
            return models.alexnet(options.preset, fused=not options.stock, **arguments)
        return _torchvision_network(options, arguments)
    except (TypeError, ValueError) as failure:
        raise TrainingError(f"--preset {options.preset}: {failure}") from failure


def _torchvision_network(options: Options, arguments: dict[str, Any]) -> nn.Module:
    zoo = extra("torchvision.models")
    if options.preset not in zoo.list_models(module=zoo):
        raise ValueError(
            f"no preset '{options.preset}', nor a network of torchvision's; there are {', '.join(PRESETS)}"
        )
    if options.preset in ("googlenet", "inception_v3"):  # one loss, one head
        arguments = {"aux_logits": False, "init_weights": True, **arguments}
    model: nn.Module = zoo.get_model(options.preset, **arguments)
    if not options.stock:
        fastalex.optimize(model)
    return model


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


def spread(model: nn.Module, options: Options) -> nn.Module:
    """The network over the processes, as --parallel says.

    Raises:
        TrainingError: where it does not divide among them.
    """
    if options.parallel == "none":
        return model
    if not isinstance(model, models.AlexNet):
        raise TrainingError(
            f"--parallel {options.parallel} is for the presets of fastalex.models, not for {options.preset}"
        )
    model = model.to(choose_device(options.device))
    try:
        return SPLITS[options.parallel](model)
    except ValueError as failure:
        raise TrainingError(f"--parallel {options.parallel}: {failure}") from failure


def _network(options: Options, data: Data, screen: Screen | None) -> nn.Module:
    """The network of a run; its weights are new, or those of the checkpoint it starts from."""
    model = make_model(options, len(data.classes))
    _require_fit(model, options)
    if options.start is not None:
        state = checkpoint.load(options.start)
        other_classes = state["classes"] != data.classes
        kept = take_weights(model, state["model"], head(model) if other_classes else "")
        if screen is not None:
            screen.say(
                f"starting from {options.start}; newly drawn: {', '.join(kept) or 'nothing'}"
            )
    return model


def _require_fit(model: nn.Module, options: Options) -> None:
    """Raises where the network does not take the crops: before a run, and not in the middle of its first step."""
    crop = options.crop or 0
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, 3, crop, crop))
    except (ValueError, RuntimeError) as failure:
        raise TrainingError(
            f"--preset {options.preset} does not take crops of {crop}x{crop} pixels: {failure}. Give another --crop"
        ) from failure


def head(model: nn.Module) -> str:
    """The path of the last layer with weights (in SqueezeNet a convolution): what names the classes."""
    layers = (nn.Linear, nn.Conv2d)
    return str([path for path, module in model.named_modules() if isinstance(module, layers)][-1])


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
