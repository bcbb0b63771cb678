"""The reference as a backend: the same arithmetic, its results in the layout that fakes promise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fastalex._geometry import in_layout_of


def in_layout(reference: Callable[..., Any], like: int) -> Callable[..., Any]:
    """``reference`` with its maps laid out as argument number ``like`` is."""

    def run(*args: Any) -> Any:
        def laid_out(result: Tensor) -> Tensor:
            is_map = result.dim() > 2
            return in_layout_of(args[like], result) if is_map else result

        results = reference(*args)
        if isinstance(results, Tensor):
            return laid_out(results)
        return tuple(laid_out(result) for result in results)

    return run
