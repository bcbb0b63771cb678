"""Every test runs with poisoned memory and deterministic algorithms, from a fixed seed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from fastalex import _native


@pytest.fixture(autouse=True)
def poisoned_and_seeded() -> Iterator[None]:
    """torch fills its empty tensors with NaN in deterministic mode; the CPU library fills its own."""
    torch.manual_seed(2012)
    torch.use_deterministic_algorithms(True)
    if _native.error is None:
        _native.set_poison(True)
    yield
    if _native.error is None:
        _native.set_poison(False)
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def cpu_library_is_there() -> None:
    assert _native.error is None, f"the tests need the CPU library: {_native.error}"
