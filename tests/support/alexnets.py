"""AlexNets for tests: without memory or tiny, the sizes of their images, and hooks on their layers."""

from __future__ import annotations

import contextlib
import functools
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from fastalex.models import AlexNet, alexnet

#: Presets that take one size of image.
SIDES = {"torchvision": 224, "cifar10": 32}


LABELS = torch.tensor([3, 8])


def on_meta(preset: str = "paper", **changes) -> AlexNet:
    """A network without memory or values."""
    with torch.device("meta"):
        return alexnet(preset, **changes)


def names_of(network: AlexNet, kind: type[nn.Module]) -> list[str]:
    """Where the stock network has a module of this kind."""
    with torch.device("meta"):
        stock = AlexNet(
            column=network.column, towers=network.towers, norm=network.norm, fused=False
        )
    found = [name for name, module in stock.named_modules() if isinstance(module, kind)]
    present = dict(network.named_modules())
    return [name for name in found if name in present]


@contextlib.contextmanager
def hooked(network: AlexNet, names: list[str], hook: Callable[..., Any]) -> Iterator[None]:
    """Calls ``hook(name, layer, input, output)`` after each of the named layers."""

    def call(name, layer, inputs, output):
        return hook(name, layer, inputs[0], output)

    handles = [
        network.get_submodule(name).register_forward_hook(functools.partial(call, name))
        for name in names
    ]
    yield
    for handle in handles:
        handle.remove()


def tiny(classes: int = 3) -> nn.Sequential:
    """Names and ranks as in the real networks, in 100 numbers."""
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(3, 2, 2),
            relu1=nn.ReLU(),
            conv2=nn.Conv2d(2, 4, 2, groups=2),
            flatten=nn.Flatten(),
            fc8=nn.Linear(4, classes),
        )
    )


def assert_same(model: nn.Module, other: nn.Module) -> None:
    for (name, value), expected in zip(
        model.state_dict().items(), other.state_dict().values(), strict=True
    ):
        assert torch.equal(value, expected), name
