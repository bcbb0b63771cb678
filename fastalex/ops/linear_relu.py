"""A fully connected layer, its bias and its ReLU in one pass: ``linear_relu``, ``linear``, and their layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastalex import reference
from fastalex.backends import forced, no_refusal
from fastalex.ops import _cpu, _cuda, _triton
from fastalex.ops._arguments import require_floating, require_tensor
from fastalex.ops._operator import Operator, autocasting, needs_reference


def _fake(input: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
    return input.new_empty((*input.shape[:-1], weight.shape[0]))


def _fake_backward(
    grad: Tensor, output: Tensor | None, input: Tensor, weight: Tensor, output_mask: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (input.shape, weight.shape, weight.shape[:1])
    made = [
        input.new_empty(shape if wanted else (0,))
        for shape, wanted in zip(shapes, output_mask, strict=True)
    ]
    return made[0], made[1], made[2]


LINEAR_RELU = Operator(
    "linear_relu(Tensor input, Tensor weight, Tensor? bias, bool relu) -> Tensor", _fake
)
LINEAR_RELU_BACKWARD = Operator(
    "linear_relu_backward(Tensor grad, Tensor? output, Tensor input, Tensor weight, "
    "bool[3] output_mask) -> (Tensor, Tensor, Tensor)",
    _fake_backward,
)


def _torch_linear_relu(*arguments: Any) -> Tensor:
    return reference.linear_relu(*arguments).contiguous()


def _torch_backward(*arguments: Any) -> tuple[Tensor, ...]:
    return tuple(gradient.contiguous() for gradient in reference.linear_relu_backward(*arguments))


#: Rows up to which a layer waits for its weights, so that half types cost half the time; with more, torch's tiles win.
_FEW_ROWS = 4


def _refuse(input: Tensor, weight: Tensor, *rest: Any) -> str | None:
    reason = _unable(input, weight)
    if reason is not None or forced() is not None or input.dtype is torch.float32:
        return reason
    if input.shape[:-1].numel() > _FEW_ROWS:
        return f"of {input.dtype} with more than {_FEW_ROWS} rows torch's own is faster"
    return None


def _unable(input: Tensor, weight: Tensor) -> str | None:
    if input.dtype is torch.float64:
        return "it takes float32, bfloat16 and float16, and this tensor is torch.float64"
    if not weight.is_contiguous():
        return "it reads weight [O, I] row by row, and this one is transposed or sliced: make it contiguous"
    if input.numel() >= 2**30 and input.shape[:-1].numel() >= 2**30 - 1:
        return "it takes fewer than 2^30 rows: split the batch"
    return _cpu.refuse(input)


def _refuse_backward(
    grad: Tensor, output: Tensor | None, input: Tensor, weight: Tensor, output_mask: list[bool]
) -> str | None:
    reason = _unable(input, weight)
    if reason is not None or forced() is not None:
        return reason
    if input.dtype is not torch.float32:
        return f"of {input.dtype} torch's own gradients are faster"
    if input.shape[:-1].numel() <= _FEW_ROWS:
        return f"with {_FEW_ROWS} rows or fewer torch's own gradients are as fast"
    return None


_native_linear_relu = _cpu.native("linear_relu")
_native_backward = _cpu.native("linear_relu_backward")


def _cpu_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _native_backward(*arguments[:-1], *arguments[-1])  # type: ignore[no-any-return]


LINEAR_RELU.kernels.add("torch", _torch_linear_relu, no_refusal)
LINEAR_RELU_BACKWARD.kernels.add("torch", _torch_backward, no_refusal)
LINEAR_RELU.kernels.add("cpu", _native_linear_relu, _refuse)
LINEAR_RELU_BACKWARD.kernels.add("cpu", _cpu_backward, _refuse_backward)
LINEAR_RELU.kernels.add("triton", **_triton.kernel("linear_relu", "linear_relu", contested=True))
LINEAR_RELU_BACKWARD.kernels.add(
    "triton", **_triton.kernel("linear_relu", "linear_relu_backward", contested=True)
)
_cuda.add_to(LINEAR_RELU, LINEAR_RELU_BACKWARD)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, weight, bias, relu = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(input, weight, output if relu else None)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    input, weight, output = ctx.saved_tensors
    wanted = [bool(need) for need in ctx.needs_input_grad[:3]]
    wanted[2] = wanted[2] and ctx.has_bias
    grads = LINEAR_RELU_BACKWARD(grad, output, input, weight, wanted)
    return *(g if want else None for g, want in zip(grads, wanted, strict=True)), None


LINEAR_RELU.register_autograd(_backward, _save)
LINEAR_RELU.register_autocast(3)
LINEAR_RELU.register_vmap([0])
LINEAR_RELU_BACKWARD.differentiate_reference(reference.linear_relu_backward, tensors=[0, 2, 3])
LINEAR_RELU_BACKWARD.register_vmap([])


def _check(input: Tensor, weight: Tensor, bias: Tensor | None, name: str) -> None:
    require_floating(input, name)
    require_tensor(weight, name, "weight")
    if weight.dim() != 2:
        raise ValueError(f"{name}: weight is {weight.dim()}-D; it must be [O, I]")
    outputs, inputs = weight.shape
    if input.dim() < 1 or input.shape[-1] != inputs:
        raise ValueError(
            f"{name}: input is {tuple(input.shape)}; weight {tuple(weight.shape)} takes [..., {inputs}]"
        )
    if bias is not None:
        require_tensor(bias, name, "bias")
        if bias.shape != (outputs,):
            raise ValueError(f"{name}: bias is {tuple(bias.shape)}; it must be ({outputs},)")
    for label, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.device != input.device:
            raise ValueError(
                f"{name}: input is on {input.device} and {label} on {tensor.device}; move one with .to()"
            )
        if tensor is not None and tensor.dtype != input.dtype and not autocasting(input):
            raise TypeError(
                f"{name}: input is {input.dtype} and {label} {tensor.dtype}; they must agree: "
                "convert one with .to()"
            )


def _call(input: Tensor, weight: Tensor, bias: Tensor | None, relu: bool, name: str) -> Tensor:
    _check(input, weight, bias, name)
    arguments = (input if input.dim() > 1 else input.unsqueeze(0), weight, bias, relu)
    run = LINEAR_RELU.dispatch if autocasting(input) and not needs_reference() else LINEAR_RELU
    output: Tensor = run(*arguments)
    return output if input.dim() > 1 else output.squeeze(0)


def linear_relu(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``relu(linear(input, weight, bias))`` in one pass; takes what :func:`torch.nn.functional.linear` takes.

    The CPU kernels read the weight as it lies in memory, in its own dtype: nothing is packed or kept, so it may
    change at every call. NaN stays NaN, as in torch's ReLU. The backward pass takes the ReLU's mask from the saved
    output. Under autocast it runs in the region's dtype, as linear does.

    Args:
        input: [..., I], float32, float64, bfloat16 or float16; the half types accumulate in float32.
        weight: [O, I], of the input's dtype.
        bias: [O] or None.

    Returns:
        [..., O] in the input's dtype, contiguous.

    Raises:
        TypeError: for an input that is not floating point, or a weight or bias of another dtype.
        ValueError: for shapes or devices that don't fit together, saying which and what would.

    Scratch on a CPU, forward or backward: at most 2 MiB, 4 MiB a thread and 4 (I + O) bytes a row.
    """
    return _call(input, weight, bias, True, "linear_relu")


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """:func:`linear_relu` without the ReLU, on the same kernels: stands in for :func:`torch.nn.functional.linear`."""
    return _call(input, weight, bias, False, "linear")


class LinearReLU(nn.Linear):
    """:class:`torch.nn.Linear` followed by ReLU, on :func:`linear_relu`; same constructor, same state dict."""

    def forward(self, input: Tensor) -> Tensor:
        return linear_relu(input, self.weight, self.bias)


class Linear(nn.Linear):
    """:class:`torch.nn.Linear` on :func:`linear`; same constructor, same state dict."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)
