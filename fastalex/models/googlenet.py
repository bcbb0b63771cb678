"""GoogLeNet as BVLC trained it, with its LRN layers and auxiliary heads."""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastalex.models._layers import (
    conv_relu,
    images,
    linear,
    local_response_norm,
    max_pool,
    norm_and_pool,
    pool_layer,
)
from fastalex.ops import Linear

LRN = {"size": 5, "alpha": 1e-4, "beta": 0.75, "k": 1.0, "groups": 1}

#: Channels of each module's 1x1; 3x3 and its reduction; 5x5 and its reduction; projection of the pool.
INCEPTIONS = {
    "3a": (64, 96, 128, 16, 32, 32),
    "3b": (128, 128, 192, 32, 96, 64),
    "4a": (192, 96, 208, 16, 48, 64),
    "4b": (160, 112, 224, 24, 64, 64),
    "4c": (128, 128, 256, 24, 64, 64),
    "4d": (112, 144, 288, 32, 64, 64),
    "4e": (256, 160, 320, 32, 128, 128),
    "5a": (256, 160, 320, 32, 128, 128),
    "5b": (384, 192, 384, 48, 128, 128),
}
_POOLED_AFTER = {"3b": "pool3", "4e": "pool4"}
_AUXILIARY_AFTER = {"4a": "loss1", "4d": "loss2"}
_CAFFE_NAMES = {
    "conv1": "conv1/7x7_s2",
    "conv2_reduce": "conv2/3x3_reduce",
    "conv2": "conv2/3x3",
    "conv1x1": "1x1",
    "reduce3x3": "3x3_reduce",
    "conv3x3": "3x3",
    "reduce5x5": "5x5_reduce",
    "conv5x5": "5x5",
    "project": "pool_proj",
    "classifier": "loss3/classifier",
}


class GoogLeNetOutputs(NamedTuple):
    """Logits of the network and of its auxiliary heads, whose losses weigh 0.3 each in training."""

    logits: Tensor
    loss1: Tensor
    loss2: Tensor


class Inception(nn.Module):
    """1x1, 3x3 and 5x5 convolutions and a pool side by side, each behind a 1x1 that narrows it, concatenated."""

    def __init__(self, inputs: int, channels: tuple[int, ...], fused: bool) -> None:
        super().__init__()
        one, reduce3, three, reduce5, five, project = channels
        self.conv1x1 = conv_relu(fused, inputs, one, 1)
        self.reduce3x3 = conv_relu(fused, inputs, reduce3, 1)
        self.conv3x3 = conv_relu(fused, reduce3, three, 3, padding=1)
        self.reduce5x5 = conv_relu(fused, inputs, reduce5, 1)
        self.conv5x5 = conv_relu(fused, reduce5, five, 5, padding=2)
        self.pool = pool_layer(fused)(3, 1, padding=1)
        self.project = conv_relu(fused, inputs, project, 1)

    def forward(self, input: Tensor) -> Tensor:
        branches = (
            self.conv1x1(input),
            self.conv3x3(self.reduce3x3(input)),
            self.conv5x5(self.reduce5x5(input)),
            self.project(self.pool(input)),
        )
        return torch.cat(branches, 1)


class AuxiliaryHead(nn.Sequential):
    """A small classifier on a middle layer, which brings gradients there in training."""

    def __init__(self, inputs: int, num_classes: int, dropout: float, fused: bool) -> None:
        fc, relu = linear(fused, "relu", 128 * 4 * 4, 1024)
        super().__init__(
            OrderedDict(
                pool=nn.AvgPool2d(5, 3),
                conv=conv_relu(fused, inputs, 128, 1),
                flatten=nn.Flatten(),
                fc=fc,
                relu=relu,
                drop=nn.Dropout(dropout),
                classifier=(Linear if fused else nn.Linear)(1024, num_classes),
            )
        )


