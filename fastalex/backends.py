"""Which implementation runs a call: the tables, the choice, its reasons, and how to force it."""

from __future__ import annotations

import contextlib
import contextvars
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastalex import _tuning

#: Every backend, in the order in which `auto` considers them. On a GPU all move the same counted bytes; cuda is the one
#: that compiles nothing at the first call and launches from C++, cupy the one that compiles longest.
NAMES = ("cpu", "cuda", "triton", "cupy", "torch")

#: Gives the reason why a backend cannot serve a call, and what would mend it; None where it can.
Refusal = Callable[..., "str | None"]


class BackendError(RuntimeError):
    """A backend was forced that cannot serve the call."""


def _checked(name: str, source: str) -> str | None:
    if name != "auto" and name not in NAMES:
        raise ValueError(f"{source} is '{name}'; it can be auto or one of {', '.join(NAMES)}")
    return None if name == "auto" else name


_FROM_ENVIRONMENT = _checked(os.environ.get("FASTALEX_BACKEND", "auto"), "FASTALEX_BACKEND")
_forced: contextvars.ContextVar[str | None] = contextvars.ContextVar(
    "fastalex_backend", default=_FROM_ENVIRONMENT
)


def forced() -> str | None:
    """The backend that ``use_backend`` or FASTALEX_BACKEND asks for; None in `auto`."""
    return _forced.get()


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Runs every fastalex operator inside the ``with`` block on one backend.

    The gradients of what ran inside are computed on it too, wherever and whenever that happens; those of what ran
    outside are not. A compiled graph has forgotten: its backward pass runs on the choice of the thread that runs it.

    Args:
        name: one of ``cpu``, ``cuda``, ``triton``, ``cupy``, ``torch``, or ``auto``
            to lift an outer choice.

    Raises:
        ValueError: for an unknown name.
        BackendError: from a call inside the block that the backend cannot serve.
    """
    token = _forced.set(_checked(name, "use_backend's name"))
    try:
        yield
    finally:
        _forced.reset(token)


@dataclass(frozen=True)
class Kernel:
    """One backend's implementation of an operator.

    ``candidates`` gives, of each keyword argument of ``run`` that configures it, the values worth measuring, the one
    taken unmeasured first. A ``contested`` kernel is preferred to stock torch only once measured. ``note`` says which
    kernel a call would run, and why. One that ``masks`` takes as ``known`` which of its tensors are a ReLU's, and masks
    gradients accordingly.
    """

    backend: str
    run: Callable[..., Any]
    refuse: Refusal
    candidates: Callable[..., Mapping[str, Sequence[Any]]] | None = None
    contested: bool = False
    note: Callable[..., str] | None = None
    masks: bool = False


class KernelTable:
    """The implementations of one operator, in order of preference."""

    def __init__(self, op: str) -> None:
        self.op = op
        self.kernels: tuple[Kernel, ...] = ()

    def add(self, backend: str, run: Callable[..., Any], refuse: Refusal, **more: Any) -> None:
        entries = [*self.kernels, Kernel(backend, run, refuse, **more)]
        self.kernels = tuple(sorted(entries, key=lambda kernel: NAMES.index(kernel.backend)))

    def choose(self, *args: Any) -> Kernel:
        """The kernel that serves this call; raises BackendError where a forced one cannot."""
        name = _forced.get()
        if name is not None:
            return self._forced_kernel(name, args)
        measured = args[0].device.type in _tuning.DEVICES  # elsewhere nobody has a rival
        for kernel in self.kernels:
            if (self._refusal(kernel, args) if measured else kernel.refuse(*args)) is None:
                return kernel
        reasons = "; ".join(f"{k.backend}: {k.refuse(*args)}" for k in self.kernels)
        raise BackendError(f"no backend can run {self.op}: {reasons}")

    def _refusal(self, kernel: Kernel, args: tuple[Any, ...]) -> str | None:
        """Why `auto` passes over a kernel: it can't serve the call, or another was measured faster."""
        reason = kernel.refuse(*args)
        if reason is not None or kernel.backend == "torch":
            return reason
        choice = _tuning.recorded(self.op, args)
        if choice is None:
            unmeasured = (
                "not measured against cuDNN yet: the first call on a GPU or fastalex.tune does"
            )
            return unmeasured if kernel.contested else None
        return None if choice.backend == kernel.backend else f"{choice.backend} was measured faster"

    def _forced_kernel(self, name: str, args: tuple[Any, ...]) -> Kernel:
        for kernel in self.kernels:
            if kernel.backend == name:
                reason = kernel.refuse(*args)
                if reason is None:
                    return kernel
                raise BackendError(f"backend '{name}' cannot run this {self.op}: {reason}")
        have = ", ".join(kernel.backend for kernel in self.kernels)
        raise BackendError(f"{self.op} has no backend '{name}'; it has {have}")

    def explain(self, *args: Any) -> str:
        """A line per backend: chosen, able, or refused and why; then its note, which can take more."""
        try:
            chosen = self.choose(*args).backend
        except BackendError:
            chosen = None
        lines = [f"{self.op}: runs on {chosen or 'nothing'}" + (" (forced)" * bool(forced()))]
        for kernel in self.kernels:
            able = kernel.refuse(*args) is None
            reason = kernel.refuse(*args) if forced() else self._refusal(kernel, args)
            verdict = "chosen" if kernel.backend == chosen else "able, not needed"
            verdict = verdict if reason is None else f"no: {reason}"
            note = f"; {kernel.note(*args)}" if able and kernel.note else ""
            note = note.replace("\n", "\n" + " " * 10)
            lines.append(f"  {kernel.backend:7} {verdict}{note}")
        return "\n".join(lines)


def no_refusal(*args: Any) -> None:
    """The refusal of a backend that serves every call."""
