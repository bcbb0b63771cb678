"""Network in Network: perceptrons of 1x1 convolutions, and the mean of each map in place of hidden layers."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from fastalex.models._layers import convolution, images, max_pool

#: For each block: the convolution (channels, kernel, stride, padding), the channels of the two 1x1 convolutions after
#: it (0: one for each class), and the pool that ends the block.
_BLOCKS = {
    "imagenet": (
        (96, 11, 4, 0, (96, 96), "max"),
        (256, 5, 1, 2, (256, 256), "max"),
        (384, 3, 1, 1, (384, 384), "max"),
        (1024, 3, 1, 1, (1024, 0), ""),
    ),
    "cifar10": (
        (192, 5, 1, 2, (160, 96), "max"),
        (192, 5, 1, 2, (192, 192), "mean"),
        (192, 3, 1, 1, (192, 0), ""),
    ),
}
#: Blocks that dropout follows, counted from one.
_DROPS = {"imagenet": (3,), "cifar10": (1, 2)}
#: Without a fully connected layer the ImageNet network takes any size.
_SIDES = {"imagenet": (), "cifar10": (32,)}


class NetworkInNetwork(nn.Module):
    """Network In Network (Lin, Chen and Yan, 2013): the authors' ImageNet network, or their CIFAR-10 one.

    ==============  ==============================  =====================  ==============================
    block           imagenet (7,595,176)            output at 224          cifar10 (966,986), output
    ==============  ==============================  =====================  ==============================
    conv1, cccp1-2  11x11/4: 96; 1x1: 96, 96        96 x 54, pool 27       5x5: 192, 160, 96; 32, pool 16
    conv2, cccp3-4  5x5: 256; 1x1: 256, 256         256 x 27, pool 13      5x5: 192, 192, 192; 16, mean 8
    conv3, cccp5-6  3x3: 384; 1x1: 384, 384         384 x 13, pool 6       3x3: 192, 192, classes; 8
    conv4, cccp7-8  3x3: 1024; 1x1: 1024, classes   classes x 6
    head            mean of each map                classes                classes
    ==============  ==============================  =====================  ==============================

    Every convolution is followed by a ReLU, the last included. Names are those of the authors' Caffe files; pools are
    3x3, two apart, sized by ceil. Weights start as He et al. (2015) have it for ReLUs.

    Args:
        num_classes: outputs; 1000 or 10 by default.
        variant: ``"imagenet"`` or ``"cifar10"``.
        dropout: probability, before the last block in ``"imagenet"`` and after each pool in ``"cifar10"``.
        fused: fastalex's layers, or torch.nn's in the same module tree.

    Input: [N, 3, H, W], 224x224 in training; [N, 3, 32, 32] for ``"cifar10"``. Output: logits [N, num_classes].

    Raises:
        ValueError: for an unknown variant, or an input of another size.
    """

    def __init__(
        self,
        num_classes: int | None = None,
        *,
        variant: str = "imagenet",
        dropout: float = 0.5,
        fused: bool = True,
    ) -> None:
        super().__init__()
        if variant not in _BLOCKS:
            raise ValueError(f"variant is {variant!r}; it can be one of {', '.join(_BLOCKS)}")
        if num_classes is None:
            num_classes = {"imagenet": 1000, "cifar10": 10}[variant]
        self.variant = variant
        self.fused = fused
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        inputs = 3
        for n, (channels, kernel, stride, padding, mixed, pool) in enumerate(_BLOCKS[variant], 1):
            layers[f"conv{n}"], layers[f"relu{n}"] = convolution(
                fused, "relu", inputs, channels, kernel, stride, padding
            )
            inputs = channels
            for m, outputs in enumerate(mixed, 2 * n - 1):
                outputs = outputs or num_classes
                layers[f"cccp{m}"], layers[f"relu_cccp{m}"] = convolution(
                    fused, "relu", inputs, outputs, 1
                )
                inputs = outputs
            if pool == "max":
                layers[f"pool{n}"] = max_pool(fused, "overlapping", ceil_mode=True)
            elif pool == "mean":
                layers[f"pool{n}"] = nn.AvgPool2d(3, 2, ceil_mode=True)
            if n in _DROPS[variant]:
                layers[f"drop{n}"] = nn.Dropout(dropout)
        self.features = nn.Sequential(layers)
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def caffe_name(self, module: str) -> str:
        """The name in the authors' Caffe file of the layer at ``module``."""
        name = module.rpartition(".")[2]
        last = self.variant == "imagenet" and name in ("conv4", "cccp7", "cccp8")
        return f"{name}-1024" if last else name

    def forward(self, input: Tensor) -> Tensor:
        input = images(input, "NetworkInNetwork", _SIDES[self.variant], self.fused)
        logits: Tensor = self.features(input).mean((2, 3))
        return logits
