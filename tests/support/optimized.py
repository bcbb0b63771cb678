"""What the tests of ``fastalex.optimize`` share: small models, statistics worth folding, and when two are equal."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import fastalex

#: In float64 only the order of sums of a few thousand terms differs, of relative error 1e-16 each.
EXACT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-12}


@torch.no_grad()
def with_statistics(model: nn.Module) -> nn.Module:
    """Gives every batch normalisation parameters and statistics that change what comes through."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2)
            module.weight.uniform_(0.5, 1.5)
            module.bias.normal_(0, 0.2)
    return model


class Functional(nn.Module):
    """Everything as functions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.weight = nn.Parameter(torch.randn(8, 8, 3, 3) / 8)
        self.fc = nn.Linear(8 * 5 * 5, 10)

    def forward(self, x, scale: float = 1.0):
        x = torch.relu(self.conv(x * scale))
        x = F.local_response_norm(x, 5, alpha=0.1)
        x = F.max_pool2d(x, 3, 2)
        x = F.relu(F.conv2d(x, self.weight, padding=1))
        return F.relu(self.fc(x.view(x.size(0), -1)))


class Residual(nn.Module):
    """A residual block whose shortcut is computed between the convolution and the addition."""

    def __init__(self, inplace: bool = True) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace)
        self.down = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))

    def forward(self, x):
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        identity = self.down(x)
        out += identity
        return self.relu(out)


class Branches(nn.Module):
    """Branches on a value, which no trace can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.body = chain()[:8]
        self.pool = nn.MaxPool2d(2)

    def forward(self, x):
        x = self.body(x)
        return self.pool(x) if x.sum() > 0 else self.pool(-x)


def chain() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.ReLU(inplace=True),
        nn.LocalResponseNorm(5, alpha=0.1),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(8, 8, 3, padding=1, groups=2, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.LocalResponseNorm(3, alpha=0.1),
        nn.ReLU(),
        nn.MaxPool2d(2, return_indices=False),
        nn.Flatten(),
        nn.Linear(8 * 2, 16),
        nn.ReLU(),
        nn.Linear(16, 4),
    )


def image(batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, 13, 21, dtype=torch.float64)


CHAIN_INPUT = (2, 3, 13, 21)


def pair(model: nn.Module, training: bool = False) -> tuple[nn.Module, nn.Module]:
    """Stock and optimised, same weights, float64, with statistics that are worth folding."""
    model = with_statistics(model.double()).train(training)
    other = copy.deepcopy(model)
    fastalex.optimize(other)
    return model, other


def equal(stock: nn.Module, fast: nn.Module, *inputs, **kwargs) -> None:
    torch.testing.assert_close(fast(*inputs, **kwargs), stock(*inputs, **kwargs), **EXACT)


MODELS = {
    "chain": (chain, (3, 13, 21)),
    "functional": (Functional, (3, 13, 13)),
    "residual": (Residual, (8, 6, 7)),
    "residual, not in place": (lambda: Residual(False), (8, 6, 7)),
    "branches": (lambda: nn.Sequential(Branches().body, nn.MaxPool2d(1)), (3, 13, 21)),
}
