"""The CUDA C++ kernels as the backends `cuda` (built by nvcc) and `cupy` (compiled by NVRTC at the first call)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from fastalex import _cuda_native, _cupy, _tuning
from fastalex._cuda_native import Instruction
from fastalex.backends import Refusal
from fastalex.ops._operator import Operator

DEVICE = "cuda"  # the tests' host runtime serves another
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_CONVOLUTIONS = ("conv_relu", "conv_relu_backward")
_LAYERS = ("linear_relu", "linear_relu_backward")
_PRODUCTS = _CONVOLUTIONS + _LAYERS
_MMA_SYNC, _WGMMA = Instruction(wgmma=False), Instruction(wgmma=True)
_MOST = 2**31 - 1  # kernels index an image, and the pixels of a convolution, in 32 bits


def float32_in_tf32(op: str) -> bool:
    """Whether torch is told to multiply float32 with tensor cores, in convolutions or in matrix products."""
    cudnn: Any = torch.backends.cudnn
    matmul = torch.backends.cuda.matmul
    settings = (matmul, torch.backends) if op in _LAYERS else (cudnn.conv, cudnn, torch.backends)
    told = next((s.fp32_precision for s in settings if s.fp32_precision != "none"), "ieee")
    return bool(told == "tf32")


def _arguments(
    op: str, args: Sequence[Any], instruction: Instruction = _MMA_SYNC
) -> tuple[Any, ...]:
    return (*args, float32_in_tf32(op), instruction.wgmma) if op in _PRODUCTS else tuple(args)


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


def refuse_wgmma(op: str, args: Sequence[Any], backend: str) -> str | None:
    """Why no product of a call can run on Hopper's warpgroups, or None where one can."""
    first = args[0]
    if first.dtype == torch.float32:
        return "it multiplies float16 and bfloat16 alone"
    if not _is_fake(first):
        reason = _cuda_native.wgmma_error(first.device.index)
        if reason is None and backend == "cuda":
            reason = _cuda_native.wgmma_library_error()
        if reason is not None:
            return reason
    if (reason := _cuda_native.planner_error()) is not None:
        return reason
    try:
        launches = _cuda_native.planned(op, _arguments(op, args, _WGMMA))
    except RuntimeError as error:  # the planner's own words
        return str(error).removeprefix("fastalex: wgmma ")
    if not any("WgmmaMath" in launch.kernel for launch in launches):
        return "the gradient of the weight does not run on it"
    return None


def _note(op: str, args: Sequence[Any], backend: str) -> str:
    """The kernels that a call would launch, and whether Hopper's instruction was an alternative."""
    reason = _cuda_native.planner_error()
    if reason is not None:
        return f"what it launches is not known, as {reason}"
    instruction = _tuning.options(op, backend, args).get("instruction", _MMA_SYNC)
    launches = _cuda_native.planned(op, _arguments(op, args, instruction))
    text = ", then ".join(map(str, launches)) or "nothing to launch"
    if op not in _PRODUCTS:
        return text
    if "instruction" in _tuning.options(op, backend, args):
        return f"{text}; {instruction} was measured faster than the other"
    reason = refuse_wgmma(op, args, backend)
    return f"{text}; wgmma: {reason or 'able, on compute capability 9.0, once measured faster'}"


def _configured(
    op: str, backend: str, call: Callable[[Sequence[Any]], Any], refuse: Refusal
) -> dict[str, Any]:
    """The entry of a backend, for :meth:`KernelTable.add`; ``call`` takes the arguments that csrc/cuda does.

    Products are contested: they must be measured against stock torch before `auto` takes them there, and so must
    wgmma against mma.sync.
    """

    def run(*args: Any, **options: Any) -> Any:
        if op not in _PRODUCTS:
            return call(args)
        chosen = options or _tuning.options(op, backend, args)
        return call(_arguments(op, args, chosen.get("instruction", _MMA_SYNC)))

    def candidates(*args: Any) -> Mapping[str, Sequence[Any]]:
        if refuse_wgmma(op, args, backend) is not None:
            return {}
        return {"instruction": (_MMA_SYNC, _WGMMA)}

    return {
        "run": run,
        "refuse": refuse,
        "candidates": candidates if op in _PRODUCTS else None,
        "contested": op in _PRODUCTS,
        "note": lambda *args: _note(op, args, backend),
    }


def _compiled(op: str) -> dict[str, Any]:
    """The backend `cuda`: ``op`` in the library."""

    def call(args: Sequence[Any]) -> Any:
        return getattr(_cuda_native.library(), op).default(*args)

    def refuse(*args: Any) -> str | None:
        reason = refuse_tensors(op, args) or _cuda_native.library_error() or _refuse_gpu(args[0])
        if reason is None and not _is_fake(args[0]):
            reason = _cuda_native.architecture_error(args[0].device.index)
        return reason

    return _configured(op, "cuda", call, refuse)


def _through_cupy(op: str) -> dict[str, Any]:
    """The backend `cupy`: ``op`` planned, its kernels compiled by NVRTC."""

    def refuse(*args: Any) -> str | None:
        return refuse_tensors(op, args) or _cupy.missing() or _refuse_gpu(args[0])

    return _configured(op, "cupy", lambda args: _cupy.run(op, args), refuse)


def add_to(*operators: Operator) -> None:
    """Gives operators both backends."""
    for operator in operators:
        operator.kernels.add("cuda", **_compiled(operator.name))
        operator.kernels.add("cupy", **_through_cupy(operator.name))
