"""Max-pooling that saves one byte an output: ``max_pool2d`` and the layer ``MaxPool2d``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastalex import reference
from fastalex._geometry import empty_in_layout, offsets_dtype, pooled_size
from fastalex.backends import no_refusal
from fastalex.ops import _cpu, _cuda, _torch, _triton
from fastalex.ops._arguments import Pair, pair, remembered, require_tensor
from fastalex.ops._operator import Operator, gradients_may_follow

Geometry = tuple[Pair, Pair, Pair, Pair]  # kernel, stride, padding, dilation, each (height, width)

_GEOMETRY = "int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation"


def fake_pool(
    input: Tensor, geometry: Geometry, ceil_mode: bool, save_offsets: bool
) -> tuple[Tensor, Tensor]:
    """Empty results of a pool."""
    kernel, stride, padding, dilation = geometry
    height, width = (
        pooled_size(input.shape[d + 2], kernel[d], stride[d], padding[d], dilation[d], ceil_mode)
        for d in (0, 1)
    )
    shape = (input.shape[0], input.shape[1], height, width)
    output = empty_in_layout(input, shape)
    if not save_offsets:
        return output, input.new_empty(0, dtype=torch.uint8)
    return output, empty_in_layout(input, shape, offsets_dtype(kernel))


def _fake(
    input: Tensor,
    kernel_size: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    ceil_mode: bool,
    save_offsets: bool,
) -> tuple[Tensor, Tensor]:
    geometry = (kernel_size, stride, padding, dilation)
    return fake_pool(input, geometry, ceil_mode, save_offsets)


def _fake_backward(grad: Tensor, offsets: Tensor, input_size: Pair, *geometry: Pair) -> Tensor:
    return empty_in_layout(offsets, (*grad.shape[:2], *input_size), grad.dtype)


MAX_POOL = Operator(
    f"max_pool(Tensor input, {_GEOMETRY}, bool ceil_mode, bool save_offsets) -> (Tensor, Tensor)",
    _fake,
)
MAX_POOL_BACKWARD = Operator(
    f"max_pool_backward(Tensor grad, Tensor offsets, int[2] input_size, {_GEOMETRY}) -> Tensor",
    _fake_backward,
)

_native_max_pool = _cpu.native("max_pool")
_native_max_pool_inference = _cpu.native("max_pool_inference")
_native_max_pool_backward = _cpu.native("max_pool_backward")


def _cpu_max_pool(
    input: Tensor,
    kernel_size: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    ceil_mode: bool,
    save_offsets: bool,
) -> tuple[Tensor, Tensor]:
    numbers = _cpu.numbers(kernel_size, stride, padding, dilation, ceil_mode)
    if save_offsets:
        return _native_max_pool(input, numbers)  # type: ignore[no-any-return]
    return _native_max_pool_inference(input, numbers), _cpu.NOTHING


def _cpu_max_pool_backward(
    grad: Tensor, offsets: Tensor, input_size: Pair, *geometry: Pair
) -> Tensor:
    numbers = _cpu.numbers(*geometry, input_size)
    return _native_max_pool_backward(grad, offsets, numbers)  # type: ignore[no-any-return]


MAX_POOL.kernels.add("torch", _torch.in_layout(reference.max_pool, 0), no_refusal)
MAX_POOL_BACKWARD.kernels.add("torch", _torch.in_layout(reference.max_pool_backward, 1), no_refusal)
MAX_POOL.kernels.add("cpu", _cpu_max_pool, _cpu.refuse)
MAX_POOL_BACKWARD.kernels.add("cpu", _cpu_max_pool_backward, _cpu.refuse)
MAX_POOL.kernels.add("triton", **_triton.kernel("max_pool", "max_pool"))
MAX_POOL_BACKWARD.kernels.add(
    "triton", **_triton.kernel("max_pool", "max_pool_backward", masks=True)
)
_cuda.add_to(MAX_POOL, MAX_POOL_BACKWARD)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    input, *geometry, _, save_offsets = inputs
    ctx.geometry = geometry
    ctx.input_size = input.shape[-2:]
    ctx.save_for_backward(output[1] if save_offsets else None)


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    (offsets,) = ctx.saved_tensors
    if offsets is None:
        raise RuntimeError("max_pool ran with save_offsets=False, so it has no gradient")
    return MAX_POOL_BACKWARD(grad, offsets, ctx.input_size, *ctx.geometry), *(None,) * 6


MAX_POOL.register_autograd(_backward, _save, beside=True)
MAX_POOL.register_vmap([0])
MAX_POOL_BACKWARD.differentiate_reference(reference.max_pool_backward, tensors=[0])
MAX_POOL_BACKWARD.register_vmap([0, 1])


@remembered
def pool_geometry(
    shape: torch.Size,
    kernel_size: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    ceil_mode: bool,
    name: str,
    labels: tuple[str, str, str] = ("kernel_size", "stride", "padding"),
) -> Geometry:
    """Checks a pool over an input of ``shape``; returns (height, width) pairs, the stride defaulted to the kernel's.

    ``labels``: what the function ``name`` calls the first three.
    """
    if len(shape) not in (3, 4):
        raise ValueError(f"{name}: input is {len(shape)}-D {tuple(shape)}; it must be 3-D or 4-D")
    kernel = pair(kernel_size, f"{name}: {labels[0]}", 1)
    defaulted = stride is None or (isinstance(stride, (tuple, list)) and not stride)
    steps = kernel if defaulted else pair(stride, f"{name}: {labels[1]}", 1)
    pads = pair(padding, f"{name}: {labels[2]}", 0)
    spread = pair(dilation, f"{name}: dilation", 1)
    if pads[0] > kernel[0] // 2 or pads[1] > kernel[1] // 2:
        raise ValueError(
            f"{name}: {labels[2]} is {padding!r}; it must be at most half of {labels[0]} "
            f"{kernel_size!r}"
        )
    if not isinstance(ceil_mode, int):
        raise TypeError(f"{name}: ceil_mode is {ceil_mode!r}; it must be True or False")
    if shape[-3] == 0:
        raise ValueError(f"{name}: input is {tuple(shape)}; only the batch may be empty")
    for d in (0, 1):
        size = shape[d - 2]
        windows = pooled_size(size, kernel[d], steps[d], pads[d], spread[d], ceil_mode)
        if size == 0 or windows < 1:
            raise ValueError(
                f"{name}: {labels[0]} {kernel} with {labels[2]} {pads} and dilation {spread} does "
                f"not fit input {tuple(shape)}; every spatial size must hold at least one window"
            )
    return kernel, steps, pads, spread


def max_pool2d(
    input: Tensor,
    kernel_size: int | Pair,
    stride: int | Pair | None = None,
    padding: int | Pair = 0,
    dilation: int | Pair = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Max-pooling of windows; stands in for :func:`torch.nn.functional.max_pool2d`.

    A NaN in a window wins (the last of several), the first of equal values wins, padding never does. For the backward
    pass it saves one byte an output (which element of the window won) where torch saves eight; in inference nothing.

    Args:
        input: [N, C, H, W] or [C, H, W]; contiguous and channels_last are both served in place, and the result has
            the same layout. float32, float64, bfloat16 and float16 run on fastalex's kernels, other dtypes on torch.
        kernel_size, stride, padding, dilation: an int or (height, width); the stride defaults to the kernel's size,
            the padding is at most half the kernel's.
        ceil_mode: count a last window that only partly overlaps the input.
        return_indices: also return torch's indices, int64 into each flattened H*W plane.

    Returns:
        The output [N, C, OH, OW], or (output, indices).

    Raises:
        ValueError: for a wrong rank, a non-positive or ill-shaped geometry argument, too much padding, or an input
            with no room for a window.

    Scratch on a CPU: at most 64 (W + kernel_size^2) bytes a thread, and backward 64 H and one plane of H x W float32
    (float64 for float64) more. Other layouts are copied once, as in :func:`local_response_norm`.
    """
    require_tensor(input, "max_pool2d")
    geometry = pool_geometry(
        input.shape, kernel_size, stride, padding, dilation, ceil_mode, "max_pool2d"
    )
    batched = input if input.dim() == 4 else input.unsqueeze(0)
    save = return_indices or gradients_may_follow(input)
    output, offsets = MAX_POOL(batched, *geometry, ceil_mode, save)
    if input.dim() == 3:
        output = output.squeeze(0)
    if not return_indices:
        return output  # type: ignore[no-any-return]
    indices = reference.offsets_to_indices(offsets, input.shape[-2:], *geometry)
    return output, indices if input.dim() == 4 else indices.squeeze(0)


class MaxPool2d(nn.MaxPool2d):
    """:class:`torch.nn.MaxPool2d` on :func:`max_pool2d`."""

    def forward(self, input: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return max_pool2d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.ceil_mode,
            self.return_indices,
        )
