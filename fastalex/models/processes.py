"""AlexNet over the processes of a group: a tower in each, whole replicas, and the hybrid of "one weird trick".

The objective is the mean over the ranks of each rank's loss, as data parallelism has it, so every gradient is exactly
the single process's. How a network is cut into shares is in :mod:`fastalex.models.parallel`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.parallel import DistributedDataParallel

from fastalex.models.alexnet import AlexNet
from fastalex.models.parallel import (
    gathering_layers,
    narrowed,
    require_divisible,
    run_layers,
    weighted,
)


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
    return name.replace("network.", "").replace("module.", "")


class Spread(nn.Module):
    """A network spread over the processes of a group: this rank's place, its gathers, and the whole state in one piece.

    Checkpoints hold the whole state, so a run may go on with another split, or none.
    """

    #: What the names of the parameters begin with of which a rank has only its rows.
    sharded: tuple[str, ...] = ()
    #: Whether each rank takes images of its own; otherwise all take the same.
    own_images = True

    def __init__(self, net: AlexNet, group: dist.ProcessGroup | None) -> None:
        super().__init__()
        if not dist.is_initialized():
            raise RuntimeError(
                "torch.distributed has no process group: start under torchrun, or call init_process_group first"
            )
        self.group = group
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        self.sized = net._sized
        #: Bytes of activations that this rank received in the last forward pass; their gradients move as many again.
        self.bytes_received = 0

    def _gather(self, part: Tensor, dim: int = 1) -> Tensor:
        self.bytes_received += part.numel() * part.element_size() * (self.ranks - 1)
        whole: Tensor = _AllGather.apply(part, dim, self.group)
        return whole

    def _gather_channels(self, parts: list[Tensor]) -> list[Tensor]:
        return [self._gather(part) for part in parts]

    def _is_sharded(self, name: str) -> bool:
        return name.startswith(self.sharded)

    def _whole(self, name: str, value: Any) -> Any:
        """A parameter, or what an optimiser keeps of it, with every rank's rows."""
        if not isinstance(value, Tensor) or value.dim() == 0 or not self._is_sharded(name):
            return value
        parts = [torch.empty_like(value) for _ in range(self.ranks)]
        dist.all_gather(parts, value.detach().contiguous(), group=self.group)
        return torch.cat(parts)

    def _share(self, name: str, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dim() == 0 or not self._is_sharded(name):
            return value
        return value.chunk(self.ranks)[self.rank]

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def any(self, asked: bool) -> bool:
        """Whether any rank says so; all ranks must call it together."""
        flag = torch.tensor([int(asked)], device=self.device)
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.group)
        return bool(flag.item())

    def weight(self, images: int) -> float:
        """What this rank's mean loss counts in the mean over all images, in the mean over ranks; a collective call."""
        return self.ranks * images / sum(self.collect(images)) if self.own_images else 1.0

    def barrier(self) -> None:
        """Waits for every rank."""
        self.any(False)

    def collect(self, value: Any) -> list[Any]:
        """Every rank's value, in order; all ranks must call it together."""
        values: list[Any] = [None] * self.ranks
        dist.all_gather_object(values, value, group=self.group)
        return values

    def clip_gradients(self, most: float) -> None:
        """Scales the gradients so that the whole network's norm is at most ``most``; a collective call."""
        here: dict[bool, list[Tensor]] = {True: [], False: []}
        for name, parameter in self.named_parameters():
            if parameter.grad is not None:
                here[self._is_sharded(name)].append(parameter.grad)
        sharded, whole = (
            torch.stack(
                [grad.square().sum() for grad in here[key]] or [torch.zeros((), device=self.device)]
            ).sum()
            for key in (True, False)
        )
        dist.all_reduce(sharded, group=self.group)
        scale = (most / ((sharded + whole).sqrt() + 1e-6)).clamp_max(1)
        for grad in (*here[True], *here[False]):
            grad.mul_(scale)

    def communication(self) -> str:
        """What a training step moves, in words; call it after a step."""
        replicated = sum(
            parameter.numel() * parameter.element_size()
            for name, parameter in self.named_parameters()
            if not self._is_sharded(name)
        )
        # A ring sends every gradient around twice, less the rank's own part.
        reduced = 2 * replicated * (self.ranks - 1) / self.ranks if self.own_images else 0
        return (
            f"each of {self.ranks} processes receives {2 * self.bytes_received / 2**20:.1f} MiB of activations and "
            f"their gradients a step, and {reduced / 2**20:.1f} MiB of weights' gradients"
        )

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


