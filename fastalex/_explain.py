"""``explain``: which backend a call would run on, and why not the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fastalex.backends import KernelTable
from fastalex.ops._operator import REGISTRY


class _Recorder(Exception):
    """Carries the first operator call out of a public function before it runs."""

    def __init__(self, table: KernelTable, args: tuple[Any, ...]) -> None:
        self.table = table
        self.args = args
