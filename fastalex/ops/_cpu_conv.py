"""Convolution on the engine of the CPU library: its refusal, its plan in words, and the life of packed weights."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastalex import _native
from fastalex.backends import forced
from fastalex.ops import _cpu

Ints = Sequence[int]

#: The native enumeration of dtypes.
_DTYPES = {torch.float32: 0, torch.bfloat16: 2, torch.float16: 3}
_LARGEST = 1 << 24
#: Channels a group; depthwise convolutions have one.
_NARROW = 8

_forward = _cpu.native("conv_relu")
_inference = _cpu.native("conv_inference")
_normalized = _cpu.native("conv_normalized")
_backward = _cpu.native("conv_relu_backward")
_plan = _cpu.native("conv_plan")
_release = _cpu.native("release_packed")

#: id of each weight seen -> its data's address, and what releases its packed forms when it dies.
_watched: dict[int, tuple[int, weakref.ref[Tensor]]] = {}


def watch(weight: Tensor) -> None:
    """Lets what is packed of ``weight`` go when the weight does, or when its data is replaced."""
    address = weight.data_ptr()
    known = _watched.get(id(weight))
    if known is not None and known[0] == address:
        return
    if known is not None:
        _release(known[0])

    def release(dead: weakref.ref[Tensor], key: int = id(weight)) -> None:
        watched = _watched.pop(key, None)
        if watched is not None:
            _release(watched[0])

    _watched[id(weight)] = (address, weakref.ref(weight, release))


def refuse(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    groups: int,
    *rest: Any,
) -> str | None:
    if _native.error is not None:
        return _native.error
    if not input.is_cpu:
        return f"it runs on CPU tensors, and this one is on {input.device}"
    if input.dtype not in _DTYPES:
        return f"it takes float32, bfloat16 and float16, and this tensor is {input.dtype}"
    if weight.numel() == 0 or (input.numel() == 0 and input.shape[0] != 0):
        return "only the batch can be empty, and here another size is zero"
    # Every one of them is below the power of two if their union of bits is.
    bits = stride[0] | stride[1] | padding[0] | padding[1] | dilation[0] | dilation[1]
    if bits >= _LARGEST:
        return f"stride, padding and dilation go to {_LARGEST - 1}, and one is larger"
    # Measured: 16 to 30 times torch's time at one channel a group, twice at 4, the same at 8.
    if groups > 1 and weight.shape[1] <= _NARROW and forced() is None:
        return (
            f"torch is faster in groups of {_NARROW} channels or fewer; use_backend('cpu') insists"
        )
    return None


def refuse_backward(
    grad: Tensor, output: Tensor, input: Tensor, weight: Tensor, *geometry: Any
) -> str | None:
    return refuse(input, weight, None, *geometry)


def conv_relu(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    groups: int,
) -> Tensor:
    watch(weight)
    numbers = _cpu.numbers(stride, padding, dilation, groups)
    return _forward(input, weight, bias, numbers)  # type: ignore[no-any-return]


def inference(
    input: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    groups: int,
    relu: bool,
    residual: Tensor | None = None,
) -> Tensor:
    """conv2d(input, weight * scale) + bias + residual, the scale by output channel in float32; no gradient."""
    watch(weight)
    numbers = _cpu.numbers(stride, padding, dilation, groups, relu)
    return _inference(input, weight, scale, bias, residual, numbers)  # type: ignore[no-any-return]


def normalized_inference(
    inputs: Sequence[Tensor],
    gain: Tensor,
    shift: Tensor,
    relu_before: bool,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    groups: int,
    relu: bool,
) -> Tensor:
    """conv2d(relu(cat(inputs, 1) * gain + shift), weight * scale) + bias, gain and shift by channel; no gradient."""
    watch(weight)
    numbers = _cpu.numbers(stride, padding, dilation, groups, relu_before, relu)
    return _normalized(list(inputs), gain, shift, weight, scale, bias, numbers)  # type: ignore[no-any-return]


def conv_relu_backward(
    grad: Tensor,
    output: Tensor,
    input: Tensor,
    weight: Tensor,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    groups: int,
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    watch(weight)
    numbers = _cpu.numbers(stride, padding, dilation, groups, tuple(output_mask))
    return _backward(grad, output, input, weight, numbers)  # type: ignore[no-any-return]


def plan(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    groups: int,
    direction: int = 0,
) -> str:
    """What the engine would do, in words: algorithm, tiles, blocking, predicted time."""
    sizes = (*input.shape, weight.shape[0], *weight.shape[2:])
    numbers = (direction, _DTYPES[input.dtype], *sizes, *stride, *padding, *dilation, groups)
    text: str = _plan(_cpu.numbers(*numbers))
    held, limit = (_cpu.native(name)() / 1e6 for name in ("packed_bytes", "packed_limit"))
    return f"{text}packed weights: {held:.1f} MB held, at most {limit:.0f} MB"