class GoogLeNet(nn.Module):
    """GoogLeNet: Going Deeper with Convolutions (Szegedy et al., 2014), as BVLC's bvlc_googlenet has it.

    ==============  ==========================  =======================  ================================
    layer           weight                      output at 224            then
    ==============  ==========================  =======================  ================================
    conv1           64 x 3 x 7 x 7, /2          64 x 112 x 112           ReLU, 3x3/2 pool, LRN
    conv2_reduce    64 x 64 x 1 x 1             64 x 56 x 56             ReLU
    conv2           192 x 64 x 3 x 3            192 x 56 x 56            ReLU, LRN, 3x3/2 pool
    inception 3a-b  :data:`INCEPTIONS`          256, 480 x 28 x 28       3x3/2 pool
    inception 4a-e                              512, 512, 512, 528, 832  3x3/2 pool; 14 x 14
    inception 5a-b                              832, 1024 x 7 x 7        mean of each map, dropout
    classifier      num_classes x 1024          num_classes
    ==============  ==========================  =======================  ================================

    6,998,552 parameters, and 13,378,280 with the two auxiliary heads on 4a and 4d. Pools are sized by ceil, LRN has
    k = 1, weights start as Glorot and Bengio (2010) in Caffe's form and biases at 0.2.

    Args:
        num_classes: outputs of the last layer and of the auxiliary heads.
        auxiliary: build the auxiliary heads; they run in training alone.
        dropout, auxiliary_dropout: probability before the last layer, and in the auxiliary heads.
        fused: fastalex's layers, or torch.nn's in the same module tree.

    Input: [N, 3, 224, 224]. Output: logits [N, num_classes], or in training with auxiliary heads a
    :class:`GoogLeNetOutputs`.

    Raises:
        ValueError: for an input of another size.
    """

    #: Last layers, and what a file may have that a network without auxiliary heads has not; for load_weights.
    heads = ("classifier", "loss1.classifier", "loss2.classifier")
    optional = ("loss1", "loss2")

    def __init__(
        self,
        num_classes: int = 1000,
        *,
        auxiliary: bool = True,
        dropout: float = 0.4,
        auxiliary_dropout: float = 0.7,
        fused: bool = True,
    ) -> None:
        super().__init__()
        self.fused = fused
        self.auxiliary = auxiliary
        self.conv1 = conv_relu(fused, 3, 64, 7, stride=2, padding=3)
        self.pool1 = max_pool(fused, "overlapping", ceil_mode=True)
        self.norm1 = local_response_norm(fused, LRN)
        self.conv2_reduce = conv_relu(fused, 64, 64, 1)
        self.conv2 = conv_relu(fused, 64, 192, 3, padding=1)
        self.norm2, self.pool2 = norm_and_pool(fused, LRN, "overlapping", ceil_mode=True)
        inputs = 192
        for name, channels in INCEPTIONS.items():
            self.add_module(f"inception_{name}", Inception(inputs, channels, fused))
            inputs = channels[0] + channels[2] + channels[4] + channels[5]
            if name in _POOLED_AFTER:
                pool = max_pool(fused, "overlapping", ceil_mode=True)
                self.add_module(_POOLED_AFTER[name], pool)
            if auxiliary and name in _AUXILIARY_AFTER:
                head = AuxiliaryHead(inputs, num_classes, auxiliary_dropout, fused)
                self.add_module(_AUXILIARY_AFTER[name], head)
        self.drop = nn.Dropout(dropout)
        self.classifier = (Linear if fused else nn.Linear)(inputs, num_classes)
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        for layer in self.modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                bound = (3 / layer.weight[0].numel()) ** 0.5
                nn.init.uniform_(layer.weight, -bound, bound)
                if layer.bias is not None:
                    nn.init.constant_(layer.bias, 0.2)
        for name, layer in self.named_modules():
            if name.endswith("classifier") and isinstance(layer, nn.Linear):
                nn.init.zeros_(layer.bias)

    def caffe_name(self, module: str) -> str:
        """The name in BVLC's file of the layer at ``module``."""
        path = module.removesuffix(".conv") if not module.startswith("loss") else module
        parent, _, name = path.rpartition(".")
        if parent.startswith("loss"):  # loss1.conv.conv, loss1.fc, loss1.classifier
            return f"{parent.partition('.')[0]}/{name}"
        return f"{parent}/{_CAFFE_NAMES[name]}" if parent else _CAFFE_NAMES[name]

    def forward(self, input: Tensor) -> Tensor | GoogLeNetOutputs:
        input = images(input, "GoogLeNet", (224,), self.fused)
        x = self.norm1(self.pool1(self.conv1(input)))
        x = self.pool2(self.norm2(self.conv2(self.conv2_reduce(x))))
        auxiliary = []
        for name in INCEPTIONS:
            x = self.get_submodule(f"inception_{name}")(x)
            if self.training and self.auxiliary and name in _AUXILIARY_AFTER:
                auxiliary.append(self.get_submodule(_AUXILIARY_AFTER[name])(x))
            if name in _POOLED_AFTER:
                x = self.get_submodule(_POOLED_AFTER[name])(x)
        logits: Tensor = self.classifier(self.drop(x.mean((2, 3))))
        return GoogLeNetOutputs(logits, *auxiliary) if auxiliary else logits
