"""Reads Caffe's files: the layers of a ``.caffemodel``, and a mean image. Needs protobuf, not Caffe.

The messages are described here field by field, from the numbers of the public caffe.proto:

- ``NetParameter``: ``layers = 2`` in files until 2014 (V1, and V0 inside them), ``layer = 100`` since;
- ``V1LayerParameter``: ``layer = 1`` (V0), ``name = 4``, ``blobs = 6``;
- ``V0LayerParameter``: ``name = 1``, ``blobs = 50``; ``LayerParameter``: ``name = 1``, ``blobs = 7``;
- ``BlobProto``: ``num, channels, height, width = 1 to 4``, ``data = 5``, ``shape = 7``, ``double_data = 8``;
- ``BlobShape``: ``dim = 1``.
"""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class WeightsError(ValueError):
    """A file of weights that is damaged, hostile or of another network; the message says which and what to do."""


# (field, number, type): packed numbers are bytes on the wire, and read as such they need no copy into Python objects.
_MESSAGES: dict[str, tuple[tuple[str, int, str], ...]] = {
    "Shape": (("dim", 1, "int64*"),),
    "Blob": (
        ("num", 1, "int32"),
        ("channels", 2, "int32"),
        ("height", 3, "int32"),
        ("width", 4, "int32"),
        ("data", 5, "bytes*"),
        ("shape", 7, "Shape"),
        ("double_data", 8, "bytes*"),
    ),
    "V0Layer": (("name", 1, "bytes"), ("blobs", 50, "Blob*")),
    "V1Layer": (("layer", 1, "V0Layer"), ("name", 4, "bytes"), ("blobs", 6, "Blob*")),
    "Layer": (("name", 1, "bytes"), ("blobs", 7, "Blob*")),
    "Net": (("layers", 2, "V1Layer*"), ("layer", 100, "Layer*")),
}
_LEGACY = ("num", "channels", "height", "width")


@functools.cache
def _message(name: str) -> Any:
    """The protobuf class of one of the messages above."""
    try:
        from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
    except ImportError as failure:
        raise ImportError(
            "reading Caffe's files needs protobuf: pip install 'fastalex[weights]'"
        ) from failure
    field_type = descriptor_pb2.FieldDescriptorProto
    numbers = {
        "int32": field_type.TYPE_INT32,
        "int64": field_type.TYPE_INT64,
        "bytes": field_type.TYPE_BYTES,
    }
    file = descriptor_pb2.FileDescriptorProto(name="fastalex_caffe.proto", package="fastalex_caffe")
    for message, fields in _MESSAGES.items():
        described = file.message_type.add(name=message)
        for field, number, kind in fields:
            repeated = kind.endswith("*")
            kind = kind.rstrip("*")
            one = described.field.add(name=field, number=number)
            one.label = field_type.LABEL_REPEATED if repeated else field_type.LABEL_OPTIONAL
            if kind in numbers:
                one.type = numbers[kind]
            else:
                one.type = field_type.TYPE_MESSAGE
                one.type_name = f".fastalex_caffe.{kind}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"fastalex_caffe.{name}"))


def _parse(name: str, path: Path) -> Any:
    kind = _message(name)
    data = path.read_bytes()
    try:
        return kind.FromString(data)
    except Exception as failure:  # DecodeError, and MemoryError for what no machine holds
        raise WeightsError(f"{path}: not a Caffe file, or a damaged one ({failure})") from failure


def _tensor(blob: Any, where: str) -> Tensor:
    """The numbers of a blob in its declared shape, float32 or float64, copied out of the message."""
    shape = list(blob.shape.dim) if blob.HasField("shape") else [getattr(blob, d) for d in _LEGACY]
    chunks, dtype = (blob.data, torch.float32) if blob.data else (blob.double_data, torch.float64)
    raw = bytearray(b"".join(chunks))
    size = dtype.itemsize
    count = math.prod(shape) if all(d > 0 for d in shape) else -1
    if count < 1 or len(raw) != count * size:
        raise WeightsError(
            f"{where}: a blob of shape {shape} has {len(raw)} bytes of {dtype}; the two must agree, and no size be "
            "less than 1"
        )
    return torch.frombuffer(raw, dtype=dtype).reshape(shape)


def layers(path: Path) -> dict[str, list[Tensor]]:
    """The blobs of every layer that has some, by the layer's name, as the file has them."""
    net = _parse("Net", path)
    found: dict[str, list[Tensor]] = {}
    for layer in (*net.layers, *net.layer):
        inner = getattr(layer, "layer", layer)  # V0 inside V1
        blobs = layer.blobs or inner.blobs
        name = (layer.name or inner.name).decode(errors="replace")
        if not blobs:
            continue
        if name in found:
            raise WeightsError(f"{path}: two layers are named {name!r}")
        found[name] = [_tensor(blob, f"{path}: layer {name!r}") for blob in blobs]
    if not found:
        raise WeightsError(f"{path}: no layer has weights; is it a .caffemodel?")
    return found


def mean_image(path: Path) -> Tensor:
    """The one blob of a ``.binaryproto`` file, [3, H, W], in Caffe's order of channels."""
    blob = _tensor(_parse("Blob", path), str(path))
    if (
        blob.dim() not in (3, 4)
        or blob.shape[-3] != 3
        or blob.numel() != math.prod(blob.shape[-3:])
    ):
        raise WeightsError(
            f"{path}: a blob of shape {list(blob.shape)}; a mean image is [1, 3, H, W]"
        )
    return blob.reshape(blob.shape[-3:]).float()
