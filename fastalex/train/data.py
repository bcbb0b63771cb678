"""The data sets: images as uint8 [H, W, 3] a little larger than the network's crop, and how they are split."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from fastalex.models.alexnet import COLUMNS, PRESETS
from fastalex.train.errors import TrainingError, extra
from fastalex.train.options import Options

#: What an option of None stands for, by data set. Digits are few: small batches and many epochs.
DEFAULTS: dict[str, dict[str, Any]] = {
    "digits": {
        "preset": "cifar10",
        "crop": 32,
        "mirror": False,
        "batch": 32,
        "lr": 0.01,
        "epochs": 60,
        "patience": 6,
        "stop": 20,
        "workers": 0,
    },
    "cifar10": {
        "preset": "cifar10",
        "crop": 32,
        "mirror": True,
        "batch": 128,
        "lr": 0.01,
        "epochs": 120,
        "patience": 8,
        "stop": 30,
        "workers": 1,
    },
    "folder": {
        "preset": "paper",
        "crop": 227,
        "mirror": True,
        "batch": 128,
        "lr": 0.01,
        "epochs": 90,
        "patience": 5,
        "stop": 15,
        "workers": 2,
    },
}
#: Fixed, so that runs with different seeds share their test set.
SPLIT_SEED = 0
RESIZED = 256  # the short side of a folder's images, as in section 2 of the paper


class Unreadable(Exception):
    """An image file that cannot be decoded; the message names it."""


class Images(Protocol):
    """Images by index, all of one size."""

    labels: Tensor

    def __len__(self) -> int: ...

    def read(self, index: int) -> Tensor:
        """uint8 [H, W, 3]; raises Unreadable."""


@dataclass
class Arrays:
    """Images in memory: uint8 [N, H, W, 3]."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> Tensor:
        return self.images[index]


class Subset:
    """Some images of others, their labels numbered anew."""

    def __init__(self, images: Images, kept: Sequence[int]) -> None:
        self.images = images
        numbers = torch.full((int(images.labels.max()) + 1,), -1)
        numbers[torch.tensor(kept)] = torch.arange(len(kept))
        self.rows = (numbers[images.labels] >= 0).nonzero().flatten()
        self.labels = numbers[images.labels[self.rows]]

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, index: int) -> Tensor:
        return self.images.read(int(self.rows[index]))


class Folder:
    """Files in a folder a class, each scaled to 256 on its short side and cut to its centre."""

    def __init__(self, root: Path) -> None:
        datasets, v2 = extra("torchvision.datasets"), extra("torchvision.transforms.v2")
        try:
            self.files = datasets.ImageFolder(root)
        except (FileNotFoundError, NotADirectoryError) as failure:
            raise TrainingError(
                f"{root}: {failure}; expected images in {root}/<class>/"
            ) from failure
        self.classes: list[str] = self.files.classes
        self.labels = torch.tensor(self.files.targets)
        self._transform = v2.Compose(
            [v2.Resize(RESIZED, antialias=True), v2.CenterCrop(RESIZED), v2.PILToTensor()]
        )

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> Tensor:
        path, _ = self.files.samples[index]
        try:
            image: Tensor = self._transform(self.files.loader(path))
        except Exception as failure:  # decoders raise whatever they meet in a broken file
            raise Unreadable(f"{path}: {failure}") from failure
        return image.permute(1, 2, 0).contiguous()


@dataclass
class Data:
    """A data set, split, with what the pipeline must know of it."""

    train: Images
    validation: Images
    test: Images
    classes: list[str]
    note: str  # where the splits come from


def native_sides(preset: str | None) -> tuple[int, ...]:
    """The sides of the images that a preset takes; none where it takes any, or is no preset."""
    if preset not in PRESETS:
        return ()
    return COLUMNS[PRESETS[preset].get("column", "paper")].sides


