"""Times the chosen cases, one after another, and turns each provider's samples into a row."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from benchmarks import memory
from benchmarks.cases import Case, Prepared, Unavailable
from benchmarks.roofline import Roof
from benchmarks.timing import Timing, interleave, summarise

BASELINE = "eager"
QUICK_SECONDS, FULL_SECONDS = 0.6, 3.0  # of sampling a case


@dataclass(frozen=True)
class Row:
    """One provider's result in one case; ``note`` says why where there is no time, or what was done."""

    case: str
    provider: str
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    ratio: float | None = None
    pct_roofline: float | None = None
    peak_mb: float | None = None
    saved_mb: float | None = None
    first_call_ms: float | None = None
    note: str | None = None


def _reason(failure: Exception) -> str:
    lines = str(failure).strip().splitlines() or [type(failure).__name__]
    return lines[0][:160]


def prepare(
    case: Case, providers: Sequence[str], device: torch.device, compile_until: float
) -> tuple[dict[str, Prepared], dict[str, float], list[Row]]:
    """Providers made ready, their first calls' seconds, and rows for those that could not be."""
    ready: dict[str, Prepared] = {}
    first: dict[str, float] = {}
    refused = []
    for provider in providers:
        try:
            if provider == "compile" and time.monotonic() > compile_until:
                raise Unavailable("not compiled: the default run's time is spent; --full does")
            prepared = case.prepare(provider, device)
            start = time.perf_counter()
            prepared.call()
            first[provider] = time.perf_counter() - start
            ready[provider] = prepared
        except (
            Exception
        ) as failure:  # a compiler or an engine can fail in any way; the rest goes on
            if provider in ("eager", "fastalex") and not isinstance(failure, Unavailable):
                raise
            refused.append(Row(case.name, provider, note=_reason(failure)))
    return ready, first, refused


def _row(
    case: Case,
    provider: str,
    prepared: Prepared,
    timing: Timing,
    first: float,
    roof: Roof | None,
    memories: tuple[float, float] | None,
) -> Row:
    percent = None
    costs = case.costs or prepared.costs
    if roof is not None and costs:
        percent = 100 * roof.seconds(costs, case.dtype) / timing.median
    peak, saved = memories if memories is not None else (None, None)
    return Row(
        case.name,
        provider,
        timing.median * 1e3,
        timing.p20 * 1e3,
        timing.p80 * 1e3,
        timing.ratio,
        percent,
        peak,
        saved,
        first * 1e3,
        prepared.note,
    )


def run_case(
    case: Case,
    providers: Sequence[str],
    device: torch.device,
    roof: Roof | None,
    full: bool,
    compile_until: float = float("inf"),
) -> list[Row]:
    """A row per provider, in the order given."""
    ready, first, rows = prepare(case, providers, device, compile_until)
    calls = {provider: prepared.call for provider, prepared in ready.items()}
    samples = interleave(calls, FULL_SECONDS if full else QUICK_SECONDS, device)
    for provider, timing in summarise(samples, BASELINE).items():
        prepared = ready[provider]
        memories = None
        if case.trains:
            memories = (
                memory.peak_mib(prepared.call, device),
                memory.saved_mib(prepared.call, prepared.parameters),
            )
        rows.append(_row(case, provider, prepared, timing, first[provider], roof, memories))
    return sorted(rows, key=lambda row: providers.index(row.provider))
