"""AlexNet over several devices in one process, a tower on each, and how a network is cut into shares.

Every cut is the same one. A share of the network keeps its part of the rows of every weight, so of every layer's
output channels. A layer that sees the whole layer before it (conv3 and the fully connected ones, as in the paper's
figure 2) gathers the shares' outputs first; a grouped layer, and the normalisation inside a tower, stay where they are.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from fastalex.models.alexnet import AlexNet

#: The shares' outputs, each on its device, to all of them joined, on every device.
Gather = Callable[[list[Tensor]], list[Tensor]]


def weighted(net: AlexNet) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """(parent, name, layer) of every convolution and linear layer, in order."""
    for parent in (net.features, net.classifier):
        for name, layer in parent.named_children():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                yield parent, name, layer


def require_divisible(net: AlexNet, count: int, shared: bool) -> None:
    """Raises unless the network splits into ``count`` shares; ``shared``: the convolutions split too."""
    if shared and net.towers != count:
        raise ValueError(
            f"the network has {net.towers} towers, and there are {count} places: build it with towers={count}"
        )
    if shared and net.norm == "lrn" and net.lrn["groups"] != count:
        raise ValueError(
            "normalisation across all channels needs every tower's map at once; only a network "
            "that normalises inside each tower (such as the preset 'paper') can be split"
        )
    for parent, name, layer in weighted(net):
        rows = layer.weight.size(0)  # type: ignore[operator]
        if rows % count and (shared or parent is net.classifier):
            raise ValueError(f"the {rows} outputs of {name} do not divide among {count} places")


def narrowed(stack: nn.Module, index: int, count: int) -> nn.Sequential:
    """A copy of a Sequential in which every layer keeps its ``index``-th share of channels."""
    share = copy.deepcopy(stack)
    for layer in share.children():
        for name, weight in layer.named_parameters():
            rows = weight.detach().chunk(count)[index].clone()
            setattr(layer, name, nn.Parameter(rows, weight.requires_grad))
        for name, statistic in layer.named_buffers():
            if statistic.dim() > 0:
                setattr(layer, name, statistic.chunk(count)[index].clone())
        for size in ("out_features", "out_channels", "num_features"):
            if hasattr(layer, size):
                setattr(layer, size, getattr(layer, size) // count)
        if getattr(layer, "groups", 1) == count:  # a tower is one group
            if isinstance(layer, nn.Conv2d):
                layer.in_channels //= count
            layer.groups = 1  # type: ignore[assignment]
    return share  # type: ignore[return-value]


def gathering_layers(stack: nn.Module) -> set[str]:
    """Names of the layers that see the whole layer before them."""
    weighted = [(n, m) for n, m in stack.named_children() if isinstance(m, (nn.Conv2d, nn.Linear))]
    first = weighted[0][0] if isinstance(weighted[0][1], nn.Conv2d) else None  # sees the image
    return {name for name, layer in weighted if getattr(layer, "groups", 1) == 1 and name != first}


def run_layers(
    stacks: Iterable[nn.Module], gathering: set[str], parts: list[Tensor], gather: Gather
) -> list[Tensor]:
    """Every share's layers side by side."""
    for steps in zip(*(stack.named_children() for stack in stacks), strict=True):
        if steps[0][0] in gathering:
            parts = gather(parts)
        parts = [layer(part) for (_, layer), part in zip(steps, parts, strict=True)]
    return parts


def merge(shares: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The whole network's state dict from those of its shares, in order."""

    def joined(key: str, first: Tensor) -> Tensor:
        if first.dim() == 0:  # a count of batches, the same in every share
            return first
        return torch.cat([share[key].to(first.device) for share in shares])

    return {key: joined(key, first) for key, first in shares[0].items()}


class TowerDevices(nn.Module):
    """A two-tower network with one tower on each device, exchanging what the paper's two GPUs exchanged.

    Args:
        net: the network; its weights are copied to the devices.
        devices: one a tower, such as ``["cuda:0", "cuda:1"]``; devices may repeat.

    The result has the network's inputs and outputs (logits on the first device). :meth:`merged_state_dict` is the
    single-device network's.

    Raises:
        ValueError: where the network has not one tower a device, normalises across towers, or does not divide.
    """

    placed = True  # a trainer leaves it where it is

    def __init__(self, net: AlexNet, devices: Sequence[str | torch.device]) -> None:
        super().__init__()
        require_divisible(net, len(devices), shared=True)
        self.devices = [torch.device(device) for device in devices]
        self.sized = net._sized
        self.gathering = gathering_layers(net.features) | gathering_layers(net.classifier)
        shares = range(len(devices))
        self.features = nn.ModuleList(narrowed(net.features, i, len(devices)) for i in shares)
        self.classifier = nn.ModuleList(narrowed(net.classifier, i, len(devices)) for i in shares)
        for stacks in (self.features, self.classifier):
            for stack, device in zip(stacks, self.devices, strict=True):
                stack.to(device)

    def _gather(self, parts: list[Tensor]) -> list[Tensor]:
        return [torch.cat([part.to(device) for part in parts], 1) for device in self.devices]

    def forward(self, input: Tensor) -> Tensor:
        """Logits [N, num_classes] on the first device."""
        image = self.sized(input).contiguous(memory_format=torch.channels_last)
        parts = [image.to(device) for device in self.devices]
        parts = run_layers(self.features, self.gathering, parts, self._gather)
        parts = [part.flatten(1) for part in parts]
        parts = run_layers(self.classifier, self.gathering, parts, self._gather)
        return torch.cat([part.to(self.devices[0]) for part in parts], 1)

    def merged_state_dict(self) -> dict[str, Tensor]:
        """The state dict of the network on one device."""
        merged = {}
        for name, stacks in (("features", self.features), ("classifier", self.classifier)):
            whole = merge([stack.state_dict() for stack in stacks])
            merged.update({f"{name}.{key}": value for key, value in whole.items()})
        return merged
