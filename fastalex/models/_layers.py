"""What the networks are assembled from: each piece on fastalex's layers, or on torch.nn's in the same tree."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastalex import ops
from fastalex._geometry import pooled_size
from fastalex.ops import Conv2dReLU, Linear, LinearReLU, LocalResponseNorm, LRNMaxPool2d, MaxPool2d

ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh}
NORMS = ("lrn", "batchnorm", "none")

#: kernel_size and stride of each pooling. Section 3.4 of the paper compares the first two.
POOLS = {"overlapping": (3, 2), "plain": (2, 2), "fractional": (3, 2)}


class TowerLocalResponseNorm(nn.LocalResponseNorm):
    """torch.nn's LRN inside each of ``groups`` towers, by folding the towers into the batch."""

    def __init__(self, groups: int, **lrn: Any) -> None:
        super().__init__(**lrn)
        self.groups = groups

    def forward(self, input: Tensor) -> Tensor:
        towers = input.unflatten(1, (self.groups, -1)).flatten(0, 1)
        normalised: Tensor = super().forward(towers).unflatten(0, (-1, self.groups))
        return normalised.flatten(1, 2)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, groups={self.groups}"  # type: ignore[no-untyped-call]


class FractionalMaxPool2d(nn.Module):
    """Fractional max-pooling (Graham, 2014) to the size that an ordinary pool of the same geometry would give.

    The 3x3 windows start at pseudo-random places in training, and at the places of a draw of one half in evaluation,
    so that predictions repeat.
    """

    def __init__(self, kernel_size: int, stride: int, ceil_mode: bool = False) -> None:
        super().__init__()
        self.kernel_size = kernel_size
        self.stride = stride
        self.ceil_mode = ceil_mode

    def forward(self, input: Tensor) -> Tensor:
        sides = [
            pooled_size(side, self.kernel_size, self.stride, 0, 1, self.ceil_mode)
            for side in input.shape[-2:]
        ]
        draws = None if self.training else input.new_full((*input.shape[:2], 2), 0.5)
        pooled: Tensor = F.fractional_max_pool2d(
            input, self.kernel_size, output_size=sides, _random_samples=draws
        )
        return pooled

    def extra_repr(self) -> str:
        return f"{self.kernel_size}, stride={self.stride}, ceil_mode={self.ceil_mode}"


class DropConnectLinear(nn.Linear):
    """A linear layer whose weights, not its outputs, are dropped in training (DropConnect, Wan et al., 2013).

    One mask a batch; kept weights are scaled by 1 / (1 - p), so that evaluation needs no change.
    """

    def __init__(self, in_features: int, out_features: int, p: float, fused: bool) -> None:
        super().__init__(in_features, out_features)
        self.p = p
        self.fused = fused

    def forward(self, input: Tensor) -> Tensor:
        kept = F.dropout(self.weight, self.p, self.training)
        output: Tensor = (ops.linear if self.fused else F.linear)(input, kept, self.bias)
        return output

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, p={self.p}"


def convolution(
    fused: bool, activation: str, *args: Any, **kwargs: Any
) -> tuple[nn.Module, nn.Module]:
    """A convolution and its activation: one layer and a placeholder where that exists, or the stock pair."""
    if fused and activation == "relu":
        return Conv2dReLU(*args, **kwargs), nn.Identity()
    return nn.Conv2d(*args, **kwargs), ACTIVATIONS[activation]()


def conv_relu(fused: bool, *args: Any, **kwargs: Any) -> nn.Sequential:
    """A convolution and its ReLU as one child of a network, with the weight at ``conv.weight``."""
    conv, relu = convolution(fused, "relu", *args, **kwargs)
    return nn.Sequential(OrderedDict(conv=conv, relu=relu))


def linear(
    fused: bool, activation: str, inputs: int, outputs: int, dropconnect: float = 0.0
) -> tuple[nn.Module, nn.Module]:
    """A fully connected layer and its activation, as above; DropConnect has no fused layer."""
    if fused and activation == "relu" and not dropconnect:
        return LinearReLU(inputs, outputs), nn.Identity()
    layer = (
        DropConnectLinear(inputs, outputs, dropconnect, fused)
        if dropconnect
        else (Linear if fused else nn.Linear)(inputs, outputs)
    )
    return layer, ACTIVATIONS[activation]()


def max_pool(fused: bool, kind: str, ceil_mode: bool = False) -> nn.Module:
    if kind == "fractional":
        return FractionalMaxPool2d(*POOLS[kind], ceil_mode=ceil_mode)
    return pool_layer(fused)(*POOLS[kind], ceil_mode=ceil_mode)


def pool_layer(fused: bool) -> type[nn.MaxPool2d]:
    return MaxPool2d if fused else nn.MaxPool2d


def local_response_norm(fused: bool, lrn: dict[str, Any]) -> nn.Module:
    if fused:
        return LocalResponseNorm(**lrn)
    across = {name: value for name, value in lrn.items() if name != "groups"}
    groups = lrn.get("groups", 1)
    return (
        nn.LocalResponseNorm(**across) if groups == 1 else TowerLocalResponseNorm(groups, **across)
    )


def norm_and_pool(
    fused: bool, lrn: dict[str, Any], pool: str, ceil_mode: bool = False
) -> tuple[nn.Module, nn.Module]:
    """Normalisation, then pooling: a placeholder and one layer, or the pair."""
    if fused and pool != "fractional":
        kernel, stride = POOLS[pool]
        both = LRNMaxPool2d(**lrn, kernel_size=kernel, stride=stride, ceil_mode=ceil_mode)
        return nn.Identity(), both
    return local_response_norm(fused, lrn), max_pool(fused, pool, ceil_mode)


def images(input: Tensor, network: str, sides: Sequence[int], fused: bool) -> Tensor:
    """[N, 3, side, side] in the network's layout, zero-padded right and below to the first of ``sides``.

    Without sides, any height and width pass.
    """
    allowed = [(3, side, side) for side in sides]
    size = tuple(input.shape[1:])
    if input.dim() != 4 or size[0] != 3 or (sides and size not in allowed):
        shapes = " or ".join(f"[N, 3, {side}, {side}]" for side in sides) or "[N, 3, H, W]"
        raise ValueError(f"{network} takes {shapes}, got {tuple(input.shape)}")
    if sides and size != allowed[0]:
        margin = sides[0] - size[2]
        input = F.pad(input, (0, margin, 0, margin))
    return input.contiguous(memory_format=torch.channels_last) if fused else input
