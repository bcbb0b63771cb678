"""Writes Caffe's files byte by byte from the wire format, so that the reader is tested against the format itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from torch import Tensor, nn

Blobs = Iterable[Tensor]


def varint(value: int) -> bytes:
    value &= (1 << 64) - 1  # negative numbers take ten bytes
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def number(field: int, value: int) -> bytes:
    return varint(field << 3) + varint(value)


def chunk(field: int, data: bytes) -> bytes:
    return varint(field << 3 | 2) + varint(len(data)) + data


def blob(tensor: Tensor, *, legacy: bool = False, double: bool = False) -> bytes:
    """A BlobProto: num, channels, height and width as Caffe wrote them until 2014, or a shape."""
    shape: Sequence[int] = tensor.shape
    if legacy:
        shape = (*(1,) * (4 - len(shape)), *shape)
        out = b"".join(number(field, size) for field, size in enumerate(shape, 1))
    else:
        out = chunk(7, chunk(1, b"".join(varint(size) for size in shape)))
    if double:
        return out + chunk(8, tensor.double().numpy().tobytes())
    return out + chunk(5, tensor.float().numpy().tobytes())


def layer(name: str, blobs: Blobs, **kind: bool) -> bytes:
    """LayerParameter, as Caffe writes it since 2014; the loss layers of a net have no blobs."""
    body = chunk(1, name.encode()) + chunk(2, b"Convolution")
    return chunk(100, body + b"".join(chunk(7, blob(b, **kind)) for b in blobs))


def v1_layer(name: str, blobs: Blobs, **kind: bool) -> bytes:
    """V1LayerParameter; 4 is the CONVOLUTION of its enumeration."""
    body = chunk(2, b"data") + chunk(4, name.encode()) + number(5, 4)
    return chunk(2, body + b"".join(chunk(6, blob(b, legacy=True, **kind)) for b in blobs))


def v0_layer(name: str, blobs: Blobs, **kind: bool) -> bytes:
    """The first form: a V0LayerParameter inside a V1LayerParameter."""
    body = chunk(1, name.encode()) + chunk(2, b"conv")
    inner = body + b"".join(chunk(50, blob(b, legacy=True, **kind)) for b in blobs)
    return chunk(2, chunk(1, inner) + chunk(2, b"data"))


def net(*layers: bytes) -> bytes:
    return chunk(1, b"net") + b"".join(layers)


FORMS = {
    "v2": layer,
    "v2-legacy": lambda *args: layer(*args, legacy=True),
    "v2-double": lambda *args: layer(*args, double=True),
    "v1": v1_layer,
    "v0": v0_layer,
}


def last_part(path: str) -> str:
    return path.rpartition(".")[2]


def of_model(model: nn.Module, names: Callable[[str], str] = last_part, form: str = "v2") -> bytes:
    """The model as Caffe would have written it: for BGR images, among layers without weights."""
    layers: list[bytes] = []
    for path, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            weight = module.weight.detach()
            weight = weight.flip(1) if not layers else weight
            layers.append(FORMS[form](names(path), [weight, module.bias.detach()]))
    return net(layer("data", []), *layers, layer("prob", []))
