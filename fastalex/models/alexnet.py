"""AlexNet and its variants, on fastalex's layers or on torch.nn's."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastalex.models._layers import (
    ACTIVATIONS,
    NORMS,
    POOLS,
    convolution,
    images,
    linear,
    local_response_norm,
    max_pool,
    norm_and_pool,
)
from fastalex.ops import FusedSequential, Linear

#: Section 3.3 of the paper.
LRN = {"size": 5, "alpha": 1e-4, "beta": 0.75, "k": 2.0}


class Conv(NamedTuple):
    """One convolution of a column, and what follows it."""

    channels: int
    kernel: int
    stride: int = 1
    padding: int = 0
    grouped: bool = False  # each tower sees only itself
    norm: bool = False
    pool: bool = False


class Column(NamedTuple):
    """The convolutions in turn, the sides of the images they take, and the side of the last map."""

    convolutions: tuple[Conv, ...]
    sides: tuple[int, ...]  # the first is native, smaller ones are padded to it; none: any side
    last: int
    ceil_mode: bool = False


_PAPER = (
    Conv(96, 11, 4, norm=True, pool=True),
    Conv(256, 5, padding=2, grouped=True, norm=True, pool=True),
    Conv(384, 3, padding=1),
    Conv(384, 3, padding=1, grouped=True),
    Conv(256, 3, padding=1, grouped=True, pool=True),
)
COLUMNS = {
    "paper": Column(_PAPER, (227, 224), 6),
    # Section 6.1 adds "an extra, sixth convolutional layer over the last pooling layer" and gives no size.
    "pretrain6": Column((*_PAPER, Conv(256, 3, padding=1, grouped=True)), (227, 224), 6),
    # One weird trick for parallelizing convolutional neural networks (Krizhevsky, 2014), as torchvision has it.
    "torchvision": Column(
        (
            Conv(64, 11, 4, 2, norm=True, pool=True),
            Conv(192, 5, padding=2, grouped=True, norm=True, pool=True),
            Conv(384, 3, padding=1),
            Conv(256, 3, padding=1, grouped=True),
            Conv(256, 3, padding=1, grouped=True, pool=True),
        ),
        (),
        6,
    ),
    # cuda-convnet's layers-conv-local-11pct.cfg, the paper's CIFAR-10 network; ceil is how it sizes its pools.
    "cifar10": Column(
        (
            Conv(64, 5, padding=2, norm=True, pool=True),
            Conv(64, 5, padding=2, grouped=True, norm=True, pool=True),
            Conv(32, 3, padding=1),
            Conv(32, 3, padding=1, grouped=True),
        ),
        (32,),
        8,
        ceil_mode=True,
    ),
}


class Initialisation(NamedTuple):
    """Standard deviations other than 0.01, and the bias of :data:`BIASED`; every other bias is zero."""

    deviations: dict[str, float]
    bias: float


#: Layers whose bias the paper starts at one, so that their ReLUs start with positive inputs.
BIASED = ("conv2", "conv4", "conv5", "conv6", "fc6", "fc7")
_WIDE = {"conv3": 0.03, "conv4": 0.03, "conv5": 0.03, "conv6": 0.03}
INITIALISATIONS: dict[str, Initialisation | None] = {
    # Section 5: N(0, 0.01) everywhere. The loss can start flat.
    "paper": Initialisation({}, 1.0),
    # The author's own code widens conv3 to conv5, and trains from the first step.
    "cuda-convnet2": Initialisation(_WIDE, 1.0),
    # BVLC found that a smaller bias trains more reliably.
    "bvlc": Initialisation({"fc6": 0.005, "fc7": 0.005}, 0.1),
    # layers-conv-local-11pct.cfg, for pixels from 0 to 255 less their mean.
    "cuda-convnet": Initialisation({"conv1": 1e-4, "conv3": 0.04, "conv4": 0.04}, 0.0),
    # Each layer's own default in torch.nn, as torchvision leaves it.
    "torch": None,
}


def _require(name: str, value: object, allowed: Any) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; it can be one of {', '.join(map(str, allowed))}")


def _require_probability(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise ValueError(f"{name} is {value!r}; it is a probability, at least 0 and below 1")


class AlexNet(nn.Module):
    """AlexNet: ImageNet Classification with Deep Convolutional Neural Networks (Krizhevsky et al., 2012).

    ======  =======================  ================  ========================
    layer   weight (two towers)      output            then
    ======  =======================  ================  ========================
    conv1   96 x 3 x 11 x 11, /4     96 x 55 x 55      ReLU, LRN, 3x3/2 pool
    conv2   256 x 48 x 5 x 5         256 x 27 x 27     ReLU, LRN, 3x3/2 pool
    conv3   384 x 256 x 3 x 3        384 x 13 x 13     ReLU
    conv4   384 x 192 x 3 x 3        384 x 13 x 13     ReLU
    conv5   256 x 192 x 3 x 3        256 x 13 x 13     ReLU, 3x3/2 pool
    fc6     4096 x 9216              4096              ReLU, dropout
    fc7     4096 x 4096              4096              ReLU, dropout
    fc8     num_classes x 4096       num_classes
    ======  =======================  ================  ========================

    Args:
        num_classes: outputs of the last layer.
        column: the convolutions: ``"paper"`` above; ``"pretrain6"``, which adds conv6 (256 x 128 x 3 x 3) over the
            last pool; ``"torchvision"`` (64, 192, 384, 256, 256 channels, keys ``features.0``, dropout before the
            layers it feeds, adaptive pooling); ``"cifar10"`` (3x32x32 images).
        towers: groups of conv2, conv4, conv5 and of the normalisation: 2 as on the paper's two GPUs, or 1.
        norm: after conv1 and conv2: ``"lrn"``, ``"batchnorm"`` (before the activation, as its authors place it) or
            ``"none"``.
        lrn: arguments of :class:`fastalex.ops.LocalResponseNorm`; the paper's, inside each tower, by default.
        pool_first: normalise after pooling, as CaffeNet does.
        pool: ``"overlapping"`` (3x3 windows two apart), ``"plain"`` (2x2) or ``"fractional"`` (Graham, 2014); all
            give maps of the same size.
        activation: ``"relu"`` or ``"tanh"``.
        hidden: width of fc6 and fc7; 0 leaves both out, so that fc8 follows the convolutions.
        dropout: probability for the outputs of each hidden layer, 0.5 in the paper.
        dropconnect: probability for the weights of each hidden layer.
        fused: fastalex's layers, or torch.nn's in the same module tree: the stock model. State dicts are
            interchangeable.
        init: ``"cuda-convnet2"`` (the author's code; trains from the first step), ``"paper"`` (section 5
            literally), ``"bvlc"``, ``"cuda-convnet"`` or ``"torch"`` (torch.nn's defaults).

    Input: [N, 3, 227, 227], or [N, 3, 224, 224], which is zero-padded by 3 on the right and at the bottom (the
    original code's ceil sizing); [N, 3, 32, 32] for ``"cifar10"``; at least 63x63 for ``"torchvision"``.
    Output: logits [N, num_classes].

    Raises:
        ValueError: for an unknown or contradictory option, or an input of another size.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        *,
        column: str = "paper",
        towers: int = 2,
        norm: str = "lrn",
        lrn: Mapping[str, Any] | None = None,
        pool_first: bool = False,
        pool: str = "overlapping",
        activation: str = "relu",
        hidden: int = 4096,
        dropout: float = 0.5,
        dropconnect: float = 0.0,
        fused: bool = True,
        init: str = "cuda-convnet2",
    ) -> None:
        super().__init__()
        if towers not in (1, 2):
            raise ValueError(f"towers is {towers}; it can be 1 or 2")
        _require("column", column, COLUMNS)
        _require("norm", norm, NORMS)
        _require("pool", pool, POOLS)
        _require("activation", activation, ACTIVATIONS)
        _require("init", init, INITIALISATIONS)
        _require_probability("dropout", dropout)
        _require_probability("dropconnect", dropconnect)
        for name, value, least in (("num_classes", num_classes, 1), ("hidden", hidden, 0)):
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} is {value!r}; it must be an int of at least {least}")
        if not hidden and (dropout or dropconnect):
            raise ValueError(
                f"dropout is {dropout} and dropconnect {dropconnect}, which act on hidden layers, but hidden is 0; "
                "give a width, or set both to 0"
            )
        if norm != "lrn" and (lrn is not None or pool_first):
            raise ValueError(f"lrn and pool_first are for norm='lrn', and norm is {norm!r}")
        self.column = column
        self.towers = towers
        self.norm = norm
        self.lrn = {**LRN, "groups": towers, **(lrn or {})}
        self.pool_first = pool_first
        self.pool = pool
        self.activation = activation
        self.fused = fused
        features = self._features()
        classifier = self._classifier(num_classes, hidden, dropout, dropconnect)
        # torchvision numbers its layers.
        numbered = column == "torchvision"
        stack = FusedSequential if self.fused else nn.Sequential
        self.features = stack(*features.values()) if numbered else stack(features)
        self.avgpool = nn.AdaptiveAvgPool2d(6) if numbered else nn.Identity()
        self.classifier = (
            nn.Sequential(*classifier.values()) if numbered else nn.Sequential(classifier)
        )
        self._initialise(init, {**features, **classifier})

    def _features(self) -> OrderedDict[str, nn.Module]:
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        column, channels = COLUMNS[self.column], 3
        for n, conv in enumerate(column.convolutions, 1):
            groups = self.towers if conv.grouped else 1
            batchnorm = conv.norm and self.norm == "batchnorm"
            layer, activation = convolution(
                self.fused and not batchnorm,
                self.activation,
                channels,
                conv.channels,
                conv.kernel,
                stride=conv.stride,
                padding=conv.padding,
                groups=groups,
                bias=not batchnorm,  # its shift is one
            )
            channels = conv.channels
            layers[f"conv{n}"] = layer
            if batchnorm:
                layers[f"norm{n}"] = nn.BatchNorm2d(channels)
            layers[f"relu{n}"] = activation
            if conv.norm and self.norm == "lrn":
                if self.pool_first:
                    layers[f"pool{n}"] = max_pool(self.fused, self.pool, column.ceil_mode)
                    layers[f"norm{n}"] = local_response_norm(self.fused, self.lrn)
                else:
                    layers[f"norm{n}"], layers[f"pool{n}"] = norm_and_pool(
                        self.fused, self.lrn, self.pool, column.ceil_mode
                    )
            elif conv.pool:
                layers[f"pool{n}"] = max_pool(self.fused, self.pool, column.ceil_mode)
        return layers

    def _classifier(
        self, num_classes: int, hidden: int, dropout: float, dropconnect: float
    ) -> OrderedDict[str, nn.Module]:
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        column = COLUMNS[self.column]
        inputs = column.convolutions[-1].channels * column.last**2
        for n in (6, 7) if hidden else ():
            # torchvision drops the inputs of each hidden layer, the paper its outputs.
            if self.column == "torchvision":
                layers[f"drop{n}"] = nn.Dropout(dropout)
            layers[f"fc{n}"], layers[f"relu{n}"] = linear(
                self.fused, self.activation, inputs, hidden, dropconnect
            )
            if self.column != "torchvision":
                layers[f"drop{n}"] = nn.Dropout(dropout)
            inputs = hidden
        layers["fc8"] = (Linear if self.fused else nn.Linear)(inputs, num_classes)
        return layers

    @torch.no_grad()
    def _initialise(self, init: str, layers: Mapping[str, nn.Module]) -> None:
        chosen = INITIALISATIONS[init]
        if chosen is None:
            return
        for name, layer in layers.items():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                nn.init.normal_(layer.weight, std=chosen.deviations.get(name, 0.01))
                if layer.bias is not None:
                    nn.init.constant_(layer.bias, chosen.bias if name in BIASED else 0.0)

    @property
    def head(self) -> nn.Linear:
        """The last layer."""
        return self.classifier[-1]  # type: ignore[return-value]

    def replace_head(self, num_classes: int) -> None:
        """Puts a new last layer, N(0, 0.01) and bias zero, in the place of the old one: the start of fine-tuning."""
        old = self.head
        new = type(old)(
            old.in_features, num_classes, device=old.weight.device, dtype=old.weight.dtype
        )
        nn.init.normal_(new.weight, std=0.01)
        nn.init.zeros_(new.bias)
        self.classifier[-1] = new

    def parallelize(self, devices: Sequence[str | torch.device]) -> nn.Module:
        """This network with one tower on each device: :class:`fastalex.models.parallel.TowerDevices`."""
        from fastalex.models.parallel import TowerDevices

        return TowerDevices(self, devices)

    def _sized(self, input: Tensor) -> Tensor:
        """The input, padded to the column's native side where it is smaller, in the network's layout."""
        return images(input, "AlexNet", COLUMNS[self.column].sides, self.fused)

    def forward(self, input: Tensor) -> Tensor:
        input = self._sized(input)
        logits: Tensor = self.classifier(self.avgpool(self.features(input)).flatten(1))
        return logits


