"""Fused against stock: the same weights, batches and dropout through both networks, taking turns."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fastalex.train.batches import Pipeline, TrainingBatches, make_loader, mixed_seed
from fastalex.train.build import make_model
from fastalex.train.data import Data
from fastalex.train.options import Options
from fastalex.train.recipe import make_optimizer
from fastalex.train.runtime import choose_device
from fastalex.train.statistics import Statistics


def twins(options: Options, classes: int) -> dict[str, nn.Module]:
    """The network on fastalex's layers and on torch's, with the same weights."""
    networks: dict[str, nn.Module] = {}
    for name, stock in (("fused", False), ("stock", True)):
        chosen = copy.copy(options)
        chosen.stock = stock
        torch.manual_seed(options.seed)
        networks[name] = make_model(chosen, classes)
    networks["stock"].load_state_dict(networks["fused"].state_dict())
    return networks


def train_together(
    networks: dict[str, nn.Module],
    data: Data,
    options: Options,
    statistics_: Statistics,
    steps: int,
    prepare: dict[str, Callable[[torch.Tensor], torch.Tensor]] | None = None,
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """(losses, seconds) of ``steps`` training steps by network; ``prepare`` may change what a network is given.

    A batch is ready before its steps are timed, as it is where worker processes keep ahead of the network.
    """
    device = choose_device(options.device)
    pipeline = Pipeline(options, statistics_, len(data.classes))
    batches = TrainingBatches(data.train, pipeline, options.batch or 1, options.seed)
    positions = [divmod(step, len(batches)) for step in range(steps)]
    optimizers = {
        name: make_optimizer(net.to(device).train(), options) for name, net in networks.items()
    }
    losses: dict[str, list[float]] = {name: [] for name in networks}
    seconds: dict[str, list[float]] = {name: [] for name in networks}
    loader = make_loader(batches, options.workers or 0, positions)
    for step, batch in enumerate(loader):
        images, labels = batch.images.to(device), batch.labels.to(device)
        for name, net in networks.items():
            given = prepare[name](images) if prepare else images
            torch.manual_seed(mixed_seed(options.seed, 0, step))  # the same dropout for all
            began = time.perf_counter()
            optimizers[name].zero_grad(set_to_none=True)
            with torch.autocast(device.type, torch.bfloat16, enabled=options.amp == "bf16"):
                loss = F.cross_entropy(net(given), labels)
            loss.backward()
            optimizers[name].step()
            losses[name].append(loss.item())
            seconds[name].append(time.perf_counter() - began)
    return losses, seconds


def compare(options: Options, data: Data, statistics_: Statistics, steps: int) -> dict[str, Any]:
    """The losses and the images a second of both networks; the first two steps are not timed."""
    networks = twins(options, len(data.classes))
    losses, seconds = train_together(networks, data, options, statistics_, steps)
    warm = {name: each[2:] or each for name, each in seconds.items()}
    ratios = [stock / fused for stock, fused in zip(warm["stock"], warm["fused"], strict=True)]
    rates = {name: (options.batch or 1) / statistics.median(each) for name, each in warm.items()}
    pairs = zip(losses["fused"], losses["stock"], strict=True)
    return {
        "fused_loss": losses["fused"],
        "stock_loss": losses["stock"],
        "fused_rate": rates["fused"],
        "stock_rate": rates["stock"],
        "speedup": statistics.median(ratios),
        "largest_difference": max(abs(a - b) for a, b in pairs),
    }
