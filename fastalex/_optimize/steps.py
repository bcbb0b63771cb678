"""What an optimised forward calls: several of the model's own modules in one operator, or in turn where that is due.

A step gets the modules themselves at each call. Whatever happened to them meanwhile (a hook, a parametrization, another
module in their place) shows there, and the step then calls them one after another, as the stock forward does.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastalex import _onnx, ops
from fastalex._geometry import convolved_size
from fastalex._optimize.fold import gain_and_shift, scaled
from fastalex.backends import forced
from fastalex.models._layers import TowerLocalResponseNorm
from fastalex.ops import _cpu_conv
from fastalex.ops._operator import needs_dispatcher
from fastalex.ops.conv_relu_max_pool import run_layers

#: A ReLU as the graph had it: a module, True for a call of the function, None for none.
ReLU = nn.Module | bool | None

_PLAIN_TENSORS = (Tensor, nn.Parameter)


def _plain(module: Any, kind: type[nn.Module]) -> bool:
    """Whether calling ``module`` does what torch's ``kind`` does with its attributes, and nothing else."""
    return type(module) is kind and not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def _plain_relu(relu: ReLU) -> bool:
    return relu is None or relu is True or _plain(relu, nn.ReLU)


def _real(input: Tensor) -> bool:
    """Whether the operators are defined for this tensor: dense, real and no subclass with rules of its own."""
    return (
        input.is_floating_point()
        and input.layout is torch.strided
        and (type(input) in _PLAIN_TENSORS or torch.compiler.is_compiling())
    )


def _dense_weight(module: nn.Module) -> bool:
    return type(module.weight) in _PLAIN_TENSORS or torch.compiler.is_compiling()


def _rectify(input: Tensor, relu: ReLU) -> Tensor:
    if relu is None:
        return input
    return F.relu(input) if isinstance(relu, bool) else relu(input)


def _rectify_own(output: Tensor) -> Tensor:
    """The ReLU of a tensor that nobody else has seen."""
    return F.relu(output, inplace=not output.requires_grad)


def convolution(
    input: Tensor,
    conv: nn.Conv2d,
    norm: nn.Module | None = None,
    relu: ReLU = None,
    other: Tensor | None = None,
) -> Tensor:
    """relu(norm(conv(input)) + other); a normalisation by running statistics is folded into the convolution."""
    if not (_plain(conv, nn.Conv2d) and _dense_weight(conv) and _real(input) and _plain_relu(relu)):
        output = conv(input)
        return _finish(output if norm is None else norm(output), relu, other)
    if norm is None:
        return _convolve(input, conv, conv.weight, None, conv.bias, relu, other)
    if not (isinstance(norm, nn.BatchNorm2d) and _folds(norm, conv.weight)):
        output = _convolve(input, conv, conv.weight, None, conv.bias)
        return _finish(norm(output), relu, other)
    gain, bias = gain_and_shift(norm, conv.bias)
    if gain.dtype is torch.float32 and _on_engine(input, conv.weight, gain, bias):
        return _convolve(input, conv, conv.weight, gain, bias, relu, other)
    return _convolve(input, conv, scaled(conv.weight, gain), None, bias, relu, other)


def convolution_add(
    input: Tensor, other: Tensor, conv: nn.Conv2d, norm: nn.Module | None = None, relu: ReLU = None
) -> Tensor:
    """relu(norm(conv(input)) + other), as at the end of a residual block."""
    if not _plain_relu(relu):
        return _finish(convolution(input, conv, norm), relu, other)
    return convolution(input, conv, norm, relu, other)


def _finish(output: Tensor, relu: ReLU, other: Tensor | None) -> Tensor:
    """relu(output + other); nobody else has seen ``output``."""
    if other is None:
        return _rectify(output, relu)
    if output.requires_grad or output.shape != other.shape or output.dtype is not other.dtype:
        return _rectify(output + other, relu)
    output += other
    own = relu is not None and _plain_relu(relu)
    return _rectify_own(output) if own else _rectify(output, relu)


def _folds(norm: nn.BatchNorm2d, weight: Tensor) -> bool:
    return (
        _plain(norm, nn.BatchNorm2d)
        and not norm.training
        and not _onnx.exporting()  # a reader of the file folds constants, or wants to train
        and norm.running_mean is not None
        and norm.running_mean.dtype is weight.dtype
    )


def _on_engine(input: Tensor, *tensors: Tensor | None) -> bool:
    """Whether the CPU engine may run the call by itself: no gradient is wanted, and nobody watches."""
    return (
        forced() in (None, "cpu")
        and not needs_dispatcher(input, *tensors)
        and input.dim() == 4
        and tensors[0] is not None
        and input.dtype is tensors[0].dtype
        and not torch.is_autocast_enabled("cpu")
    )


