"""The networks: AlexNet in its variants, architectures that followed it, and their weights."""

from fastalex.models.alexnet import AlexNet, alexnet
from fastalex.models.googlenet import GoogLeNet, GoogLeNetOutputs
from fastalex.models.nin import NetworkInNetwork
from fastalex.models.weights import (
    PREPROCESSING,
    Preprocessing,
    WeightsError,
    load_mean,
    load_weights,
)
from fastalex.models.zfnet import ZFNet

__all__ = [
    "PREPROCESSING",
    "AlexNet",
    "GoogLeNet",
    "GoogLeNetOutputs",
    "NetworkInNetwork",
    "Preprocessing",
    "WeightsError",
    "ZFNet",
    "alexnet",
    "load_mean",
    "load_weights",
]
