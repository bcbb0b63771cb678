"""Weights that exist: torchvision's and other state dicts, safetensors and Caffe's, into a model or not at all."""

from __future__ import annotations

import dataclasses
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastalex.models import _caffe
from fastalex.models._caffe import WeightsError as WeightsError

#: Where checkpoints keep their state dict, and what wrappers put before every key.
_NESTED = ("state_dict", "model_state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.")


def load_weights(
    model: nn.Module, path: str | os.PathLike[str], *, keep_head: bool = False
) -> nn.Module:
    """Copies the weights in a file into ``model``: all of them, or an error and none.

    Reads ``.caffemodel`` (with protobuf, not Caffe), ``.safetensors`` (with safetensors) and torch's files, never
    executing what they hold: plain state dicts, checkpoints that nest one under ``"state_dict"``, ``"model"`` or
    ``"model_state_dict"``, keys that DataParallel or ``torch.compile`` prefixed.

    A network trained with Caffe saw BGR images; its first convolution is turned round, so that the model takes RGB.
    See :data:`PREPROCESSING` for what each network takes. A layer that fine-tuning renamed is recognised as the last.

    Args:
        model: one of :mod:`fastalex.models`, fused or stock, or any module whose names fit the file's.
        path: the file.
        keep_head: leave the model's last layer as it is, whatever the file's has, to fine-tune on other classes.

    Returns:
        ``model``.

    Raises:
        WeightsError: for a damaged or hostile file, or one that is another network's: which layer, and what fits.
        OSError: for a file that cannot be read.
        ImportError: for a format whose library is not installed.
        ValueError: for a model on the meta device.
    """
    path = Path(path)
    heads = _heads(model)
    caffe = path.suffix == ".caffemodel"
    state = _from_caffe(model, path, heads) if caffe else _named_tensors(_read(path), path)
    target = model.state_dict()
    # What only a network with auxiliary heads has, as "loss1.fc.weight" or Caffe's "loss1/fc".
    spare = tuple(name + mark for name in getattr(model, "optional", ()) for mark in "./")
    state = {k: v for k, v in state.items() if k in target or not k.startswith(spare)}
    if keep_head:
        state = {k: v for k, v in state.items() if not k.startswith(heads)}
        state.update({k: v for k, v in target.items() if k.startswith(heads)})
    if any(value.is_meta for value in target.values()):
        raise ValueError(
            "the model is on the meta device, which holds no weights: to_empty(device=...) first"
        )
    _check(state, target, heads, path)
    model.load_state_dict(state)
    return model


def _heads(model: nn.Module) -> tuple[str, ...]:
    """Prefixes of the last layers' keys."""
    named = [
        name
        for name, module in model.named_modules()
        if getattr(module, "weight", None) is not None
    ]
    return tuple(f"{name}." for name in getattr(model, "heads", named[-1:]))


def _read(path: Path) -> object:
    """What a torch or safetensors file holds."""
    with path.open("rb"):  # an OSError is the caller's, not a damaged file
        pass
    if path.suffix == ".safetensors":
        try:
            from safetensors.torch import load_file
        except ImportError as failure:
            raise ImportError(
                "reading safetensors needs its library: pip install 'fastalex[weights]'"
            ) from failure
        try:
            return load_file(path)
        except Exception as failure:
            raise WeightsError(
                f"{path}: not a safetensors file, or a damaged one ({failure})"
            ) from failure
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                # torch stores; a deflated entry can unpack to more than memory holds.
                if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                    raise WeightsError(
                        f"{path}: a compressed archive; torch.save does not compress"
                    )
        return torch.load(path, map_location="cpu", weights_only=True)
    except WeightsError:
        raise
    except Exception as failure:
        reason = str(failure).partition("\n")[0]
        raise WeightsError(
            f"{path}: not a file of plain tensors that torch can read, or a damaged one ({reason})"
        ) from failure


def _named_tensors(content: object, path: Path) -> dict[str, Tensor]:
    """The state dict in a checkpoint, under the names it had before wrappers."""
    for key in _NESTED:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content:
        raise WeightsError(
            f"{path}: holds a {type(content).__name__} of {len(content) if isinstance(content, Mapping) else 'no'} "
            "tensors; it must be a state dict, or a checkpoint with one under " + ", ".join(_NESTED)
        )
    state = {}
    for key, value in content.items():
        if not isinstance(key, str) or type(value) not in (Tensor, nn.Parameter):
            shown = repr(key[:80]) if isinstance(key, str) else f"of a {type(key).__name__} key"
            raise WeightsError(
                f"{path}: the entry {shown} is a {type(value).__name__}; a state dict holds tensors by name"
            )
        name = key
        while name.startswith(_PREFIXES):
            name = name.partition(".")[2]
        if name in state:
            raise WeightsError(
                f"{path}: two entries are named {name[:80]!r} without their prefixes"
            )
        state[name] = value
    return state


