"""What the CPU library takes, shared by the operators that have kernels in it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastalex import _native

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def refuse(first: Tensor, *rest: Any) -> str | None:
    """The refusal of every operator whose first argument decides: device and dtype."""
    if _native.error is not None:
        return _native.error
    if not first.is_cpu:
        return f"it runs on CPU tensors, and this one is on {first.device}"
    if first.dtype not in DTYPES:
        return f"it takes float32, float64, bfloat16 and float16, and this tensor is {first.dtype}"
    return None


class _Absent:
    """Stands in for the native operators where there are none, and refuse() says why to every call."""

    def __getattr__(self, name: str) -> _Absent:
        return self

    def __call__(self, *args: Any) -> Any:
        raise AssertionError(_native.error)


#: The native operators.
library: Any = torch.ops.fastalex_cpu if _native.error is None else _Absent()
