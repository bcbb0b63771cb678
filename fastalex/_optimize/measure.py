"""Times every module that got another forward on the inputs an example brings to it, and keeps what is faster."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from fastalex._optimize import swap

ROUNDS = 5


def inputs_of(
    model: nn.Module, modules: Sequence[nn.Module], example: tuple[Any, ...]
) -> dict[nn.Module, tuple[Any, ...]]:
    """What each module is called with while ``model(*example)`` runs, without gradients."""
    seen: dict[nn.Module, tuple[Any, ...]] = {}

    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        seen.setdefault(module, args)

    hooks = [module.register_forward_pre_hook(note) for module in modules]
    try:
        with torch.no_grad():
            model(*example)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def compare(
    model: nn.Module, modules: Sequence[nn.Module], example: tuple[Any, ...]
) -> Iterator[tuple[nn.Module, float, float]]:
    """(module, stock seconds, seconds) for every module that ran, the innermost first."""
    seen = inputs_of(model, modules, example)
    for module in reversed(modules):
        if module in seen:
            stock = swap.original_class(module).forward
            yield module, *_medians(stock, type(module).forward, (module, *seen[module]))


def _medians(
    stock: Callable[..., Any], fast: Callable[..., Any], args: tuple[Any, ...]
) -> tuple[float, float]:
    """In turn, because the machine's speed drifts."""
    times: dict[int, list[float]] = {0: [], 1: []}
    with torch.no_grad():
        for turn in range(ROUNDS + 1):
            for which, function in enumerate((stock, fast)):
                start = time.perf_counter()
                function(*args)
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                if turn:  # the first call prepares
                    times[which].append(time.perf_counter() - start)
    return statistics.median(times[0]), statistics.median(times[1])
