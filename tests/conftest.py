"""Every test runs with poisoned memory and deterministic algorithms, from a fixed seed."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch

from fastalex import _native


@pytest.hookimpl(
    tryfirst=True
)  # before hypothesis reads its option, and xdist hands it to its processes
def pytest_configure(config: pytest.Config) -> None:
    """One seed for all random examples of a run, a new one each time unless the command names it."""
    if getattr(config.option, "hypothesis_seed", "absent") is None:
        config.option.hypothesis_seed = str(random.SystemRandom().getrandbits(32))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    seed = getattr(terminalreporter.config.option, "hypothesis_seed", None)
    if seed is not None:
        terminalreporter.write_line(f"random examples: --hypothesis-seed={seed}")


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