def _convolve(
    input: Tensor,
    conv: nn.Conv2d,
    weight: Tensor,
    gain: Tensor | None,
    bias: Tensor | None,
    relu: ReLU = None,
    other: Tensor | None = None,
) -> Tensor:
    padding: Any = conv.padding
    if conv.padding_mode != "zeros":
        input = F.pad(input, conv._reversed_padding_repeated_twice, mode=conv.padding_mode)
        padding = (0, 0)
    geometry: Any = (conv.stride, padding, conv.dilation)
    # The engine adds while its sums are in cache; what is broadcast is added after.
    added = other if other is not None and _addable(other, input, weight, *geometry) else None
    apart = other is not None and added is None
    if not isinstance(padding, str) and _on_engine(input, weight, gain, bias):
        rectifies = relu is not None and not apart
        if _cpu_conv.refuse(input, weight, bias, *geometry, conv.groups) is None:
            arguments: Any = (input, weight, gain, bias, *geometry, conv.groups, rectifies, added)
            output = _cpu_conv.inference(*arguments)
            return _finish(output, relu, other) if apart else output
    if gain is not None:
        weight = scaled(weight, gain)
    rectified = relu is not None and other is None
    function: Any = ops.conv2d_relu if rectified else F.conv2d
    output = function(input, weight, bias, *geometry, conv.groups)
    return output if rectified or other is None else _finish(output, relu, other)


def _addable(
    other: Tensor, input: Tensor, weight: Tensor, stride: Any, padding: Any, dilation: Any
) -> bool:
    """Whether the engine can add ``other``: it is like what the convolution makes, and nobody watches it."""
    if isinstance(padding, str) or input.dim() != 4 or needs_dispatcher(other):
        return False
    sides = convolved_size(input.shape[2:], weight.shape[2:], stride, padding, dilation)
    shape = (input.shape[0], weight.shape[0], *sides)
    return _real(other) and other.dtype is input.dtype and other.shape == shape


def normalized_convolution(
    inputs: list[Tensor],
    norm: nn.Module,
    relu: ReLU,
    conv: nn.Conv2d,
    after: nn.Module | None = None,
    after_relu: ReLU = None,
) -> Tensor:
    """after_relu(after(conv(relu(norm(cat(inputs)))))), as in a dense layer.

    Without gradients the CPU engine concatenates, normalises and rectifies while it reads, so that no map of that is
    ever in memory.
    """
    output = _convolve_normalized(inputs, norm, relu, conv, after, after_relu)
    if output is not None:
        return output
    input = inputs[0] if len(inputs) == 1 else torch.cat(inputs, 1)
    return convolution(_rectify(norm(input), relu), conv, after, after_relu)


def _convolve_normalized(
    inputs: list[Tensor],
    norm: Any,
    relu: ReLU,
    conv: nn.Conv2d,
    after: Any,
    after_relu: ReLU,
) -> Tensor | None:
    """The above in one call of the engine, or None where that may not be."""
    if not (
        _plain(conv, nn.Conv2d)
        and _dense_weight(conv)
        and conv.padding_mode == "zeros"
        and not isinstance(conv.padding, str)
        and _plain_relu(relu)
        and _plain_relu(after_relu)
        and _folds(norm, conv.weight)
        and (after is None or _folds(after, conv.weight))
        and all(_real(input) and input.dtype is torch.float32 for input in inputs)
    ):
        return None
    gain, shift = gain_and_shift(norm)
    scale, bias = (None, conv.bias) if after is None else gain_and_shift(after, conv.bias)
    if not all(_on_engine(input, conv.weight, gain, shift, scale, bias) for input in inputs):
        return None
    geometry: Any = (conv.stride, conv.padding, conv.dilation)
    if _cpu_conv.refuse(inputs[0], conv.weight, bias, *geometry, conv.groups) is not None:
        return None
    before = (gain, shift, relu is not None)
    arguments: Any = (conv.weight, scale, bias, *geometry, conv.groups, after_relu is not None)
    return _cpu_conv.normalized_inference(inputs, *before, *arguments)


def linear(input: Tensor, linear: nn.Linear, relu: ReLU) -> Tensor:
    """relu(linear(input))."""
    plain = _plain(linear, nn.Linear) and _dense_weight(linear) and _plain_relu(relu)
    if not (plain and _real(input)):
        return _rectify(linear(input), relu)
    return ops.linear_relu(input, linear.weight, linear.bias)


