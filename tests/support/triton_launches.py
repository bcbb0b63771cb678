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


@contextlib.contextmanager
def recording() -> Iterator[list[Launched]]:
    """Inside, launches are listed and nothing is computed."""
    launched: list[Launched] = []

    def run(self, *arguments, grid, warmup, **options):
        names = (parameter.name for parameter in self.params)
        launched.append(Launched(self.__name__, dict(zip(names, arguments, strict=True))))

    before = JITFunction.run
    JITFunction.run = run
    try:
        yield launched
    finally:
        JITFunction.run = before
