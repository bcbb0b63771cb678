"""The Triton kernels as a backend: Triton is imported by the first call that could run on it, not before."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from fastalex import _tuning

_NOTHING: Mapping[str, Any] = {}


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


def kernel(module: str, op: str, *, contested: bool = False, masks: bool = False) -> dict[str, Any]:
    """The entry of ``op`` in ``fastalex.kernels.<module>``, for :meth:`KernelTable.add`."""

    def run(*args: Any, known: Mapping[str, Any] = _NOTHING, **options: Any) -> Any:
        return getattr(_module(module), op)(
            *args, **known, **(options or _tuning.options(op, "triton", args))
        )

    def refuse(*args: Any) -> str | None:
        reason = _refuse_untouched(args[0])
        return reason or getattr(_module(module), f"refuse_{op}")(*args)

    def candidates(*args: Any) -> Mapping[str, Sequence[Any]]:
        found: Mapping[str, Sequence[Any]] = getattr(_module(module), f"candidates_{op}")(*args)
        return found

    def note(*args: Any) -> str:
        """Kernel and configuration, and why this one."""
        offered = candidates(*args)
        won = _tuning.options(op, "triton", args)
        parts = []
        for option, configs in offered.items():
            why = "measured fastest" if option in won else f"expected best of {len(configs)}"
            parts.append(f"{option} {won.get(option, configs[0])} ({why})")
        return ", ".join(parts) or "one configuration"

    return {
        "run": run,
        "refuse": refuse,
        "candidates": candidates,
        "contested": contested,
        "masks": masks,
        "note": note,
    }