def _plain_lrn(norm: Any) -> bool:
    return _plain(norm, nn.LocalResponseNorm) or _plain(norm, TowerLocalResponseNorm)


def lrn(input: Tensor, norm: nn.LocalResponseNorm) -> Tensor:
    """norm(input)."""
    if not (_plain_lrn(norm) and _real(input)):
        return norm(input)  # type: ignore[no-any-return]
    groups = getattr(norm, "groups", 1)
    return ops.local_response_norm(input, norm.size, norm.alpha, norm.beta, norm.k, groups=groups)


def max_pool(input: Tensor, pool: nn.MaxPool2d) -> Any:
    """pool(input)."""
    if not (_plain(pool, nn.MaxPool2d) and _real(input)):
        return pool(input)
    return ops.max_pool2d(
        input,
        pool.kernel_size,
        pool.stride,
        pool.padding,
        pool.dilation,
        pool.ceil_mode,
        pool.return_indices,
    )


def relu_max_pool(input: Tensor, relu: ReLU, pool: nn.MaxPool2d) -> Any:
    """pool(relu(input)), the ReLU after the pool: the two commute, and fewer elements are left there."""
    if not (_plain_relu(relu) and _plain(pool, nn.MaxPool2d) and _real(input)):
        return pool(_rectify(input, relu))
    if pool.return_indices:  # they tell the ReLU's zeros apart
        return pool(_rectify(input, relu))
    return _rectify_own(max_pool(input, pool))


def lrn_max_pool(input: Tensor, norm: nn.LocalResponseNorm, pool: nn.MaxPool2d) -> Any:
    """pool(norm(input)) in one pass."""
    if (
        not (_plain_lrn(norm) and _plain(pool, nn.MaxPool2d) and _real(input))
        or input.dim() != 4  # of three dimensions the stock LRN takes the first for the batch
        or pool.return_indices
        or pool.dilation not in (1, (1, 1))
    ):
        return max_pool(lrn(input, norm), pool)
    return ops.lrn_max_pool2d(
        input,
        norm.size,
        norm.alpha,
        norm.beta,
        norm.k,
        pool.kernel_size,
        pool.stride,
        pool.padding,
        pool.ceil_mode,
        groups=getattr(norm, "groups", 1),
    )


def convolution_max_pool(
    input: Tensor,
    conv: nn.Conv2d,
    relu: ReLU,
    norm: nn.LocalResponseNorm | None,
    pool: nn.MaxPool2d,
) -> Any:
    """pool(norm(relu(conv(input)))) in one operator, which at inference keeps the full map in cache."""
    plain = _plain(conv, nn.Conv2d) and _plain_relu(relu) and _plain(pool, nn.MaxPool2d)
    if (
        not (plain and _dense_weight(conv) and _real(input))
        or not (norm is None or _plain_lrn(norm))
        or conv.padding_mode != "zeros"
        or input.dim() != 4
        or pool.return_indices
        or pool.dilation not in (1, (1, 1))
    ):
        output = convolution(input, conv, None, relu)
        return max_pool(output, pool) if norm is None else lrn_max_pool(output, norm, pool)
    if norm is None:
        return run_layers(input, conv, pool)
    lrn_groups = getattr(norm, "groups", 1)
    window = {"size": norm.size, "alpha": norm.alpha, "beta": norm.beta, "k": norm.k}
    return run_layers(input, conv, pool, **window, lrn_groups=lrn_groups)


def enter(input: Any) -> Any:
    """A batch of maps in channels_last, the layout of the kernels; anything else as it is."""
    if (
        isinstance(input, Tensor)
        and input.dim() == 4
        and input.is_floating_point()
        and (torch.compiler.is_compiling() or not torch._C._functorch.peek_interpreter_stack())
    ):
        return input.contiguous(memory_format=torch.channels_last)
    return input


def leave(output: Any, inputs: tuple[Any, ...]) -> Any:
    """Maps in the layout that stock layers would have given: the inputs'."""
    for input in inputs:
        if isinstance(input, Tensor) and input.dim() == 4 and not input.is_contiguous():
            return output
    return _contiguous(output)


def _contiguous(output: Any) -> Any:
    if isinstance(output, Tensor):
        return output.contiguous() if output.dim() == 4 else output
    if isinstance(output, dict):
        return type(output)((key, _contiguous(value)) for key, value in output.items())
    if isinstance(output, tuple) and hasattr(output, "_fields"):
        return type(output)(*map(_contiguous, output))
    if isinstance(output, (list, tuple)):
        return type(output)(map(_contiguous, output))
    return output
