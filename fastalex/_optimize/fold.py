"""A batch normalisation as gain and shift, and the weights it was folded into, kept while both stand unchanged."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

#: By the convolution's weight: the values the result was made from, and the result.
_kept: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def gain_and_shift(norm: nn.BatchNorm2d, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """norm(x + bias) = x g + s with g = gamma / sqrt(var + eps), s = (bias - mean) g + beta."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    gain = torch.rsqrt(norm.running_var + norm.eps)
    if norm.weight is not None:
        gain = gain * norm.weight
    shift = -norm.running_mean if bias is None else bias - norm.running_mean
    return gain, shift * gain if norm.bias is None else torch.addcmul(norm.bias, shift, gain)


def scaled(weight: Tensor, gain: Tensor) -> Tensor:
    """The weight times the gain of its output channel.

    It is kept by its values: versions miss what is written through ``.data``, by fused optimisers and by a
    normalisation that trains.
    """
    if _must_compute(weight, gain):
        return weight * gain.reshape(-1, 1, 1, 1)
    kept = _kept.get(weight)
    if kept is None or not (torch.equal(kept[1], gain) and torch.equal(kept[0], weight)):
        with torch.no_grad():
            kept = (weight.detach().clone(), gain.detach(), weight * gain.reshape(-1, 1, 1, 1))
        _kept[weight] = kept
    return kept[2]  # type: ignore[no-any-return]


def _must_compute(weight: Tensor, gain: Tensor) -> bool:
    """Whether gradients, a trace or a transform must see the product, or no values are there to compare."""
    return bool(
        torch.compiler.is_compiling()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
        or weight.is_meta
        or (torch.is_grad_enabled() and (weight.requires_grad or gain.requires_grad))
    )
