"""``pytest benchmarks/ --benchmark-only``: the same cases under pytest-benchmark."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.cases import PROVIDERS, Case, Unavailable, all_cases

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CASES = [case for case in all_cases() if not case.full]


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_speed(benchmark: Any, case: Case, provider: str) -> None:
    try:
        call = case.prepare(provider, DEVICE).call
        call()
    except Unavailable as reason:
        pytest.skip(str(reason))

    def finished() -> None:
        call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = case.name
    benchmark(finished)
