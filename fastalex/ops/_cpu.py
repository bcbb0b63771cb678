"""What the CPU library takes, shared by the operators that have kernels in it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastalex import _native

#: What stands for offsets that nobody wants.
NOTHING = torch.empty(0, dtype=torch.uint8, device="cpu")

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@functools.lru_cache(maxsize=256)
def numbers(*arguments: Any) -> Tensor:
    """The numbers of a call, pairs in their places, as the native operators take them: in one float64 tensor.

    torch unpacks a tensor in 0.1 us, and every number in 0.2.
    """
    flat: list[float] = []
    for argument in arguments:
        flat.extend(argument if isinstance(argument, tuple) else (argument,))
    return torch.tensor(flat, dtype=torch.float64, device="cpu")


def refuse_device(first: Tensor) -> str | None:
    """What holds for any operator: the library, and the device."""
    if _native.error is not None:
        return _native.error
    return None if first.is_cpu else f"it runs on CPU tensors, and this one is on {first.device}"


def refuse(first: Tensor, *rest: Any) -> str | None:
    """The refusal of every operator whose first argument decides: device and dtype."""
    if _native.error is not None or not first.is_cpu:
        return refuse_device(first)
    if first.dtype not in DTYPES:
        return f"it takes float32, float64, bfloat16 and float16, and this tensor is {first.dtype}"
    return None


def native(name: str) -> Callable[..., Any]:
    """``torch.ops.fastalex_cpu.<name>`` without its Python wrapper, which costs 0.2 us."""
    if _native.error is not None:
        return _absent
    try:
        overload = getattr(torch.ops.fastalex_cpu, name).default
    except AttributeError:  # the package goes on without it, and explain says why
        _native.error = (
            f"the CPU library has no operator '{name}': it was built from older sources than this Python; "
            "build it again: make build, or pip install --no-build-isolation . in fastalex's source folder"
        )
        return _absent
    return getattr(overload, "_op", overload)  # type: ignore[no-any-return]


def _absent(*args: Any) -> Any:
    """Stands in for native operators where there are none, and refuse() says why to every call."""
    raise AssertionError(_native.error)
