"""The networks: AlexNet in its variants, and architectures that followed it."""

from fastalex.models.alexnet import AlexNet, alexnet
from fastalex.models.googlenet import GoogLeNet, GoogLeNetOutputs
from fastalex.models.nin import NetworkInNetwork
from fastalex.models.zfnet import ZFNet

__all__ = ["AlexNet", "GoogLeNet", "GoogLeNetOutputs", "NetworkInNetwork", "ZFNet", "alexnet"]
