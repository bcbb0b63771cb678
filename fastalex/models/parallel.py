"""AlexNet over several devices: a tower on each, in one process or one a process, and the hybrid of "one weird trick".

Every split is the same one. A share of the network keeps its part of the rows of every weight, so of every layer's
output channels. A layer that sees the whole layer before it (conv3 and the fully connected ones, as in the paper's
figure 2) gathers the shares' outputs first; a grouped layer, and the normalisation inside a tower, stay where they are.

Over processes, the objective is the mean over the ranks of each rank's loss, as data parallelism has it, so every
gradient is exactly the single process's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.parallel import DistributedDataParallel

from fastalex.models.alexnet import AlexNet

#: The shares' outputs, each on its device, to all of them joined, on every device.
Gather = Callable[[list[Tensor]], list[Tensor]]


def _weighted(net: AlexNet) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """(parent, name, layer) of every convolution and linear layer, in order."""
    for parent in (net.features, net.classifier):
        for name, layer in parent.named_children():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                yield parent, name, layer


def _require_divisible(net: AlexNet, count: int, shared: bool) -> None:
    """Raises unless the network splits into ``count`` shares; ``shared``: the convolutions split too."""
    if shared and net.towers != count:
        raise ValueError(f"the network has {net.towers} towers, and there are {count} places")
    if shared and net.norm == "lrn" and net.lrn["groups"] != count:
        raise ValueError(
            "normalisation across all channels needs every tower's map at once; only a network "
            "that normalises inside each tower (such as the preset 'paper') can be split"
        )
    for parent, name, layer in _weighted(net):
        rows = layer.weight.size(0)  # type: ignore[operator]
        if rows % count and (shared or parent is net.classifier):
            raise ValueError(f"the {rows} outputs of {name} do not divide among {count} places")


def _narrowed(stack: nn.Module, index: int, count: int) -> nn.Sequential:
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


def _gathering(stack: nn.Module) -> set[str]:
    """Names of the layers that see the whole layer before them."""
    weighted = [(n, m) for n, m in stack.named_children() if isinstance(m, (nn.Conv2d, nn.Linear))]
    first = weighted[0][0] if isinstance(weighted[0][1], nn.Conv2d) else None  # sees the image
    return {name for name, layer in weighted if getattr(layer, "groups", 1) == 1 and name != first}


def _run(
    stacks: Sequence[nn.Module], gathering: set[str], parts: list[Tensor], gather: Gather
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

    def __init__(self, net: AlexNet, devices: Sequence[str | torch.device]) -> None:
        super().__init__()
        _require_divisible(net, len(devices), shared=True)
        self.devices = [torch.device(device) for device in devices]
        self.sized = net._sized
        self.gathering = _gathering(net.features) | _gathering(net.classifier)
        self.towers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "features": _narrowed(net.features, index, len(devices)),
                    "classifier": _narrowed(net.classifier, index, len(devices)),
                }
            ).to(device)
            for index, device in enumerate(self.devices)
        )

    def _gather(self, parts: list[Tensor]) -> list[Tensor]:
        return [torch.cat([part.to(device) for part in parts], 1) for device in self.devices]

    def forward(self, input: Tensor) -> Tensor:
        """Logits [N, num_classes] on the first device."""
        image = self.sized(input).contiguous(memory_format=torch.channels_last)
        parts = [image.to(device) for device in self.devices]
        parts = _run([t["features"] for t in self.towers], self.gathering, parts, self._gather)  # type: ignore[index]
        parts = [part.flatten(1) for part in parts]
        parts = _run([t["classifier"] for t in self.towers], self.gathering, parts, self._gather)  # type: ignore[index]
        return torch.cat([part.to(self.devices[0]) for part in parts], 1)

    def merged_state_dict(self) -> dict[str, Tensor]:
        """The state dict of the network on one device."""
        return merge([tower.state_dict() for tower in self.towers])


class _AllGather(torch.autograd.Function):
    """Every rank's tensor joined along ``dim``; a gradient is summed over the ranks and goes back to its owner."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, dim: int, group: dist.ProcessGroup | None) -> Tensor:
        ctx.dim, ctx.group = dim, group
        part = part.contiguous()
        parts = [torch.empty_like(part) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, part, group=group)
        return torch.cat(parts, dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        ranks = dist.get_world_size(ctx.group)
        pieces = [piece.contiguous() for piece in grad.chunk(ranks, ctx.dim)]
        own = torch.empty_like(pieces[0])
        dist.reduce_scatter(own, pieces, group=ctx.group)
        return own, None, None


def _average(parameters: Iterable[nn.Parameter], ranks: int) -> None:
    """Makes the gradients of sharded parameters those of the mean over the ranks, not of the sum."""
    for parameter in parameters:
        parameter.register_hook(lambda grad: grad / ranks)


def _plain(name: str) -> str:
    """A parameter's name in the network, without what DistributedDataParallel puts into it."""
    return name.replace("module.", "")


class _Sharded(nn.Module):
    """What both splits over processes share: this rank's place, its gathers, and the whole state in one piece.

    Checkpoints hold the whole state, so a run may go on with another split, or none.
    """

    #: What the names of the parameters begin with of which a rank has only its rows.
    sharded: tuple[str, ...]

    def __init__(self, net: AlexNet, group: dist.ProcessGroup | None) -> None:
        super().__init__()
        if not dist.is_initialized():
            raise RuntimeError(
                "torch.distributed has no process group: start under torchrun, or call init_process_group first"
            )
        self.group = group
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        self.sized = net._sized
        #: Bytes that this rank received in the last forward pass; the backward pass moves as many again.
        self.bytes_received = 0

    def _gather(self, part: Tensor, dim: int = 1) -> Tensor:
        self.bytes_received += part.numel() * part.element_size() * (self.ranks - 1)
        whole: Tensor = _AllGather.apply(part, dim, self.group)
        return whole

    def _gather_channels(self, parts: list[Tensor]) -> list[Tensor]:
        return [self._gather(part) for part in parts]

    def _whole(self, name: str, value: Any) -> Any:
        """A parameter, or what an optimiser keeps of it, with every rank's rows."""
        if not isinstance(value, Tensor) or value.dim() == 0 or not name.startswith(self.sharded):
            return value
        parts = [torch.empty_like(value) for _ in range(self.ranks)]
        dist.all_gather(parts, value.detach().contiguous(), group=self.group)
        return torch.cat(parts)

    def _share(self, name: str, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dim() == 0 or not name.startswith(self.sharded):
            return value
        return value.chunk(self.ranks)[self.rank]

    def merged_state_dict(self) -> dict[str, Tensor]:
        """The state dict of the network in one process, on every rank; all ranks must call it together."""
        return {_plain(name): self._whole(name, value) for name, value in self.state_dict().items()}

    def load_merged_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes this rank's rows of the whole network's state dict."""
        names = self.state_dict()
        self.load_state_dict({name: self._share(name, state[_plain(name)]) for name in names})

    def merged_optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """The state dict that the optimiser would have in one process; all ranks must call it together."""
        return self._convert(optimizer, optimizer.state_dict(), self._whole)

    def load_merged_optimizer_state(
        self, optimizer: torch.optim.Optimizer, state: dict[str, Any]
    ) -> None:
        """Takes this rank's rows of the single process's optimiser state."""
        optimizer.load_state_dict(self._convert(optimizer, state, self._share))

    def _convert(
        self,
        optimizer: torch.optim.Optimizer,
        state: dict[str, Any],
        convert: Callable[[str, Any], Any],
    ) -> dict[str, Any]:
        names = {id(parameter): name for name, parameter in self.named_parameters()}
        order = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
        kept = {
            index: {key: convert(order[index], value) for key, value in of_one.items()}
            for index, of_one in state["state"].items()
        }
        return {**state, "state": kept}


class TowerProcesses(_Sharded):
    """One tower of a two-tower network in this process; the other ranks of ``group`` hold the others.

    Every rank gives the same input, and gets the whole logits. Under data parallelism of such pairs, wrap this
    module in DistributedDataParallel over the ranks that hold the same tower.

    Raises:
        RuntimeError: with no process group. ValueError: as :class:`TowerDevices`.
    """

    sharded = ("features.", "classifier.")

    def __init__(self, net: AlexNet, group: dist.ProcessGroup | None = None) -> None:
        super().__init__(net, group)
        _require_divisible(net, self.ranks, shared=True)
        self.features = _narrowed(net.features, self.rank, self.ranks)
        self.classifier = _narrowed(net.classifier, self.rank, self.ranks)
        self.gathering = _gathering(net.features) | _gathering(net.classifier)
        _average(self.parameters(), self.ranks)

    def forward(self, input: Tensor) -> Tensor:
        """Logits [N, num_classes], equal on every rank."""
        self.bytes_received = 0
        parts = [self.sized(input).contiguous(memory_format=torch.channels_last)]
        parts = _run([self.features], self.gathering, parts, self._gather_channels)
        parts = [parts[0].flatten(1)]
        parts = _run([self.classifier], self.gathering, parts, self._gather_channels)
        return self._gather(parts[0])


class Hybrid(_Sharded):
    """Data-parallel convolutions, model-parallel fully connected layers (Krizhevsky, 2014, "one weird trick").

    The convolutions hold 6 % of the parameters and do 95 % of the work, so each rank runs all of them on images of
    its own; the fully connected layers hold the rest, so each rank keeps its share of their rows and runs it on
    every rank's images.

    Raises:
        RuntimeError: with no process group. ValueError: where the fully connected layers do not divide.
    """

    sharded = ("classifier.",)

    def __init__(self, net: AlexNet, group: dist.ProcessGroup | None = None) -> None:
        super().__init__(net, group)
        _require_divisible(net, self.ranks, shared=False)
        self.features = DistributedDataParallel(copy.deepcopy(net.features), process_group=group)
        self.avgpool = net.avgpool
        self.classifier = _narrowed(net.classifier, self.rank, self.ranks)
        # The first of them gets its images from every rank, whole.
        self.gathering = _gathering(net.classifier)
        self.gathering.remove(next(name for _, name, _ in _weighted(net) if name in self.gathering))
        _average(self.classifier.parameters(), self.ranks)

    def forward(self, input: Tensor) -> Tensor:
        """Logits [N, num_classes] of this rank's N images; every rank must give as many."""
        self.bytes_received = 0
        image = self.sized(input).contiguous(memory_format=torch.channels_last)
        maps = self.avgpool(self.features(image)).flatten(1)
        parts = [self._gather(maps, dim=0)]
        parts = _run([self.classifier], self.gathering, parts, self._gather_channels)
        return self._gather(parts[0]).chunk(self.ranks)[self.rank]
