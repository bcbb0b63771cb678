"""What the tests of ``fastalex.optimize`` share: statistics worth folding, and when two models are equal."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

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
