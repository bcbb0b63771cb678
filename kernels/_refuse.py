"""When this backend can't serve a call, and what to do about it; needs neither Triton nor a GPU to
answer.
"""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def refuse_tensors(*tensors: Tensor | None) -> str | None:
    """What holds for any operator: no Triton, a wrong device, a type the kernels lack."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    present = [t for t in tensors if t is not None]
    if any(t.device.type != "cuda" for t in present) and not interpreting():
        return "the input is not on a CUDA device: move it there (or interpret: TRITON_INTERPRET=1)"
    if any(t.dtype not in DTYPES for t in present if t.is_floating_point() or t.is_complex()):
        wrong = next(t.dtype for t in present if t.dtype not in DTYPES)
        return f"{wrong} is not computed: use float32, float16 or bfloat16 (float64: backend torch)"
    if len({t.device for t in present}) > 1:
        return "the tensors are on different devices: move them to one"
    return None


def refuse_four_axes(x: Tensor) -> str | None:
    return None if x.dim() == 4 else f"the input has {x.dim()} axes, not 4: give it as [N, C, H, W]"


def refuse_normalisation(
    x: Tensor, size: int, scale: float, beta: float, k: float, groups: int
) -> str | None:
    if x.dim() < 3:
        return f"the input has {x.dim()} axes: local response normalization needs [N, C, ...]"
    if groups < 1 or x.shape[1] % groups:
        return f"{x.shape[1]} channels don't divide into {groups} groups"
    if size < 1:
        return f"a window of {size} channels is empty"
    if (k <= 0 or scale < 0) and beta == int(beta) and beta not in (0, 1):
        return (
            "a negative base may be raised to a power: use k > 0 and a scale that is not negative"
        )
    return None
