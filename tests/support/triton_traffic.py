"""Counts the memory traffic of Triton kernels in the interpreter, in 32-byte sectors."""

from __future__ import annotations

import contextlib

import numpy as np
import triton.runtime.interpreter as interpreter

SECTOR = 32


class Traffic:
    """Sectors each program touched: the sum over programs bounds what L2 serves, their union what
    DRAM does.
    """

    def __init__(self) -> None:
        self.touched: dict[str, dict[tuple, list[np.ndarray]]] = {"read": {}, "written": {}}

    def note(self, kind: str, program: tuple, pointers, mask) -> None:
        at = pointers.data.ravel()
        if mask is not None:
            at = at[np.broadcast_to(mask.data, pointers.data.shape).ravel().astype(bool)]
        self.touched[kind].setdefault(program, []).append(np.unique(at // SECTOR))

    def by_program(self, kind: str) -> int:
        """Bytes, counting a sector once for each program that touches it."""
        return SECTOR * sum(len(np.unique(np.concatenate(v))) for v in self.touched[kind].values())

    def by_grid(self, kind: str) -> int:
        """Bytes, counting each sector once."""
        sectors = [s for v in self.touched[kind].values() for s in v]
        return SECTOR * len(np.unique(np.concatenate(sectors))) if sectors else 0


@contextlib.contextmanager
def counting():
    """Inside, every masked load and store of every kernel is counted."""
    builder, traffic = interpreter.InterpreterBuilder, Traffic()
    load, store = builder.create_masked_load, builder.create_masked_store

    def counted_load(self, pointers, mask, *rest):
        traffic.note("read", tuple(self.grid_idx), pointers, mask)
        return load(self, pointers, mask, *rest)

    def counted_store(self, pointers, value, mask, *rest):
        traffic.note("written", tuple(self.grid_idx), pointers, mask)
        return store(self, pointers, value, mask, *rest)

    builder.create_masked_load, builder.create_masked_store = counted_load, counted_store
    try:
        yield traffic
    finally:
        builder.create_masked_load, builder.create_masked_store = load, store
