"""``tune``: measures every call of a model ahead of time, so that its first step pays for none."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastalex import _tuning
from fastalex.ops._operator import REGISTRY


@dataclass(frozen=True)
class Measured:
    """A call of the model, and who serves it from now on."""

    call: str  # operator and arguments
    backend: str
    configuration: str
    milliseconds: float
    stock_milliseconds: float


class _Visit(TorchDispatchMode):
    """Shows each fastalex call to ``visit`` before it runs."""

    def __init__(self, visit: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.visit = visit

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "fastalex":
            self.visit(func.name().removeprefix("fastalex::"), args)
        return func(*args, **(kwargs or {}))


def _run(model: nn.Module, example: Sequence[Any], backward: bool, visit: Any) -> None:
    with torch.set_grad_enabled(backward), _Visit(visit):
        output = model(*example)
        if backward:
            outputs = [output] if isinstance(output, Tensor) else list(output)
            wanted = [p for p in model.parameters() if p.requires_grad]
            torch.autograd.grad([o.sum() for o in outputs], wanted, allow_unused=True)


@contextlib.contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Inside, the model may run: its buffers and torch's random state are put back."""
    kept = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        with torch.random.fork_rng():
            yield
    finally:
        with torch.no_grad():
            for buffer, before in kept:
                buffer.copy_(before)


@contextlib.contextmanager
def _advancing(total: int, shown: bool) -> Iterator[Any]:
    """A function that advances a progress bar, where rich is installed."""
    try:
        from rich.progress import Progress
    except ImportError:
        shown = False
    if not shown:
        yield lambda label: None
        return
    with Progress(transient=True) as progress:
        task = progress.add_task("tune", total=total)
        yield lambda label: progress.update(task, advance=1, description=label)


def tune(
    model: nn.Module, example: Any, *, backward: bool | None = None, progress: bool = True
) -> list[Measured]:
    """Measures each distinct fastalex call of ``model(example)`` on its GPU, and remembers the fastest right backend.

    What was measured before, in this or another process, is not measured again. Nothing of the model changes: no
    gradient is stored, and buffers and random state are put back.

    Args:
        model: on a CUDA device; its calls on other devices are left alone.
        example: a tensor, or a tuple of the model's positional arguments, of the shapes, layout and dtype to tune for.
        backward: whether to tune the calls of the backward pass too; by default, whether ``model.training``.
        progress: whether to show a progress bar (with rich installed).

    Returns:
        A line for each call measured now: its backend, configuration and time, beside stock torch's.

    Raises:
        TypeError: where ``model`` is no module.
        Exception: whatever ``model(*example)`` raises.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"tune: model must be a torch.nn.Module, got {type(model).__name__}")
    inputs = tuple(example) if isinstance(example, (tuple, list)) else (example,)
    backward = model.training if backward is None else backward
    waiting: set[str] = set()
    found: list[Measured] = []

    def collect(op: str, args: tuple[Any, ...]) -> None:
        if args[0].device.type in _tuning.DEVICES and _tuning.recorded(op, args) is None:
            waiting.add(_tuning.call_key(op, args))

    def settle(op: str, args: tuple[Any, ...]) -> None:
        if args[0].device.type not in _tuning.DEVICES:
            return
        key = _tuning.call_key(op, args)
        if key in waiting:
            waiting.discard(key)
            with torch.no_grad(), torch.utils._python_dispatch._disable_current_modes():
                trials = _tuning.measure(REGISTRY[op].kernels, args)
            found.append(_summary(key, trials))
            advance(op)

    with _tuning.paused(), _unchanged(model):
        _run(model, inputs, backward, collect)
        with _advancing(len(waiting), progress) as advance:
            _run(model, inputs, backward, settle)
    return found


def _summary(key: str, trials: Sequence[_tuning.Trial]) -> Measured:
    best = min(trials, key=lambda trial: trial.milliseconds)
    configuration = ", ".join(f"{name}={value}" for name, value in best.choice.options.items())
    call = key.partition(" on ")[0]
    stock = trials[0].milliseconds
    return Measured(call, best.choice.backend, configuration, best.milliseconds, stock)
