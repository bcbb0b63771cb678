"""Convolution, bias and ReLU in one pass: ``conv2d_relu`` and the layer ``Conv2dReLU``."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastalex import reference
from fastalex._geometry import convolved_size, empty_in_layout, in_layout_of
from fastalex.backends import no_refusal
from fastalex.ops import _cpu_conv, _cuda, _triton
from fastalex.ops._arguments import (
    Pair,
    pair,
    remembered,
    require_floating,
    require_rank,
    require_tensor,
)
from fastalex.ops._operator import Operator, autocasting, needs_reference

_GEOMETRY = "int[2] stride, int[2] padding, int[2] dilation, int groups"


def fake_conv(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
) -> Tensor:
    sides = convolved_size(input.shape[2:], weight.shape[2:], stride, padding, dilation)
    return empty_in_layout(input, (input.shape[0], weight.shape[0], *sides))


def _fake_backward(
    grad: Tensor, output: Tensor, input: Tensor, weight: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    wants_input, wants_weight, wants_bias = arguments[-1]
    nothing = (0,)
    return (
        empty_in_layout(input, input.shape) if wants_input else input.new_empty(nothing),
        empty_in_layout(weight, weight.shape) if wants_weight else input.new_empty(nothing),
        input.new_empty((weight.shape[0],) if wants_bias else nothing),
    )


CONV_RELU = Operator(
    f"conv_relu(Tensor input, Tensor weight, Tensor? bias, {_GEOMETRY}) -> Tensor", fake_conv
)
CONV_RELU_BACKWARD = Operator(
    f"conv_relu_backward(Tensor grad, Tensor output, Tensor input, Tensor weight, {_GEOMETRY}, "
    "bool[3] output_mask) -> (Tensor, Tensor, Tensor)",
    _fake_backward,
)


def _torch_conv_relu(input: Tensor, *arguments: Any) -> Tensor:
    return in_layout_of(input, reference.conv_relu(input, *arguments))


def _torch_backward(
    grad: Tensor, output: Tensor, input: Tensor, weight: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    wants_input, wants_weight, _ = arguments[-1]
    grad_input, grad_weight, grad_bias = reference.conv_relu_backward(
        grad, output, input, weight, *arguments
    )
    return (
        in_layout_of(input, grad_input) if wants_input else grad_input,
        in_layout_of(weight, grad_weight) if wants_weight else grad_weight,
        grad_bias,
    )


CONV_RELU.kernels.add("torch", _torch_conv_relu, no_refusal)
CONV_RELU.kernels.add("cpu", _cpu_conv.conv_relu, _cpu_conv.refuse, note=_cpu_conv.plan)
CONV_RELU_BACKWARD.kernels.add("cpu", _cpu_conv.conv_relu_backward, _cpu_conv.refuse_backward)
CONV_RELU_BACKWARD.kernels.add("torch", _torch_backward, no_refusal)
CONV_RELU.kernels.add("triton", **_triton.kernel("conv_relu", "conv_relu", contested=True))
CONV_RELU_BACKWARD.kernels.add(
    "triton",
    **_triton.kernel("conv_relu_backward", "conv_relu_backward", contested=True, masks=True),
)
_cuda.add_to(CONV_RELU, CONV_RELU_BACKWARD)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, weight, bias, *geometry = inputs
    ctx.geometry = geometry
    ctx.has_bias = bias is not None
    ctx.save_for_backward(input, weight, output)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    input, weight, output = ctx.saved_tensors
    wanted = [bool(need) for need in ctx.needs_input_grad[:3]]
    wanted[2] = wanted[2] and ctx.has_bias
    grads = CONV_RELU_BACKWARD(grad, output, input, weight, *ctx.geometry, wanted)
    kept = (g if want else None for g, want in zip(grads, wanted, strict=True))
    return *kept, *(None,) * 4


CONV_RELU.register_autograd(_backward, _save)
CONV_RELU_BACKWARD.differentiate_reference(reference.conv_relu_backward, tensors=[0, 2, 3])
CONV_RELU.register_autocast(3)
CONV_RELU.register_vmap([0])
CONV_RELU_BACKWARD.register_vmap([])


def _checked_padding(padding: Any, kernel: Pair, stride: Pair, dilation: Pair) -> Any:
    """(height, width), or the four margins that an uneven padding='same' needs."""
    if not isinstance(padding, str):
        return pair(padding, "conv2d_relu: padding", 0)
    if padding == "valid":
        return 0, 0
    if padding != "same":
        raise ValueError(
            f"conv2d_relu: padding is {padding!r}; it can be 'valid', 'same', an int or a pair of ints"
        )
    if stride != (1, 1):
        raise ValueError(f"conv2d_relu: padding='same' needs stride 1, and stride is {stride}")
    reach = [dilation[d] * (kernel[d] - 1) for d in (0, 1)]
    if not (reach[0] % 2 or reach[1] % 2):
        return reach[0] // 2, reach[1] // 2
    return reach[1] // 2, reach[1] - reach[1] // 2, reach[0] // 2, reach[0] - reach[0] // 2


@remembered
def _checked_geometry(
    input: torch.Size,
    weight: torch.Size,
    bias: torch.Size | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: Any,
) -> tuple[Pair, Any, Pair]:
    """Stride, padding (see _checked_padding) and dilation as pairs, for shapes that fit together."""
    name = "conv2d_relu"
    steps, spread = pair(stride, f"{name}: stride", 1), pair(dilation, f"{name}: dilation", 1)
    pads = _checked_padding(padding, weight[2:], steps, spread)  # type: ignore[arg-type]
    outputs, channels = weight[:2]
    if not isinstance(groups, int) or groups < 1 or outputs % groups:
        raise ValueError(
            f"{name}: groups is {groups!r}; it must divide the {outputs} output channels"
        )
    if input[-3] != channels * groups:
        raise ValueError(
            f"{name}: input has {input[-3]} channels; weight {tuple(weight)} in {groups} "
            f"groups takes {channels * groups}"
        )
    if bias is not None and bias != (outputs,):
        raise ValueError(f"{name}: bias is {tuple(bias)}; it must be ({outputs},)")
    for d in (0, 1):
        reach = spread[d] * (weight[d + 2] - 1) + 1
        room = input[d - 2] + (2 * pads[d] if len(pads) == 2 else reach - 1)
        if weight[d + 2] < 1 or room < reach:
            raise ValueError(
                f"{name}: a kernel of {tuple(weight[2:])} with dilation {spread} does not "
                f"fit input {tuple(input)} with padding {pads}: pad more, or take a smaller one"
            )
    return steps, pads, spread


def _check_tensors(input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    name = "conv2d_relu"
    require_floating(input, name)
    given = (("weight", weight),) if bias is None else (("weight", weight), ("bias", bias))
    for label, tensor in given:
        require_tensor(tensor, name, label)
        if tensor.device != input.device:
            raise ValueError(
                f"{name}: input is on {input.device} and {label} on {tensor.device}; move one with .to()"
            )
        if tensor.dtype != input.dtype and not autocasting(input):
            raise TypeError(
                f"{name}: input is {input.dtype} and {label} {tensor.dtype}; they must agree: "
                "convert one with .to()"
            )
    require_rank(input, (3, 4), name)
    if weight.dim() != 4:
        raise ValueError(f"{name}: weight is {weight.dim()}-D; it must be [K, C / groups, R, S]")


def conv_arguments(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int | Pair,
    padding: int | Pair | str,
    dilation: int | Pair,
    groups: int,
) -> tuple[Any, ...]:
    """Checks conv2d's arguments; returns those of the operator, the input as a batch."""
    _check_tensors(input, weight, bias)
    bias_shape = None if bias is None else bias.shape
    steps, pads, spread = _checked_geometry(
        input.shape, weight.shape, bias_shape, stride, padding, dilation, groups
    )
    batched = input if input.dim() == 4 else input.unsqueeze(0)
    if len(pads) == 4:  # padding='same' around an even kernel
        batched, pads = F.pad(batched, pads), (0, 0)
    return batched, weight, bias, steps, pads, spread, groups


