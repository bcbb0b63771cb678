"""Argument checks shared by the operators: what was wrong, and what is allowed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

Pair = tuple[int, int]
Answer = TypeVar("Answer")

_compiling = torch.compiler.is_compiling


def remembered(check: Callable[..., Answer]) -> Callable[..., Answer]:
    """``check``, which keeps its answers: repeating it would cost a small call more than the kernel does."""
    kept = functools.lru_cache(maxsize=1024, typed=True)(check)

    @functools.wraps(check)
    def answer(*arguments: Any) -> Answer:
        if _compiling():
            return check(*arguments)
        try:
            return kept(*arguments)
        except TypeError:  # neither a list nor a symbolic size has a hash
            return check(*arguments)

    return answer


def pair(value: Any, name: str, minimum: int) -> Pair:
    """An int, or one or two of them, as (height, width)."""
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    if len(values) == 1:
        values *= 2
    if len(values) != 2 or not all(isinstance(v, int) for v in values):
        raise ValueError(f"{name} is {value!r}; it must be an int or a pair of ints")
    if min(values) < minimum:
        raise ValueError(f"{name} is {value!r}; it must be at least {minimum}")
    return values


def require_tensor(value: Any, name: str, label: str = "input") -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: {label} must be a Tensor, got {type(value).__name__}")
    if value.layout is not torch.strided:
        raise TypeError(
            f"{name}: {label} is {value.layout}; it must be dense, as to_dense() makes it"
        )


def require_number(value: Any, name: str, label: str) -> None:
    if not isinstance(value, (int, float)) and not hasattr(value, "__float__"):
        raise TypeError(f"{name}: {label} is {value!r}; it must be a number")


def require_floating(input: Tensor, name: str) -> None:
    require_tensor(input, name)
    if not input.is_floating_point():
        raise TypeError(
            f"{name}: input is {input.dtype}; it must be float32, float64, bfloat16 or float16"
        )


def require_rank(input: Tensor, ranks: Sequence[int], name: str) -> None:
    if input.dim() not in ranks:
        allowed = " or ".join(f"{rank}-D" for rank in ranks)
        raise ValueError(
            f"{name}: input is {input.dim()}-D {tuple(input.shape)}; it must be {allowed}"
        )


@remembered
def lrn_scale(
    shape: torch.Size,
    size: int,
    alpha: float,
    beta: float,
    k: float,
    groups: int,
    alpha_mode: str,
    name: str,
) -> float:
    """Checks LRN's arguments for an input of ``shape``; returns what multiplies the sum of squares."""
    for label, value in (("alpha", alpha), ("beta", beta), ("k", k)):
        require_number(value, name, label)
    if len(shape) < 3:
        raise ValueError(
            f"{name}: input is {len(shape)}-D {tuple(shape)}; it must be [N, C, ...], 3-D or more"
        )
    if not isinstance(size, int) or size < 1:
        raise ValueError(f"{name}: size is {size!r}; it must be a positive int")
    channels = shape[1]
    if not isinstance(groups, int) or groups < 1 or channels % groups:
        raise ValueError(f"{name}: groups is {groups!r}; it must divide the {channels} channels")
    if alpha_mode == "mean":
        return alpha / size
    if alpha_mode == "sum":
        return alpha
    raise ValueError(f"{name}: alpha_mode is {alpha_mode!r}; it can be 'mean' or 'sum'")