def _from_caffe(model: nn.Module, path: Path, heads: tuple[str, ...]) -> dict[str, Tensor]:
    """A .caffemodel's blobs under the names and in the shapes of the model's parameters."""
    layers = _caffe.layers(path)
    modules = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear))
    }
    rename = getattr(model, "caffe_name", lambda name: name.rpartition(".")[2])
    names = {name: rename(name) for name in modules}
    unknown = [name for name in layers if name not in names.values()]
    missing = [name for name in modules if names[name] not in layers]
    if len(unknown) == 1 and [f"{name}." for name in missing] == list(heads[:1]):
        names[missing[0]] = unknown[0]  # the last layer, renamed for fine-tuning
    state: dict[str, Tensor] = {}
    first = True
    for name, module in modules.items():
        for key, blob in zip(("weight", "bias"), layers.pop(names[name], ()), strict=False):
            rank = getattr(module, key).dim() if getattr(module, key) is not None else 1
            while blob.dim() > rank and blob.shape[0] == 1:  # legacy blobs are all 4-D
                blob = blob[0]
            if first and key == "weight" and blob.dim() == 4 and blob.shape[1] == 3:
                blob = blob.flip(1)  # BGR to RGB
            state[f"{name}.{key}"] = blob
        first = False
    state.update({name: blobs[0] for name, blobs in layers.items()})  # for the message on them
    return state


def _check(
    state: Mapping[str, Tensor], target: Mapping[str, Tensor], heads: tuple[str, ...], path: Path
) -> None:
    """Raises unless every entry of the state dict fits."""
    missing = [key for key in target if key not in state]
    unknown = [key for key in state if key not in target]
    if missing or unknown:
        raise WeightsError(
            f"{path}: weights of another network: {_some(missing)} missing, {_some(unknown)} not in the model"
        )
    for key, value in state.items():
        expected = target[key]
        if value.shape != expected.shape:
            hint = ""
            if key.startswith(heads) and value.shape[1:] == expected.shape[1:]:
                hint = (
                    f": build the model with num_classes={value.shape[0]}, or pass keep_head=True to leave the "
                    "model's last layer as it is"
                )
            raise WeightsError(
                f"{path}: {key} is {list(value.shape)} and the model's {list(expected.shape)}{hint}"
            )
        if (
            value.is_floating_point() != expected.is_floating_point()
            or value.is_complex()
            or value.is_quantized
            or value.layout != torch.strided
            or value.is_meta
        ):
            raise WeightsError(
                f"{path}: {key} is a {value.layout} tensor of {value.dtype} on {value.device}; the model's is a "
                f"strided one of {expected.dtype}"
            )


def _some(names: list[str]) -> str:
    if not names:
        return "none"
    shown = ", ".join(name[:80] for name in names[:4])
    return f"{shown}, and {len(names) - 4} more" if len(names) > 4 else shown


@dataclasses.dataclass(frozen=True, eq=False)
class Preprocessing:
    """What a network was trained to see. Called with RGB images [N, 3, H, W] from 0 to 255, gives its input.

    Attributes:
        crop: side of the square cut from the centre.
        resize: side the image is scaled to before.
        keep_aspect: scale the short side alone (torchvision), or both (Caffe).
        scale: factor of the pixels before the mean is subtracted.
        mean: [R, G, B], or an image [3, resize, resize] as :func:`load_mean` reads it.
        std: divisor after the subtraction.
    """

    crop: int
    resize: int = 256
    keep_aspect: bool = False
    scale: float = 1.0
    mean: tuple[float, float, float] | Tensor = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)

    def __post_init__(self) -> None:
        if not 0 < self.crop <= self.resize:
            raise ValueError(
                f"crop is {self.crop}; it must be positive, and at most resize, {self.resize}"
            )

    def __call__(self, images: Tensor) -> Tensor:
        """Scales, subtracts the mean, divides and cuts out the centre.

        Raises:
            ValueError: for another shape.
        """
        if images.dim() != 4 or images.shape[1] != 3:
            raise ValueError(f"images are [N, 3, H, W] in RGB, got {tuple(images.shape)}")
        height, width = images.shape[-2:]
        short = min(height, width) if self.keep_aspect else 0
        size = [side * self.resize // (short or side) for side in (height, width)]
        pixels = F.interpolate(images.float(), size, mode="bilinear", antialias=True)
        mean = torch.as_tensor(self.mean, dtype=torch.float32, device=images.device)
        std = torch.tensor(self.std, device=images.device)
        pixels = pixels * self.scale - (mean if mean.dim() == 3 else mean[:, None, None])
        pixels = pixels / std[:, None, None]
        top, left = (round((side - self.crop) / 2) for side in size)
        return pixels[..., top : top + self.crop, left : left + self.crop]


def load_mean(path: str | os.PathLike[str]) -> Tensor:
    """The mean image in Caffe's ``.binaryproto`` file, turned from BGR to RGB: [3, H, W], for :class:`Preprocessing`.

    Raises:
        WeightsError: for a damaged file, or one of another shape.
        OSError: for a file that cannot be read.
        ImportError: where protobuf is not installed.
    """
    return _caffe.mean_image(Path(path)).flip(0)


#: The mean of ILSVRC-2012's training images, as Caffe's files give it.
_ILSVRC_MEAN = (122.67891434, 116.66876762, 104.00698793)
_CAFFE = Preprocessing(crop=227, mean=_ILSVRC_MEAN)
PREPROCESSING = {
    "caffenet": _CAFFE,
    "bvlc": _CAFFE,
    "googlenet": Preprocessing(crop=224, mean=(123.0, 117.0, 104.0)),
    "torchvision": Preprocessing(
        crop=224,
        keep_aspect=True,
        scale=1 / 255,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
    ),
}
"""By network. A Places network takes its own mean: ``dataclasses.replace(..., mean=load_mean(path))``."""
