"""The Triton kernels as a backend: Triton is imported by the first call that could run on it, not before."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from typing import Any

from torch import Tensor

from fastalex.backends import Refusal, forced

Implementation = tuple[Callable[..., Any], Refusal]


@functools.cache
def _module(name: str) -> Any:
    """A module of the kernels; each but _refuse imports Triton."""
    return importlib.import_module(f"fastalex.kernels.{name}")


@functools.cache
def missing() -> str | None:
    """What this machine lacks for any kernel to run, and what would mend it; None where nothing."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    return None


def _interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, which takes CPU tensors."""
    return "TRITON_INTERPRET" in os.environ and bool(_module("_refuse").interpreting())


def _refuse_untouched(first: Tensor) -> str | None:
    """What can be refused without importing Triton."""
    if first.device.type != "cuda" and not _interpreting():
        return f"it runs on CUDA tensors, and this one is on {first.device}"
    return missing()


def kernel(module: str, op: str) -> Implementation:
    """(run, refuse) of ``op`` in ``fastalex.kernels.<module>``."""

    def run(*args: Any) -> Any:
        return getattr(_module(module), op)(*args)

    def refuse(*args: Any) -> str | None:
        reason = _refuse_untouched(args[0])
        return reason or getattr(_module(module), f"refuse_{op}")(*args)

    return run, refuse


def contested(op: str, options: tuple[str, ...]) -> Implementation:
    """``kernel``, but in `auto` only for calls whose tuning found it faster than stock.

    For convolutions: cuDNN is a rival that no kernel is preferred to unmeasured. A record of one of ``options`` says
    that the whole call won.
    """
    run, refuse_call = kernel(op, op)

    def refuse(*args: Any) -> str | None:
        reason = refuse_call(*args)
        if reason is None and forced() != "triton" and not tuned(args):
            return "it is chosen only when forced, or tuned and found faster than cuDNN"
        return reason

    def tuned(args: tuple[Any, ...]) -> bool:
        remembered = _module("_tune").remembered
        return any(remembered(op, option, args) is not None for option in options)

    return run, refuse
