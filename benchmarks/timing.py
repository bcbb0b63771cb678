"""Times providers in turn in one process and compares them by medians of ratios."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

Call = Callable[[], object]

SHORTEST_SAMPLE = 2e-3  # seconds; shorter calls are repeated to fill it
FEWEST_ROUNDS, MOST_ROUNDS = 5, 60


@dataclass(frozen=True)
class Timing:
    """One provider's times in seconds, and its ratio to the first provider."""

    median: float
    p20: float
    p80: float
    ratio: float | None


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear interpolation between the closest ranks."""
    ordered = sorted(values)
    position = (len(ordered) - 1) * percent / 100
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def summarise(samples: Mapping[str, Sequence[float]], baseline: str | None) -> dict[str, Timing]:
    """Medians, percentiles, and the median over rounds of (provider / baseline in the same round).

    The machine's speed drifts; inside a round it hardly does, so ratios are taken there.
    """
    timings = {}
    for provider, times in samples.items():
        ratio = None
        if baseline in samples:
            rounds = zip(times, samples[baseline], strict=True)
            ratio = statistics.median(time / base for time, base in rounds)
        timings[provider] = Timing(
            statistics.median(times), percentile(times, 20), percentile(times, 80), ratio
        )
    return timings


def _sample(call: Call, repeats: int, synchronize: Call) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    synchronize()
    return (time.perf_counter() - start) / repeats


def interleave(
    calls: Mapping[str, Call], seconds: float, device: torch.device
) -> dict[str, list[float]]:
    """Samples of every provider (called once before), one a round, for about ``seconds`` in all.

    The order rotates by one each round, so that nobody always runs in the same one's wake.
    """

    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    repeats = {}
    for provider, call in calls.items():
        single = _sample(call, 1, synchronize)
        repeats[provider] = max(1, round(SHORTEST_SAMPLE / max(single, 1e-7)))
    samples: dict[str, list[float]] = {provider: [] for provider in calls}
    order = list(calls)
    start = time.perf_counter()
    for done in range(MOST_ROUNDS):
        if done >= FEWEST_ROUNDS and time.perf_counter() - start > seconds:
            break
        for provider in order:
            samples[provider].append(_sample(calls[provider], repeats[provider], synchronize))
        order = order[1:] + order[:1]
    return samples
