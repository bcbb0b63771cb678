"""The CUDA C++ kernels without nvcc: NVRTC compiles them, CuPy launches them on torch's stream.

The launchers of ``csrc/cuda`` decide; ``_cuda_plan*.so``, a build of them that needs no CUDA, says
what they would launch (kernel, grid, plan), and this module does it. The functions take the
operators' schemas argument for argument.
"""

from __future__ import annotations

import ctypes
import functools
import pathlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Ints = Sequence[int]

_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_FOLDER = pathlib.Path(__file__).parent

#: Rounds float32 convolutions to TF32 for tensor cores; else they are IEEE float32.
allow_tf32 = False


class _View(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("size", ctypes.c_longlong * 4),
        ("stride", ctypes.c_longlong * 4),
    ]


class _LrnParams(ctypes.Structure):
    _fields_ = [
        ("size", ctypes.c_int),
        ("scale", ctypes.c_float),
        ("beta", ctypes.c_float),
        ("k", ctypes.c_float),
        ("groups", ctypes.c_int),
    ]


class _PoolParams(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int * 2) for name in ("kernel", "stride", "padding", "dilation")]


class _Offsets(ctypes.Structure):
    _fields_ = [("view", _View), ("wide", ctypes.c_bool)]


class _ConvParams(ctypes.Structure):
    _fields_ = [
        *[(name, ctypes.c_int * 2) for name in ("stride", "padding", "dilation")],
        ("groups", ctypes.c_int),
        ("tf32", ctypes.c_bool),
    ]


class _ConvGradients(ctypes.Structure):
    _fields_ = [("input", _View), ("weight", _View), ("bias", ctypes.c_void_p)]


class PlannedLaunch(ctypes.Structure):
    """One launch: the expression that names the kernel, the grid, the plan's bytes."""

    _fields_ = [
        ("kernel", ctypes.c_char_p),
        ("blocks", ctypes.c_longlong),
        ("threads", ctypes.c_int),
        ("shared_bytes", ctypes.c_int),
        ("plan_bytes", ctypes.c_longlong),
        ("plan", ctypes.c_ubyte * 1024),
    ]


def kernel_folder() -> pathlib.Path:
    """Where the kernel headers are: package data, or ``csrc/cuda`` of a checkout."""
    packaged = _FOLDER / "cuda_headers"
    return packaged if packaged.exists() else _FOLDER.parent / "csrc" / "cuda"


@functools.cache
def planner() -> ctypes.CDLL:
    """The launchers, built without CUDA.

    Raises:
        OSError: where the library was not built.
    """
    libraries = sorted(_FOLDER.glob("_cuda_plan*.so"))
    if not libraries:
        raise OSError("the launch planner was not built: reinstall fastalex with a C++ compiler")
    return bind_planner(ctypes.CDLL(str(libraries[0])))


def bind_planner(library: ctypes.CDLL) -> ctypes.CDLL:
    """Declares the result types of the planner's functions."""
    library.fastalex_planned.restype = ctypes.POINTER(PlannedLaunch)
    library.fastalex_plan_error.restype = ctypes.c_char_p
    library.fastalex_lrn_max_pool_is_fused.restype = ctypes.c_bool
    library.fastalex_conv_relu_workspace.restype = ctypes.c_longlong
    library.fastalex_conv_relu_backward_workspace.restype = ctypes.c_longlong
    return library


@functools.cache
def refusal() -> str | None:
    """Why this backend cannot run here and what would mend it, or None."""
    if not torch.cuda.is_available():
        return "no CUDA device is visible to torch: install a driver, or a CUDA build of torch"
    try:
        import cupy  # noqa: F401
    except ImportError:
        return "CuPy is not installed: pip install fastalex[cuda13] (or fastalex[cuda12])"
    try:
        planner()
    except OSError as missing:
        return str(missing)
    if torch.cuda.get_device_capability() < (8, 0):
        return "the kernels need compute capability 8.0 (Ampere) or newer"
    return None


def refuse(input: Tensor) -> str | None:
    """Why this call cannot be served, or None."""
    if not input.is_cuda:
        return "the input is not on a CUDA device"
    if input.dtype not in _DTYPES:
        return f"takes float32, float16 or bfloat16, got {input.dtype}"
    return refusal()


def compile_options() -> tuple[str, ...]:
    """NVRTC's options; the toolkit's headers come from CuPy's own search."""
    return ("-std=c++20", f"-I{kernel_folder()}")


@functools.cache
def _function(expression: str, device: int) -> Any:
    """The compiled kernel, from CuPy's disk cache after the first time on this machine."""
    import cupy

    with cupy.cuda.Device(device):
        module = cupy.RawModule(
            code='#include "kernels.cuh"\n',
            backend="nvrtc",
            options=compile_options(),
            name_expressions=(expression,),
        )
        return module.get_function(expression)


