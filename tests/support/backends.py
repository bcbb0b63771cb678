"""Every way an operator can run on this machine, as one parameter of the tests."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import fastalex
from fastalex import _native
from fastalex._precision import LEVELS
from tests.support import cuda_host

#: "torch", and the CPU library on each instruction set this machine runs.
BACKENDS = (
    "torch",
    *(f"cpu-{isa}" for isa in (_native.available_isas() if not _native.error else ())),
)


@contextlib.contextmanager
def running(backend: str) -> Iterator[None]:
    """Forces a backend of BACKENDS, or "cuda-host", for the operators that have it."""
    if backend == "cuda-host":
        with cuda_host.serving_cpu(), fastalex.use_backend("cuda"):
            yield
        return
    name, _, isa = backend.partition("-")
    with fastalex.use_backend(name):
        if not isa:
            yield
            return
        before = _native.isa()
        _native.set_isa(isa)
        try:
            yield
        finally:
            _native.set_isa(before)


@contextlib.contextmanager
def conv_precision(level: str) -> Iterator[None]:
    """Runs convolutions at one precision."""
    before = fastalex.get_conv_precision()
    fastalex.set_conv_precision(level)
    try:
        yield
    finally:
        fastalex.set_conv_precision(before)


def with_precisions(backends: list[str]) -> list[tuple[str, str]]:
    """Each backend with the precisions it knows; all but the CPU library's add up the plain sums.

    "medium" differs from "high" in the choice of tiles alone, so one instruction set shows it.
    """
    best = next((name for name in backends if name.startswith("cpu")), None)

    def levels(backend: str) -> tuple[str, ...]:
        if not backend.startswith("cpu"):
            return LEVELS[:1]
        return LEVELS if backend == best else LEVELS[:2]

    return [(backend, level) for backend in backends for level in levels(backend)]