#: The LRN of Caffe's two networks, across all channels.
_CAFFE: dict[str, Any] = {"lrn": {"k": 1.0, "groups": 1}, "init": "bvlc"}
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "single": {"towers": 1},
    "caffenet": {**_CAFFE, "pool_first": True},
    "bvlc": _CAFFE,
    "torchvision": {"column": "torchvision", "towers": 1, "norm": "none", "init": "torch"},
    "batchnorm": {"norm": "batchnorm"},
    "cifar10": {
        "num_classes": 10,
        "column": "cifar10",
        "towers": 1,
        "lrn": {"alpha": 1e-3, "k": 1.0},
        "hidden": 0,
        "dropout": 0.0,
        "init": "torch",
    },
    "pretrain6": {"column": "pretrain6"},
}


def alexnet(name: str = "paper", **changes: Any) -> AlexNet:
    """An :class:`AlexNet` by name; ``changes`` are arguments of the class that replace the preset's.

    ===============  ===========  =====================================================================
    name             parameters   what
    ===============  ===========  =====================================================================
    ``paper``        60,965,224   two towers, LRN inside each
    ``single``       62,378,344   one tower, no groups
    ``caffenet``     60,965,224   BVLC reference CaffeNet: pools, then normalises across all channels, k = 1
    ``bvlc``         60,965,224   BVLC AlexNet: normalises across all channels, k = 1, then pools
    ``torchvision``  61,100,840   the one-weird-trick column without LRN; loads torchvision's state_dict
    ``batchnorm``    60,965,576   batch normalisation in place of LRN
    ``cifar10``         155,530   cuda-convnet's CIFAR-10 network of the paper's section 3.3, 3x32x32 images
    ``pretrain6``    61,260,392   a sixth convolution over the last pooling layer, for pre-training
    ===============  ===========  =====================================================================

    In ``cifar10`` the third and fourth layers are convolutions; cuda-convnet's own share no weights between places.

    Raises:
        ValueError: for an unknown name, or as the class.
    """
    if name not in PRESETS:
        raise ValueError(f"no preset '{name}'; there are {', '.join(PRESETS)}")
    preset = dict(PRESETS[name])
    if changes.get("norm", "lrn") != "lrn":  # the preset's LRN goes with it
        preset = {key: value for key, value in preset.items() if key not in ("lrn", "pool_first")}
    return AlexNet(**{**preset, **changes})
