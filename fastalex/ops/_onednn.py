"""Convolution with bias and ReLU on oneDNN, as torch exposes it, with each weight packed once per version."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakTensorKeyDictionary

from fastalex._geometry import in_layout_of

Ints = Sequence[int]

#: Multiply-adds below which a oneDNN call costs more than it saves: it takes tens of microseconds to set up.
_SMALLEST = 1_000_000


class PackedWeights:
    """Weights in oneDNN's own layout, kept as long as the weight lives and its version stands."""

    def __init__(self) -> None:
        self._packed: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def get(
        self, weight: Tensor, shape: Ints, stride: Ints, padding: Ints, dilation: Ints, groups: int
    ) -> Tensor:
        """``weight`` packed for inputs of ``shape``."""
        if weight.is_inference():  # has no version counter to tell a change by
            return _pack(weight, shape, stride, padding, dilation, groups)
        version = (weight._version, weight.data_ptr())
        geometry = (tuple(shape), tuple(stride), tuple(padding), tuple(dilation), groups)
        kept = self._packed.get(weight)
        if kept is None or kept[0] != version or kept[1] != geometry:
            packed = _pack(weight, shape, stride, padding, dilation, groups)
            # The alias keeps the storage: memory freed by `weight.data = ...` could return as the next.
            kept = (version, geometry, packed, weight.detach())
            self._packed[weight] = kept
        found: Tensor = kept[2]
        return found

    def clear(self, *unused: Any) -> None:
        """Forgets every weight, after an optimiser step: torch's fused ones keep the version."""
        if not torch.compiler.is_compiling():  # a compiled step moves the version on
            self._packed.clear()


def _pack(
    weight: Tensor, shape: Ints, stride: Ints, padding: Ints, dilation: Ints, groups: int
) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_convolution_weight(
        weight.detach(), padding, stride, dilation, groups, shape
    )
    return packed


_weights = PackedWeights()
register_optimizer_step_post_hook(_weights.clear)


def refuse(input: Tensor, weight: Tensor, *rest: Any) -> str | None:
    if not input.is_cpu:
        return f"it runs on CPU tensors, and this one is on {input.device}"
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return "this torch has no oneDNN, or torch.backends.mkldnn.enabled is off"
    if input.dtype is torch.bfloat16:
        if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return "this CPU has no bfloat16 arithmetic that oneDNN uses (AVX-512 or better)"
    elif input.dtype is not torch.float32:
        return f"it takes float32 and bfloat16, and this tensor is {input.dtype}"
    pixels = input.numel() // max(input.shape[1], 1)
    if pixels * weight.numel() < _SMALLEST:
        return "the convolution is so small that a oneDNN call costs more than it saves"
    return None


def conv_relu(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    groups: int,
) -> Tensor:
    """relu(conv2d(input, weight) + bias); oneDNN's own ReLU would turn NaN into zero."""
    packed = _weights.get(weight, input.shape, stride, padding, dilation, groups)
    output: Tensor = torch.ops.mkldnn._convolution_pointwise(
        input.detach(), packed, bias, padding, stride, dilation, groups, "none", [], ""
    )
    # With packed weights the output is channels_last whatever the input is.
    return in_layout_of(input, output.relu_())
