"""Batches: a pure function of seed, epoch and step, whoever prepares them and wherever a run goes on."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from fastalex import ops
from fastalex.train.data import Images, Unreadable
from fastalex.train.errors import extra
from fastalex.train.options import Options
from fastalex.train.statistics import Statistics


@dataclass
class Batch:
    """Images ready for the network, or uint8 with the draws that make them so on its device."""

    images: Tensor
    labels: Tensor  # [N], or [N, classes] after mixup
    failures: list[str] = field(default_factory=list)  # images that could not be read
    draws: tuple[Tensor, ...] = ()


class Pipeline:
    """Section 4.1: crops, mirror images and the PCA colour shift in training; given views otherwise."""

    def __init__(self, options: Options, statistics: Statistics, classes: int) -> None:
        assert options.crop is not None
        self.crop = options.crop
        self.mirror = bool(options.mirror)
        self.colour = options.colour
        self.cutout = options.cutout
        self.mixup = options.mixup
        self.classes = classes
        self.dtype = torch.bfloat16 if options.amp == "bf16" else torch.float32
        self.statistics = statistics

    def draw(self, images: Tensor) -> tuple[Tensor, ...]:
        """Random corners [N, 2], mirrored [N] and colour shift [N, 3] for images [N, H, W, 3]."""
        count, height, width, _ = images.shape
        room = torch.tensor([height - self.crop, width - self.crop])
        # A double below one, times the number of places, rounds down to a place.
        corners = (torch.rand(count, 2, dtype=torch.float64) * (room + 1)).long().minimum(room)
        mirrored = (torch.rand(count) < 0.5) & self.mirror
        return corners, mirrored, self.statistics.colour_shift(torch.randn(count, 3) * self.colour)

    def views(self, images: Tensor, ten: bool) -> Iterator[tuple[Tensor, ...]]:
        """The draws of the centre crop, or of the four corners, the centre and their mirror images."""
        count, height, width, _ = images.shape
        down, right = height - self.crop, width - self.crop
        centre = (down // 2, right // 2)
        places = [(0, 0), (0, right), (down, 0), (down, right), centre] if ten else [centre]
        for flip in (False, True) if ten else (False,):
            for place in places:
                corners = torch.tensor([place]).expand(count, 2)
                yield corners, torch.full((count,), flip), torch.zeros(count, 3)

    def apply(self, images: Tensor, draws: tuple[Tensor, ...]) -> Tensor:
        """uint8 [N, H, W, 3] -> [N, 3, crop, crop] in channels_last, on the images' device."""
        corners, mirrored, shift = (draw.to(images.device) for draw in draws)
        mean = self.statistics.mean.to(images.device)
        return ops.augment(
            images,
            corners,
            mirrored,
            shift,
            mean,
            self.crop,
            scale=self.statistics.scale,
            dtype=self.dtype,
        )

    def regularise(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Cutout and mixup, where they are asked for."""
        if self.cutout:
            self._cut_out(images)
        if self.mixup and len(images):
            v2 = extra("torchvision.transforms.v2")
            images, labels = v2.MixUp(alpha=self.mixup, num_classes=self.classes)(images, labels)
        return images, labels

    def _cut_out(self, images: Tensor) -> None:
        """A square of zeros round a random pixel of each image, cut off at the borders (DeVries and Taylor, 2017)."""
        places = torch.arange(self.crop, device=images.device)
        centres = torch.randint(self.crop, (2, len(images), 1)).to(images.device)
        half = self.cutout // 2
        rows, columns = ((places >= c - half) & (places < c - half + self.cutout) for c in centres)
        images.masked_fill_((rows[:, :, None] & columns[:, None, :]).unsqueeze(1), 0)


class TrainingBatches(Dataset[Batch]):
    """Batch (epoch, step) of the training set; with a process group, this process's share of it."""

    def __init__(
        self,
        images: Images,
        pipeline: Pipeline,
        batch: int,
        seed: int,
        on_device: bool = False,
        shard: tuple[int, int] = (0, 1),
    ) -> None:
        self.images = images
        self.pipeline = pipeline
        self.batch = batch
        self.seed = seed
        self.on_device = on_device  # leave the pipeline to the network's device
        self.shard = shard
        self._order: tuple[int, Tensor] = (-1, torch.empty(0))

    def __len__(self) -> int:
        """Steps of an epoch; the last may be short."""
        return -(-len(self.images) // self.batch)

    def order(self, epoch: int) -> Tensor:
        """The permutation of an epoch."""
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed(mixed_seed(self.seed, epoch, -1))
            self._order = epoch, torch.randperm(len(self.images), generator=generator)
        return self._order[1]

    def __getitem__(self, position: tuple[int, int]) -> Batch:
        epoch, step = position
        rows = self.order(epoch)[step * self.batch : (step + 1) * self.batch]
        rank, world = self.shard
        batch = read(self.images, rows[rank::world].tolist())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(mixed_seed(self.seed, epoch, step * world + rank))
            draws = self.pipeline.draw(batch.images)
            if self.on_device:
                return Batch(batch.images, batch.labels, batch.failures, draws)
            images = self.pipeline.apply(batch.images, draws)
            images, labels = self.pipeline.regularise(images, batch.labels)
        return Batch(images, labels, batch.failures)


class Chunks(Dataset[Batch]):
    """Images of an evaluation in order, as uint8: their views are made on the network's device."""

    def __init__(self, images: Images, batch: int) -> None:
        self.images = images
        self.batch = batch

    def __len__(self) -> int:
        return -(-len(self.images) // self.batch)

    def __getitem__(self, chunk: int) -> Batch:
        last = min(len(self.images), (chunk + 1) * self.batch)
        return read(self.images, list(range(chunk * self.batch, last)))


def read(images: Images, rows: list[int]) -> Batch:
    """The images of ``rows`` that can be read, and the names of those that cannot."""
    kept, found, failures = [], [], []
    for row in rows:
        try:
            found.append(images.read(row))
            kept.append(row)
        except Unreadable as failure:
            failures.append(str(failure))
    stacked = torch.stack(found) if found else torch.empty(0, 0, 0, 3, dtype=torch.uint8)
    return Batch(stacked, images.labels[kept], failures)


def mixed_seed(seed: int, epoch: int, step: int) -> int:
    """One seed for each (seed, epoch, step): any change of one of them gives unrelated numbers."""
    value = seed & (2**64 - 1)
    for number in (epoch, step):
        # The finaliser of SplitMix64, a bijection whose every output bit depends on every input bit.
        value = (value + 0x9E3779B97F4A7C15 * (number + 2)) & (2**64 - 1)
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
        value ^= value >> 31
    return value >> 1


class Positions(Sampler[tuple[int, int]]):
    """The (epoch, step) still to come in an epoch; workers live on from one epoch to the next."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.epoch = 0
        self.first = 0

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter([(self.epoch, step) for step in range(self.first, self.steps)])

    def __len__(self) -> int:
        return self.steps - self.first


def make_loader(
    batches: Dataset[Batch], workers: int, sampler: Iterable[Any] | None = None
) -> DataLoader[Batch]:
    """Ready batches, prepared ahead by ``workers`` processes (none: in this one)."""
    return DataLoader(
        batches,
        batch_size=None,
        num_workers=workers,
        # Its own generator: a loader that drew its seed from torch's would shift the dropout of a resumed run.
        generator=torch.Generator().manual_seed(0),
        worker_init_fn=_ignore_interrupts,
        persistent_workers=workers > 0,
        prefetch_factor=4 if workers else None,
        sampler=sampler,
    )


def _ignore_interrupts(worker: int) -> None:
    """Ctrl-C reaches every process of the terminal; the trainer alone decides."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
