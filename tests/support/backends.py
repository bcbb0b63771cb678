"""Every way an operator can run on this machine, as one parameter of the tests."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import fastalex
from fastalex import _native
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