def load(options: Options) -> Data:
    """The data set that ``options`` name; fills in the options it has defaults for.

    Raises:
        TrainingError: where it is not there, with what to do.
    """
    sides = native_sides(options.preset)
    if options.crop is None and sides:
        options.crop = sides[0]
    for name, value in DEFAULTS[options.data].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    loaders: dict[str, Callable[[Options], Data]] = {
        "digits": _digits,
        "cifar10": _cifar10,
        "folder": _folder,
    }
    data = loaders[options.data](options)
    if options.labels is None:
        return data
    kept = options.classes(len(data.classes))
    parts = (Subset(part, kept) for part in (data.train, data.validation, data.test))
    train, validation, test = parts
    note = f"{data.note}; of them the classes {options.labels}"
    return Data(train, validation, test, [data.classes[label] for label in kept], note)


def _digits(options: Options) -> Data:
    """scikit-learn's 1,797 digits of 8x8 in 17 grey levels, enlarged to the crop's size."""
    bunch = extra("sklearn.datasets").load_digits()
    grey = torch.from_numpy(bunch.images).float().unsqueeze(1) * (255 / 16)
    large = F.interpolate(grey, size=options.crop, mode="bilinear", antialias=False)
    images = large.round().clamp(0, 255).byte().expand(-1, 3, -1, -1)
    labels = torch.from_numpy(bunch.target).long()
    rest, test = _split(labels, range(len(labels)), 360)
    train, validation = _split(labels, rest, 180)
    padded = _pad(images, (options.crop or 0) // 16)
    note = "1,257 to train, 180 to validate, 360 to test: stratified draws with a fixed seed"
    return Data(
        Arrays(padded[train], labels[train]),
        Arrays(padded[validation], labels[validation]),
        Arrays(padded[test], labels[test]),
        [str(name) for name in bunch.target_names],
        note,
    )


def _cifar10(options: Options) -> Data:
    if options.root is None:
        raise TrainingError(
            "cifar10 needs --root, the folder that holds or will hold it; --download fetches it"
        )
    cifar10 = extra("torchvision.datasets").CIFAR10
    try:
        train, test = (
            cifar10(options.root, train=part, download=options.download) for part in (True, False)
        )
    except RuntimeError as failure:
        raise TrainingError(
            f"CIFAR-10 is not whole in {options.root}: give the folder of cifar-10-batches-py as "
            "--root, or add --download"
        ) from failure
    labels = torch.tensor(train.targets)
    kept, held = _split(labels, range(len(labels)), 5000)
    padded = [_pad(torch.from_numpy(part.data).permute(0, 3, 1, 2), 4) for part in (train, test)]
    note = "45,000 to train and 5,000 to validate, drawn with a fixed seed; its own 10,000 to test"
    return Data(
        Arrays(padded[0][kept], labels[kept]),
        Arrays(padded[0][held], labels[held]),
        Arrays(padded[1], torch.tensor(test.targets)),
        list(train.classes),
        note,
    )


def _folder(options: Options) -> Data:
    if options.root is None:
        raise TrainingError("folder needs --root, a folder with train/ and val/ in it")
    root = Path(options.root)
    for part in ("train", "val"):
        if not (root / part).is_dir():
            raise TrainingError(f"{root}/{part} is missing; expected {root}/{part}/<class>/<image>")
    train, validation = Folder(root / "train"), Folder(root / "val")
    has_test = (root / "test").is_dir()
    test = Folder(root / "test") if has_test else validation
    for part, images in (("val", validation), ("test", test)):
        if images.classes != train.classes:
            raise TrainingError(f"{root}/train and {root}/{part} hold different classes")
    note = "train/, val/ and test/" if has_test else "train/ and val/; val/ is also the test set"
    return Data(train, validation, test, train.classes, note)


def _split(labels: Tensor, rows: Sequence[int], held: int) -> tuple[list[int], list[int]]:
    """(kept, held out), the latter with every class in its share."""
    split = extra("sklearn.model_selection").train_test_split
    rows = list(rows)
    kept, out = split(rows, test_size=held, stratify=labels[rows], random_state=SPLIT_SEED)
    return sorted(kept), sorted(out)


def _pad(images: Tensor, padding: int) -> Tensor:
    """uint8 [N, 3, H, W] -> [N, H + 2 padding, W + 2 padding, 3], the edge pixels repeated."""
    padded = F.pad(images.float(), (padding,) * 4, mode="replicate").byte()
    return padded.permute(0, 2, 3, 1).contiguous()
