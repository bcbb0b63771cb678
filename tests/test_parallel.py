"""The network over devices and over processes: losses and gradients equal the single process's."""

from __future__ import annotations

import pathlib
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastalex import models
from fastalex.models import parallel, processes
from tests.support.packaging import ROOT, run

IMAGES, CLASSES = 4, 8


def small_network(**changes: Any) -> models.AlexNet:
    """Two towers over 32x32 images, with hidden layers and no dropout, whose masks would differ."""
    torch.manual_seed(5)
    options = {"towers": 2, "hidden": 16, "lrn": {"alpha": 0.1}, "num_classes": CLASSES, **changes}
    return models.alexnet("cifar10", **options)


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(6)
    images = torch.randn(IMAGES, 3, 32, 32, generator=generator)
    return images, torch.randint(0, CLASSES, (IMAGES,), generator=generator)


def step(net: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
    loss = F.cross_entropy(net(images), targets)
    loss.backward()
    return loss.detach()


def reference_step(**changes: Any) -> tuple[Tensor, dict[str, Tensor]]:
    net = small_network(**changes)
    loss = step(net, *batch())
    return loss, {name: p.grad for name, p in net.named_parameters()}


def reference_state() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The network and its optimiser after a step."""
    net = small_network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    step(net, *batch())
    optimizer.step()
    return net.state_dict(), optimizer.state_dict()["state"]


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """By the names that the parameters have in the network."""
    found = {}
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        found[processes._plain(name)] = parameter.grad.clone()
    return found


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """1e-5 relative, by norm: sums in another order, over a handful of layers."""
    assert actual.keys() == expected.keys()
    for name, wanted in expected.items():
        error = (actual[name] - wanted).norm() / wanted.norm().clamp_min(1e-12)
        assert error < 1e-5, (name, error)


@pytest.mark.parametrize(
    "changes", [{}, {"norm": "batchnorm", "lrn": None}, {"activation": "tanh"}]
)
def test_towers_on_devices(changes: dict[str, Any]) -> None:
    loss, expected = reference_step(**changes)
    net = small_network(**changes)
    towers = net.parallelize(["cpu", "cpu"])
    assert torch.allclose(step(towers, *batch()), loss, rtol=1e-6)
    stacks = ((towers.features[i], towers.classifier[i]) for i in (0, 1))
    found = [
        gradients(nn.ModuleDict({"features": features, "classifier": classifier}))
        for features, classifier in stacks
    ]
    assert_close(parallel.merge(found), expected)
    merged = towers.merged_state_dict()
    assert merged.keys() == net.state_dict().keys()
    if not changes:
        for key, value in net.state_dict().items():
            assert torch.equal(merged[key], value)


@pytest.mark.parametrize("preset", ["paper", "pretrain6"])
def test_the_papers_network_in_two_halves(preset: str) -> None:
    """Each half has half of every layer: 30 million weights, and the same logits."""
    net = models.alexnet(preset).eval()
    towers = net.parallelize(["cpu", "cpu"])
    halves = (nn.ModuleList([towers.features[i], towers.classifier[i]]) for i in (0, 1))
    sizes = [sum(p.numel() for p in half.parameters()) for half in halves]
    assert sizes[0] == sizes[1]
    assert sum(sizes) == sum(p.numel() for p in net.parameters())
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        expected = net(images)
        assert (towers(images) - expected).norm() / expected.norm() < 1e-5


@pytest.mark.parametrize(
    ("preset", "changes", "message"),
    [
        ("single", {}, "1 towers, and there are 2"),
        ("caffenet", {}, "normalises inside each tower"),
        ("paper", {"num_classes": 7}, "the 7 outputs of fc8 do not divide"),
    ],
)
def test_what_cannot_be_split_says_why(preset: str, changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        models.alexnet(preset, hidden=16, **changes).parallelize(["cpu", "cpu"])


def test_processes_need_a_group() -> None:
    with pytest.raises(RuntimeError, match="torchrun"):
        processes.Hybrid(small_network())


@pytest.mark.parametrize(
    ("split", "ranks"),
    [("towers", 2), ("data", 2), ("data", 4), ("hybrid", 2), ("hybrid", 4), ("towers_data", 4)],
)
def test_processes(split: str, ranks: int, tmp_path: pathlib.Path) -> None:
    """Each rank writes its loss and gradients under torchrun, on gloo."""
    command = [
        *(
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={ranks}",
        ),
        *("-m", "tests.support.parallel_rank", split, str(tmp_path)),
    ]
    result = run(command, ROOT, OMP_NUM_THREADS="1")
    assert result.code == 0, result.text
    shares = [torch.load(tmp_path / f"{rank}.pt") for rank in range(ranks)]
    loss, expected = reference_step()
    mean = torch.stack([share["loss"] for share in shares]).mean()
    assert torch.allclose(mean, loss, rtol=1e-6)
    if split == "towers_data":  # ranks 0 and 1 are a pair, and hold what 2 and 3 hold
        for one, other in ((0, 2), (1, 3)):
            assert_close(shares[one]["gradients"], shares[other]["gradients"])
        shares = shares[:2]
    found = [share["gradients"] for share in shares]
    if split == "hybrid":
        merged = parallel.merge(found)
        # Every rank has the whole convolutions, and the same gradients of them.
        for share in found:
            merged |= {name: grad for name, grad in share.items() if name.startswith("features.")}
            assert_close(merged, expected)
    elif split == "data":
        for share in found:
            assert_close(share, expected)
    else:
        assert_close(parallel.merge(found), expected)
    model, kept = reference_state()
    for share in shares:  # the whole state, on every rank
        assert_close(share["model"], model)
        velocities = {
            str(i): one["momentum_buffer"] for i, one in share["optimizer"]["state"].items()
        }
        assert_close(velocities, {str(i): one["momentum_buffer"] for i, one in kept.items()})
    moved = {share["bytes_received"] for share in shares}
    assert len(moved) == 1
    assert (moved != {0}) == (split != "data")  # replicas exchange no maps
