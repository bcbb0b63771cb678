"""Networks of torchvision in the trainer, stochastic depth on their residual paths, and what options refuse."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("rich")
pytest.importorskip("sklearn")

from torch import Tensor, nn
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.ops import StochasticDepth

import fastalex
from fastalex import models
from fastalex.train import Options, Trainer, TrainingError, build, compare
from fastalex.train.__main__ import main
from fastalex.train.data import load
from fastalex.train.runtime import make_deterministic
from fastalex.train.screen import Screen
from fastalex.train.statistics import measure
from tests.support import train_tiny


def drops(model: nn.Module) -> list[float]:
    return [module.p for module in model.modules() if isinstance(module, StochasticDepth)]


def residual_network(stock: bool = False) -> nn.Module:
    """Torchvision's smallest: four blocks with residual paths, which are dropped with up to one half."""
    torch.manual_seed(3)
    blocks = [CNBlockConfig(16, 24, 2), CNBlockConfig(24, None, 2)]
    model = ConvNeXt(blocks, stochastic_depth_prob=0.5, layer_scale=0.5, num_classes=3)
    if not stock:
        fastalex.optimize(model)
    return model


def test_stochastic_depth_is_an_option_of_torchvisions_networks() -> None:
    """Paths are dropped ever more often with depth, up to the option's probability."""
    model = build.make_model(
        Options(preset="efficientnet_b0", set=["stochastic_depth_prob=0.5"]), 7
    )
    found = drops(model)
    assert found == sorted(found)
    assert 0.4 < found[-1] < 0.5
    assert not any(drops(build.make_model(Options(preset="resnet18"), 7)))


def test_networks_with_stochastic_depth_train(tmp_path: Path) -> None:
    options = train_tiny.options(epochs=8, lr=0.02)
    make_deterministic(options)
    model = residual_network()
    run = Trainer(model, train_tiny.data(), options, tmp_path, screen=Screen(quiet=True))
    run.fit()
    assert run.history[-1]["train_loss"] < 0.8 * run.history[0]["train_loss"]
    assert 0 <= run.history[0]["waited"] < 1


def test_stochastic_depth_drops_paths_in_training_alone() -> None:
    model, images = residual_network(), torch.randn(32, 3, 12, 12)
    seen: list[Tensor] = []
    deepest = [module for module in model.modules() if isinstance(module, StochasticDepth)][-1]
    deepest.register_forward_hook(lambda module, given, result: seen.append(result.clone()))
    with torch.no_grad():
        for training in (True, False):
            model.train(training)(images)
    dropped, kept = ((path == 0).flatten(1).all(1) for path in seen)
    assert 0 < dropped.sum() < 32
    assert not kept.any()


def test_fused_and_stock_drop_the_same_paths_and_have_the_same_losses() -> None:
    """As near to float64 as twice what the stock network's own roundings are, with the same seed."""
    options = train_tiny.options(lr=0.02)
    data = train_tiny.data()
    networks = {"fused": residual_network()}
    networks |= {name: residual_network(stock=True) for name in ("stock", "planes", "exact")}
    networks["exact"].double()
    prepare: dict[str, Callable[[Tensor], Tensor]] = {
        "fused": lambda x: x,
        "stock": lambda x: x,
        "planes": lambda x: x.contiguous(),
        "exact": lambda x: x.double(),
    }
    before = fastalex.get_conv_precision()
    fastalex.set_conv_precision("highest")
    try:
        found = measure(data.train, levels=False)
        losses, _ = compare.train_together(networks, data, options, found, 5, prepare)
    finally:
        fastalex.set_conv_precision(before)
    exact = torch.tensor(losses.pop("exact"), dtype=torch.float64)
    errors = {
        name: (torch.tensor(each, dtype=torch.float64) - exact).abs().cummax(0).values
        for name, each in losses.items()
    }
    eps = torch.finfo(torch.float32).eps
    allowed = 2 * torch.maximum(errors["stock"], errors["planes"]) + 4 * eps * exact
    assert (errors["fused"] <= allowed).all(), (errors, allowed)
    assert len(exact.unique()) == 5


@pytest.mark.parametrize(
    ("preset", "head"),
    [("resnet18", "fc"), ("squeezenet1_1", "classifier.1"), ("cifar10", "classifier.fc8")],
)
def test_the_head_is_the_last_layer(preset: str, head: str) -> None:
    model = build.make_model(Options(preset=preset), 7)
    assert build.head(model) == head
    assert model.get_submodule(head).weight.shape[0] == 7


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--preset", "resnet18", "--set", "stochastic_depth_prob=0.5"],
            "--preset resnet18: .*stochastic_depth_prob",
        ),
        (["--preset", "resnet18", "--parallel", "data"], "--parallel data needs processes"),
        (["--preset", "paper", "--crop", "64"], "paper does not take crops of 64x64 pixels"),
        (["--preset", "torchvision"], "torchvision does not take crops of 32x32 pixels"),
        (["--batch", "0"], "--batch is 0; it must be at least 1"),
        (["--epochs", "0"], "--epochs is 0; it must be at least 1"),
        (["--max-corrupt", "nan"], "--max-corrupt is nan; it must be at least 0"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_does_not_go_together_is_told_before_the_run(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, words: list[str], message: str
) -> None:
    assert main([*words, "--out", str(tmp_path / "run")]) == 1
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


def test_processes_take_fastalexs_networks_alone() -> None:
    options = Options(preset="resnet18", parallel="data")
    with pytest.raises(
        TrainingError, match=r"--parallel data is for the presets of fastalex.models"
    ):
        build.spread(nn.Linear(1, 1), options)


def test_presets_bring_their_crop() -> None:
    chosen = Options(preset="paper")
    load(chosen)
    assert chosen.crop == 227
    assert isinstance(build.make_model(Options(preset="cifar10"), 3), models.AlexNet)