def call_as_conv(operator: Operator, arguments: tuple[Any, ...]) -> Tensor:
    """The operator's result; under autocast in the region's dtype."""
    if not autocasting(arguments[0]):
        return operator(*arguments)  # type: ignore[no-any-return]
    call = operator.reference if needs_reference() else operator.dispatch
    return call(*arguments)  # type: ignore[no-any-return]


def conv2d_relu(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Pair = 1,
    padding: int | Pair | str = 0,
    dilation: int | Pair = 1,
    groups: int = 1,
) -> Tensor:
    """``relu(conv2d(input, weight, bias, ...))`` in one pass; takes what :func:`torch.nn.functional.conv2d` takes.

    NaN stays NaN, as in torch's ReLU. The backward pass takes the ReLU's mask from the saved output. Under autocast it
    runs in the region's dtype, as conv2d does.

    Args:
        input: [N, C, H, W] or [C, H, W], float32, float64, bfloat16 or float16; the result has its layout, and
            channels_last is the fast one.
        weight: [K, C / groups, R, S].
        bias: [K] or None.
        stride, padding, dilation: an int or (height, width); padding can also be ``"valid"`` or ``"same"``.
        groups: blocks of channels convolved apart.

    Returns:
        [N, K, OH, OW] in the input's dtype and layout.

    Raises:
        TypeError: for an input that is not floating point, or a weight or bias of another dtype.
        ValueError: for shapes, devices or geometry that don't fit together, saying which and what would.

    Scratch on a CPU, with I and O the bytes of a padded input image and of its output in float32, and W of the weight:
    at most 16 MiB and, a thread, 2 MiB + 8 (I + O); for all gradients together 10 (I + O + W) more. AlexNet's layers
    take 1 to 8 MiB, and 10 to 40 MiB backward; :func:`fastalex.explain` says how much a call takes. A thread keeps up
    to 64 MiB for its next call. Packed weights are apart: they are kept while their weight lives, up to 1 GiB in all.
    """
    arguments = conv_arguments(input, weight, bias, stride, padding, dilation, groups)
    output = call_as_conv(CONV_RELU, arguments)
    return output if input.dim() == 4 else output.squeeze(0)


class Conv2dReLU(nn.Conv2d):
    """:class:`torch.nn.Conv2d` followed by ReLU, on :func:`conv2d_relu`; same constructor, same state dict."""

    def forward(self, input: Tensor) -> Tensor:
        padding = self.padding
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = (0, 0)
        return conv2d_relu(
            input,
            self.weight,
            self.bias,
            self.stride,  # type: ignore[arg-type]
            padding,  # type: ignore[arg-type]
            self.dilation,  # type: ignore[arg-type]
            self.groups,
        )