def launch(planned: PlannedLaunch, tensor: Tensor) -> None:
    """Starts one planned launch on ``tensor``'s device and torch's current stream."""
    import cupy
    import numpy as np

    device = tensor.device.index
    function = _function(planned.kernel.decode(), device)
    if planned.shared_bytes > 48 * 1024:
        function.max_dynamic_shared_size_bytes = planned.shared_bytes
    plan = np.frombuffer(bytes(planned.plan[: planned.plan_bytes]), f"V{planned.plan_bytes}")
    stream = cupy.cuda.ExternalStream(torch.cuda.current_stream(device).cuda_stream, device)
    try:
        with cupy.cuda.Device(device), stream:
            function(
                (planned.blocks,), (planned.threads,), (plan,), shared_mem=planned.shared_bytes
            )
    except cupy.cuda.driver.CUDADriverError as error:
        raise RuntimeError(
            f"fastalex: {planned.kernel.decode()} did not start: {error} ({planned.blocks} blocks "
            f"of {planned.threads} threads, {planned.shared_bytes} bytes of shared memory; "
            f"input {tuple(tensor.shape)} {tensor.dtype})"
        ) from error


def _run(name: str, tensor: Tensor, *arguments: Any) -> None:
    library = planner()
    count = getattr(library, name)(_DTYPES[tensor.dtype], *map(_reference, arguments))
    if count < 0:
        raise RuntimeError(library.fastalex_plan_error().decode())
    launches = library.fastalex_planned()
    # Copies: compiling a kernel may call back into the planner.
    for planned in [PlannedLaunch.from_buffer_copy(launches[i]) for i in range(count)]:
        launch(planned, tensor)


def _reference(argument: Any) -> Any:
    return ctypes.byref(argument) if isinstance(argument, ctypes.Structure) else argument


def _view(tensor: Tensor) -> _View:
    return _View(tensor.data_ptr(), tuple(tensor.shape), tuple(tensor.stride()))


def _format(tensor: Tensor) -> torch.memory_format:
    last = (
        tensor.dim() == 4 and not tensor.is_contiguous() and tensor.size(1) > 1
        and tensor.stride(1) == 1
    )  # fmt: skip
    return torch.channels_last if last else torch.contiguous_format


def _dense(tensor: Tensor) -> Tensor:
    """The tensor itself if channels or columns lie side by side, else one copy."""
    if _format(tensor) is torch.channels_last or tensor.stride(-1) == 1 or tensor.size(-1) == 1:
        return tensor
    return tensor.contiguous()


def _four(tensor: Tensor) -> Tensor:
    """[N, C, ...] as [N, C, rows, columns]."""
    if tensor.dim() == 4:
        return _dense(tensor)
    return tensor.reshape(*tensor.shape[:2], -1, tensor.shape[-1])


def _empty_like(tensor: Tensor) -> Tensor:
    return torch.empty(
        tensor.shape, dtype=tensor.dtype, device=tensor.device, memory_format=_format(tensor)
    )


def lrn(input: Tensor, size: int, scale: float, beta: float, k: float, groups: int) -> Tensor:
    x = _four(input)
    y = _empty_like(x)
    params = _LrnParams(size, scale, beta, k, groups)
    _run("fastalex_plan_lrn", x, _view(x), _view(y), params)
    return y.view(input.shape)


def lrn_backward(
    grad: Tensor, input: Tensor, size: int, scale: float, beta: float, k: float, groups: int
) -> Tensor:
    x = _four(input)
    g = _four(grad).contiguous(memory_format=_format(x))
    gx = _empty_like(x)
    params = _LrnParams(size, scale, beta, k, groups)
    _run("fastalex_plan_lrn_backward", x, _view(g), _view(x), _view(gx), params)
    return gx.view(input.shape)


def _pool_params(kernel: Ints, stride: Ints, padding: Ints, dilation: Ints) -> _PoolParams:
    return _PoolParams(tuple(kernel), tuple(stride), tuple(padding), tuple(dilation))


def pool_size(size: int, kernel: int, stride: int, padding: int, dilation: int, ceil: bool) -> int:
    """Outputs along one axis, by torch's rule: no window may start in the padding behind."""
    reach = size + 2 * padding - dilation * (kernel - 1) - 1
    out = (reach + (stride - 1 if ceil else 0)) // stride + 1
    return out - 1 if ceil and (out - 1) * stride >= size + padding else out


def _outputs(x: Tensor, p: _PoolParams, ceil: bool, save: bool) -> tuple[Tensor, Tensor, _Offsets]:
    sides = [
        pool_size(x.size(2 + i), p.kernel[i], p.stride[i], p.padding[i], p.dilation[i], ceil)
        for i in (0, 1)
    ]
    shape = (*x.shape[:2], *sides)
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=_format(x))
    if not save:
        return out, x.new_empty(0, dtype=torch.uint8), _Offsets()
    wide = p.kernel[0] * p.kernel[1] > 256
    offsets = torch.empty_like(out, dtype=torch.int32 if wide else torch.uint8)
    return out, offsets, _Offsets(_view(offsets), wide)


