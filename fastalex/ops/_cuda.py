"""The CUDA C++ kernels as the backends `cuda` (built by nvcc) and `cupy` (compiled by NVRTC at the first call)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from fastalex import _cuda_native, _cupy
from fastalex.backends import Refusal
from fastalex.ops._operator import Operator

DEVICE = "cuda"  # the tests' host runtime serves another
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_CONVOLUTIONS = ("conv_relu", "conv_relu_backward")
_LAYERS = ("linear_relu", "linear_relu_backward")
_MOST = 2**31 - 1  # kernels index an image, and the pixels of a convolution, in 32 bits


def float32_in_tf32(op: str) -> bool:
    """Whether torch is told to multiply float32 with tensor cores, in convolutions or in matrix products."""
    cudnn: Any = torch.backends.cudnn
    matmul = torch.backends.cuda.matmul
    settings = (matmul, torch.backends) if op in _LAYERS else (cudnn.conv, cudnn, torch.backends)
    told = next((s.fp32_precision for s in settings if s.fp32_precision != "none"), "ieee")
    return bool(told == "tf32")


def _arguments(op: str, args: Sequence[Any]) -> tuple[Any, ...]:
    return (*args, float32_in_tf32(op)) if op in _CONVOLUTIONS + _LAYERS else tuple(args)


def refuse_tensors(op: str, args: Sequence[Any]) -> str | None:
    """What holds for both backends: device, dtype, alignment, size."""
    tensors = [value for value in args if isinstance(value, Tensor)]
    first = tensors[0]
    for tensor in tensors:
        if tensor.device.type != DEVICE:
            return f"it runs on CUDA tensors, and this one is on {tensor.device}"
        if tensor.device != first.device:
            return f"one tensor is on {first.device} and one on {tensor.device}: move them to one"
        if tensor.is_floating_point() and tensor.dtype not in DTYPES:
            return f"it takes float32, float16 and bfloat16, and this tensor is {tensor.dtype}"
    if first.dtype not in DTYPES:
        return f"it takes float32, float16 and bfloat16, and this tensor is {first.dtype}"
    for tensor in tensors:
        if not _is_fake(tensor) and tensor.data_ptr() % tensor.element_size():
            return "a tensor does not start at a multiple of its elements' size: clone() it"
    if op in _LAYERS and not all(tensor.shape[-1] for tensor in tensors):
        return "a layer without inputs or outputs has nothing to multiply"
    return _refuse_size(op, args)


def _refuse_size(op: str, args: Sequence[Any]) -> str | None:
    tensors = [value for value in args if isinstance(value, Tensor) and value.dim() > 2]
    for tensor in tensors:
        image = tensor.numel() // max(tensor.shape[0], 1)
        counted = tensor.numel() // max(tensor.shape[1], 1) if op in _CONVOLUTIONS else 0
        if max(image, counted) > _MOST:
            return "an image, or a convolution's batch of pixels, exceeds 2^31 - 1: split the batch"
    return None


def _is_fake(tensor: Tensor) -> bool:
    return isinstance(tensor, FakeTensor)


def _refuse_gpu(first: Tensor) -> str | None:
    """Of a fake tensor's GPU nothing is known: it is taken for one that serves."""
    return None if _is_fake(first) else _cuda_native.gpu_error(first.device.index)


def _note(op: str, args: Sequence[Any]) -> str:
    """The kernels that a call would launch."""
    reason = _cuda_native.planner_error()
    if reason is not None:
        return f"what it launches is not known, as {reason}"
    launches = _cuda_native.planned(op, _arguments(op, args))
    return ", then ".join(map(str, launches)) or "nothing to launch"


def _compiled(op: str) -> tuple[Callable[..., Any], Refusal]:
    """(run, refuse) of ``op`` in the library."""

    def run(*args: Any) -> Any:
        return getattr(_cuda_native.library(), op).default(*_arguments(op, args))

    def refuse(*args: Any) -> str | None:
        reason = refuse_tensors(op, args) or _cuda_native.library_error() or _refuse_gpu(args[0])
        if reason is None and not _is_fake(args[0]):
            reason = _cuda_native.architecture_error(args[0].device.index)
        return reason

    return run, refuse


def _through_cupy(op: str) -> tuple[Callable[..., Any], Refusal]:
    def run(*args: Any) -> Any:
        return _cupy.run(op, _arguments(op, args))

    def refuse(*args: Any) -> str | None:
        return refuse_tensors(op, args) or _cupy.missing() or _refuse_gpu(args[0])

    return run, refuse


def add_to(*operators: Operator) -> None:
    """Gives operators both backends. Products must be measured against stock torch before `auto` takes them there."""
    for operator in operators:
        op = operator.name
        more: dict[str, Any] = {
            "contested": op in _CONVOLUTIONS + _LAYERS,
            "note": lambda *args, op=op: _note(op, args),
        }
        operator.kernels.add("cuda", *_compiled(op), **more)
        operator.kernels.add("cupy", *_through_cupy(op), **more)
