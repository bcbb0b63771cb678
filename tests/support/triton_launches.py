"""Records the launches that the Triton backend's host code makes, without making them: on any device, meta too."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from triton.runtime.jit import JITFunction


@dataclass(frozen=True)
class Launched:
    """One launch: the kernel's name and its arguments by name."""

    kernel: str
    arguments: dict[str, Any]
    grid: tuple[int, ...]


@contextlib.contextmanager
def recording() -> Iterator[list[Launched]]:
    """Inside, launches are listed and nothing is computed."""
    launched: list[Launched] = []

    def run(self, *arguments, grid, warmup, **options):
        names = (parameter.name for parameter in self.params)
        call = dict(zip(names, arguments, strict=True))
        launched.append(Launched(self.__name__, call, tuple(grid)))

    before = JITFunction.run
    JITFunction.run = run
    try:
        yield launched
    finally:
        JITFunction.run = before
