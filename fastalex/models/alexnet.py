"""The AlexNet of the paper, in two towers or one, on fastalex's layers or on torch.nn's."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastalex.ops import Conv2dReLU, LRNMaxPool2d, MaxPool2d

#: Section 3.3 of the paper.
LRN = {"size": 5, "alpha": 1e-4, "beta": 0.75, "k": 2.0}

#: Weight standard deviation of every layer, and the layers whose bias starts at one.
INITIALISATIONS: dict[str, tuple[dict[str, float], tuple[str, ...]]] = {
    # Section 5: N(0, 0.01) everywhere. The loss can start flat.
    "paper": ({}, ("conv2", "conv4", "conv5", "fc6", "fc7")),
    # The author's own code widens conv3 to conv5, and trains from the first step.
    "cuda-convnet2": (
        {"conv3": 0.03, "conv4": 0.03, "conv5": 0.03},
        ("conv2", "conv4", "conv5", "fc6", "fc7"),
    ),
}


class TowerLocalResponseNorm(nn.LocalResponseNorm):
    """torch.nn's LRN inside each of ``groups`` towers, by folding the towers into the batch."""

    def __init__(self, groups: int, **lrn: Any) -> None:
        super().__init__(**lrn)
        self.groups = groups

    def forward(self, input: Tensor) -> Tensor:
        towers = input.unflatten(1, (self.groups, -1)).flatten(0, 1)
        normalised: Tensor = super().forward(towers).unflatten(0, (-1, self.groups))
        return normalised.flatten(1, 2)


def _convolution(fused: bool, *args: Any, **kwargs: Any) -> tuple[nn.Module, nn.Module]:
    """A convolution and its ReLU: one layer and a placeholder, or the stock pair."""
    if fused:
        return Conv2dReLU(*args, **kwargs), nn.Identity()
    return nn.Conv2d(*args, **kwargs), nn.ReLU()


def _norm_and_pool(fused: bool, towers: int) -> tuple[nn.Module, nn.Module]:
    if fused:
        return nn.Identity(), LRNMaxPool2d(**LRN, kernel_size=3, stride=2, groups=towers)  # type: ignore[arg-type]
    return TowerLocalResponseNorm(towers, **LRN), nn.MaxPool2d(3, 2)


class AlexNet(nn.Module):
    """AlexNet: ImageNet Classification with Deep Convolutional Neural Networks (Krizhevsky et al., 2012).

    Args:
        num_classes: outputs of the last layer.
        towers: groups of conv2, conv4, conv5 and of the normalisation: 2 as on the paper's two GPUs (60,965,224
            parameters), or 1 (62,378,344).
        dropout: probability after each hidden fully connected layer, 0.5 in the paper.
        fused: fastalex's layers, or torch.nn's in the same module tree: the stock model. State dicts are
            interchangeable.
        init: ``"cuda-convnet2"`` (the author's code; trains from the first step) or ``"paper"`` (section 5 literally).

    Input: [N, 3, 227, 227], or [N, 3, 224, 224], which is zero-padded by 3 on the right and at the bottom (the
    original code's ceil sizing). Output: logits [N, num_classes].

    Raises:
        ValueError: for towers other than 1 or 2, an unknown init, or an input of another size.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        *,
        towers: int = 2,
        dropout: float = 0.5,
        fused: bool = True,
        init: str = "cuda-convnet2",
    ) -> None:
        super().__init__()
        if towers not in (1, 2):
            raise ValueError(f"towers is {towers}; it can be 1 or 2")
        if init not in INITIALISATIONS:
            raise ValueError(f"init is {init!r}; it can be one of {', '.join(INITIALISATIONS)}")
        self.towers = towers
        self.fused = fused
        self.features = nn.Sequential(self._features())
        self.classifier = nn.Sequential(self._classifier(num_classes, dropout))
        self._initialise(*INITIALISATIONS[init])

    def _features(self) -> OrderedDict[str, nn.Module]:
        fused, towers = self.fused, self.towers
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        layers["conv1"], layers["relu1"] = _convolution(fused, 3, 96, 11, stride=4)
        layers["norm1"], layers["pool1"] = _norm_and_pool(fused, towers)
        layers["conv2"], layers["relu2"] = _convolution(fused, 96, 256, 5, padding=2, groups=towers)
        layers["norm2"], layers["pool2"] = _norm_and_pool(fused, towers)
        layers["conv3"], layers["relu3"] = _convolution(fused, 256, 384, 3, padding=1)
        layers["conv4"], layers["relu4"] = _convolution(
            fused, 384, 384, 3, padding=1, groups=towers
        )
        layers["conv5"], layers["relu5"] = _convolution(
            fused, 384, 256, 3, padding=1, groups=towers
        )
        layers["pool5"] = (MaxPool2d if fused else nn.MaxPool2d)(3, 2)
        return layers

    def _classifier(self, num_classes: int, dropout: float) -> OrderedDict[str, nn.Module]:
        return OrderedDict(
            fc6=nn.Linear(256 * 6 * 6, 4096),
            relu6=nn.ReLU(inplace=self.fused),
            drop6=nn.Dropout(dropout),
            fc7=nn.Linear(4096, 4096),
            relu7=nn.ReLU(inplace=self.fused),
            drop7=nn.Dropout(dropout),
            fc8=nn.Linear(4096, num_classes),
        )

    @torch.no_grad()
    def _initialise(self, deviations: dict[str, float], bias_one: tuple[str, ...]) -> None:
        for name, layer in (*self.features.named_children(), *self.classifier.named_children()):
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                nn.init.normal_(layer.weight, std=deviations.get(name, 0.01))
                if layer.bias is not None:
                    nn.init.constant_(layer.bias, 1.0 if name in bias_one else 0.0)

    def forward(self, input: Tensor) -> Tensor:
        size = tuple(input.shape[1:])
        if size == (3, 224, 224):
            input = F.pad(input, (0, 3, 0, 3))
        elif size != (3, 227, 227):
            raise ValueError(
                f"AlexNet takes [N, 3, 227, 227] or [N, 3, 224, 224], got {tuple(input.shape)}"
            )
        if self.fused:
            input = input.contiguous(memory_format=torch.channels_last)
        logits: Tensor = self.classifier(self.features(input).flatten(1))
        return logits


PRESETS: dict[str, dict[str, Any]] = {"paper": {"towers": 2}, "single": {"towers": 1}}


def alexnet(name: str = "paper", **changes: Any) -> AlexNet:
    """A network by name: ``"paper"`` (two towers) or ``"single"`` (one); ``changes`` go to :class:`AlexNet`."""
    if name not in PRESETS:
        raise ValueError(f"no preset '{name}'; there are {', '.join(PRESETS)}")
    return AlexNet(**{**PRESETS[name], **changes})