def max_pool(
    input: Tensor,
    kernel_size: Ints,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    ceil_mode: bool,
    save_offsets: bool,
) -> tuple[Tensor, Tensor]:
    x = _dense(input)
    params = _pool_params(kernel_size, stride, padding, dilation)
    out, offsets, where = _outputs(x, params, ceil_mode, save_offsets)
    _run("fastalex_plan_max_pool", x, _view(x), _view(out), where, params)
    return out, offsets


def max_pool_backward(
    grad: Tensor,
    offsets: Tensor,
    input_size: Ints,
    kernel_size: Ints,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
) -> Tensor:
    g = grad.contiguous(memory_format=_format(offsets))
    gx = torch.empty(
        (*g.shape[:2], *input_size), dtype=g.dtype, device=g.device, memory_format=_format(offsets)
    )
    where = _Offsets(_view(offsets), offsets.dtype is torch.int32)
    params = _pool_params(kernel_size, stride, padding, dilation)
    _run("fastalex_plan_max_pool_backward", g, _view(g), where, _view(gx), params)
    return gx


def lrn_max_pool(
    input: Tensor,
    size: int,
    scale: float,
    beta: float,
    k: float,
    groups: int,
    kernel_size: Ints,
    stride: Ints,
    padding: Ints,
    ceil_mode: bool,
    save_offsets: bool,
) -> tuple[Tensor, Tensor]:
    x = _dense(input)
    pool = _pool_params(kernel_size, stride, padding, (1, 1))
    out, offsets, where = _outputs(x, pool, ceil_mode, save_offsets)
    views = (_view(x), _view(out))
    references = map(_reference, (*views, pool))
    if not planner().fastalex_lrn_max_pool_is_fused(_DTYPES[x.dtype], *references):
        middle = lrn(x, size, scale, beta, k, groups)
        return max_pool(middle, kernel_size, stride, padding, (1, 1), ceil_mode, save_offsets)
    params = _LrnParams(size, scale, beta, k, groups)
    _run("fastalex_plan_lrn_max_pool", x, *views, where, params, pool)
    return out, offsets


def lrn_max_pool_backward(
    grad: Tensor,
    input: Tensor,
    offsets: Tensor,
    size: int,
    scale: float,
    beta: float,
    k: float,
    groups: int,
    kernel_size: Ints,
    stride: Ints,
    padding: Ints,
) -> Tensor:
    x = _dense(input)
    g = grad.contiguous(memory_format=_format(x))
    gx = _empty_like(x)
    where = _Offsets(_view(offsets), offsets.dtype is torch.int32)
    params = _LrnParams(size, scale, beta, k, groups)
    pool = _pool_params(kernel_size, stride, padding, (1, 1))
    views = (_view(g), _view(x), where, _view(gx))
    _run("fastalex_plan_lrn_max_pool_backward", x, *views, params, pool)
    return gx


def _conv_params(stride: Ints, padding: Ints, dilation: Ints, groups: int) -> _ConvParams:
    return _ConvParams(tuple(stride), tuple(padding), tuple(dilation), groups, allow_tf32)


def _workspace(name: str, tensor: Tensor, *arguments: Any) -> Tensor:
    size = getattr(planner(), name)(_DTYPES[tensor.dtype], *map(_reference, arguments))
    return tensor.new_empty(size, dtype=torch.uint8)


def _pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def conv_relu(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    groups: int,
) -> Tensor:
    x = _dense(input)
    p = _conv_params(stride, padding, dilation, groups)
    sides = [
        pool_size(
            x.size(2 + i), weight.size(2 + i), p.stride[i], p.padding[i], p.dilation[i], False
        )
        for i in (0, 1)
    ]
    shape = (x.size(0), weight.size(0), *sides)
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=_format(x))
    views = (_view(x), _view(weight), _view(y))
    workspace = _workspace("fastalex_conv_relu_workspace", x, *views, p)
    dense_bias = None if bias is None else bias.contiguous()
    arguments = (*views[:2], _pointer(dense_bias), views[2], p, _pointer(workspace))
    _run("fastalex_plan_conv_relu", x, *arguments)
    return y


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
    x, g = _dense(input), grad.contiguous(memory_format=_format(output))
    make = torch.empty_like if output.numel() else torch.zeros_like
    gx, gw = (
        make(t) if wanted else t.new_empty(0)
        for t, wanted in zip((x, weight), output_mask[:2], strict=True)
    )
    gb = make(weight[:, 0, 0, 0]) if output_mask[2] else weight.new_empty(0)
    wanted = _ConvGradients(
        *(_view(t) if t.numel() else _View() for t in (gx, gw)),
        gb.data_ptr() if gb.numel() else None,
    )
    p = _conv_params(stride, padding, dilation, groups)
    arguments = (_view(output), _view(x), _view(weight), wanted, p)
    workspace = _workspace("fastalex_conv_relu_backward_workspace", x, *arguments)
    _run("fastalex_plan_conv_relu_backward", x, _view(g), *arguments, _pointer(workspace))
    return gx, gw, gb
