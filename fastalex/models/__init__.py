"""The networks."""

from fastalex.models.alexnet import AlexNet, alexnet

__all__ = ["AlexNet", "alexnet"]