class TowerProcesses(Spread):
    """One tower of a two-tower network in this process; the other ranks of ``group`` hold the others.

    Every rank gives the same input, and gets the whole logits. Under data parallelism of such pairs, wrap this
    module in DistributedDataParallel over the ranks that hold the same tower.

    Raises:
        RuntimeError: with no process group. ValueError: as :class:`TowerDevices`.
    """

    sharded = ("features.", "classifier.")
    own_images = False

    def __init__(self, net: AlexNet, group: dist.ProcessGroup | None = None) -> None:
        super().__init__(net, group)
        require_divisible(net, self.ranks, shared=True)
        self.features = narrowed(net.features, self.rank, self.ranks)
        self.classifier = narrowed(net.classifier, self.rank, self.ranks)
        self.gathering = gathering_layers(net.features) | gathering_layers(net.classifier)
        _average(self.parameters(), self.ranks)

    def forward(self, input: Tensor) -> Tensor:
        """Logits [N, num_classes], equal on every rank."""
        self.bytes_received = 0
        parts = [self.sized(input).contiguous(memory_format=torch.channels_last)]
        parts = run_layers([self.features], self.gathering, parts, self._gather_channels)
        parts = [parts[0].flatten(1)]
        parts = run_layers([self.classifier], self.gathering, parts, self._gather_channels)
        return self._gather(parts[0])


class Hybrid(Spread):
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
        require_divisible(net, self.ranks, shared=False)
        self.features = DistributedDataParallel(copy.deepcopy(net.features), process_group=group)
        self.avgpool = net.avgpool
        self.classifier = narrowed(net.classifier, self.rank, self.ranks)
        # The first of them gets its images from every rank, whole.
        self.gathering = gathering_layers(net.classifier)
        self.gathering.remove(next(name for _, name, _ in weighted(net) if name in self.gathering))
        _average(self.classifier.parameters(), self.ranks)

    def forward(self, input: Tensor) -> Tensor:
        """Logits [N, num_classes] of this rank's N images."""
        self.bytes_received = 0
        image = self.sized(input).contiguous(memory_format=torch.channels_last)
        maps = self.avgpool(self.features(image)).flatten(1)
        images = len(maps)
        most = torch.tensor([images], device=maps.device)
        dist.all_reduce(most, dist.ReduceOp.MAX, group=self.group)
        maps = F.pad(maps, (0, 0, 0, int(most) - images))  # the last batch may not divide
        parts = [self._gather(maps, dim=0)]
        parts = run_layers([self.classifier], self.gathering, parts, self._gather_channels)
        return self._gather(parts[0]).chunk(self.ranks)[self.rank][:images]


class Replicas(Spread):
    """The whole network in every process, each on images of its own: DistributedDataParallel.

    Raises:
        RuntimeError: with no process group.
    """

    def __init__(self, net: AlexNet, group: dist.ProcessGroup | None = None) -> None:
        super().__init__(net, group)
        self.network = DistributedDataParallel(copy.deepcopy(net), process_group=group)

    def forward(self, input: Tensor) -> Tensor:
        """Logits [N, num_classes] of this rank's N images."""
        logits: Tensor = self.network(input)
        return logits


#: By the name that ``python -m fastalex.train --parallel`` takes.
SPLITS: dict[str, Callable[[AlexNet], Spread]] = {
    "data": Replicas,
    "towers": TowerProcesses,
    "hybrid": Hybrid,
}
