"""ZFNet: AlexNet with a finer first layer, the winner of ILSVRC-2013's family."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from fastalex.models._layers import (
    convolution,
    images,
    linear,
    local_response_norm,
    max_pool,
)
from fastalex.models.alexnet import LRN
from fastalex.ops import FusedSequential, Linear

#: channels, kernel, stride, padding, and whether pooling and normalisation follow.
_CONVOLUTIONS = (
    (96, 7, 2, 1, True, True),
    (256, 5, 2, 0, True, True),
    (384, 3, 1, 1, False, False),
    (384, 3, 1, 1, False, False),
    (256, 3, 1, 1, True, False),
)


class ZFNet(nn.Module):
    """ZFNet: Visualizing and Understanding Convolutional Networks (Zeiler and Fergus, 2013), figure 3.

    ======  ====================  ===============  ============================
    layer   weight                output           then
    ======  ====================  ===============  ============================
    conv1   96 x 3 x 7 x 7, /2    96 x 110 x 110   ReLU, 3x3/2 pool, LRN
    conv2   256 x 96 x 5 x 5, /2  256 x 26 x 26    ReLU, 3x3/2 pool, LRN
    conv3   384 x 256 x 3 x 3     384 x 13 x 13    ReLU
    conv4   384 x 384 x 3 x 3     384 x 13 x 13    ReLU
    conv5   256 x 384 x 3 x 3     256 x 13 x 13    ReLU, 3x3/2 pool
    fc6     4096 x 9216           4096             ReLU, dropout
    fc7     4096 x 4096           4096             ReLU, dropout
    fc8     num_classes x 4096    num_classes
    ======  ====================  ===============  ============================

    62,357,608 parameters. Pools are sized by ceil, which gives the figure's 55, 13 and 6. The paper normalises across
    maps and prints no constants; these are AlexNet's. Weights start at N(0, 0.01) and biases at zero, as in the paper.

    Args:
        num_classes: outputs of the last layer.
        dropout: probability after each hidden fully connected layer.
        fused: fastalex's layers, or torch.nn's in the same module tree.

    Input: [N, 3, 224, 224]. Output: logits [N, num_classes].

    Raises:
        ValueError: for an input of another size.
    """

    def __init__(
        self, num_classes: int = 1000, *, dropout: float = 0.5, fused: bool = True
    ) -> None:
        super().__init__()
        self.fused = fused
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        inputs = 3
        for n, (channels, kernel, stride, padding, pools, norms) in enumerate(_CONVOLUTIONS, 1):
            layers[f"conv{n}"], layers[f"relu{n}"] = convolution(
                fused, "relu", inputs, channels, kernel, stride, padding
            )
            if pools:
                layers[f"pool{n}"] = max_pool(fused, "overlapping", ceil_mode=True)
            if norms:
                layers[f"norm{n}"] = local_response_norm(fused, {**LRN, "groups": 1})
            inputs = channels
        self.features = (FusedSequential if fused else nn.Sequential)(layers)
        classifier: OrderedDict[str, nn.Module] = OrderedDict()
        inputs = 256 * 6 * 6
        for n in (6, 7):
            classifier[f"fc{n}"], classifier[f"relu{n}"] = linear(fused, "relu", inputs, 4096)
            classifier[f"drop{n}"] = nn.Dropout(dropout)
            inputs = 4096
        classifier["fc8"] = (Linear if fused else nn.Linear)(inputs, num_classes)
        self.classifier = nn.Sequential(classifier)
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        for layer in self.modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                nn.init.normal_(layer.weight, std=0.01)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def forward(self, input: Tensor) -> Tensor:
        input = images(input, "ZFNet", (224,), self.fused)
        logits: Tensor = self.classifier(self.features(input).flatten(1))
        return logits
