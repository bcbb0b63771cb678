"""Shows the rows: a table on the terminal, markdown and JSON."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.parity import Check
from benchmarks.roofline import Roof
from benchmarks.runner import BASELINE, Row


def _time(row: Row) -> str:
    if row.median_ms is None:
        return "-"
    if row.case.startswith("overhead/"):
        return f"{row.median_ms * 1e3:.1f} us"
    return f"{row.median_ms:.3g} ms" if row.median_ms < 100 else f"{row.median_ms:.0f} ms"


def _time_and_ratio(row: Row) -> str:
    if row.ratio is None or row.provider == BASELINE:
        return _time(row)
    return f"{_time(row)} ({row.ratio:.3f})"


def _memory(rows: Sequence[Row], field: str) -> str:
    values = [getattr(row, field) for row in rows]
    if all(value is None for value in values):
        return ""
    return " / ".join("-" if value is None else f"{value:.0f}" for value in values)


def by_case(rows: Sequence[Row]) -> dict[str, list[Row]]:
    grouped: dict[str, list[Row]] = {}
    for row in rows:
        grouped.setdefault(row.case, []).append(row)
    return grouped


def cells(rows: Sequence[Row], providers: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Headings and lines of the table: one line a case."""
    headings = ["case", *providers, "roofline", "saved MiB", "peak MiB"]
    lines = []
    for case, group in by_case(rows).items():
        last = group[-1] if all(r.provider != "fastalex" for r in group) else None
        shown = next((row for row in group if row.provider == "fastalex"), last)
        percent = shown.pct_roofline if shown is not None else None
        lines.append(
            [
                case,
                *(_time_and_ratio(row) for row in group),
                "" if percent is None else f"{percent:.0f} %",
                _memory(group, "saved_mb"),
                _memory(group, "peak_mb"),
            ]
        )
    return headings, lines


def legend(roof: Roof, environment: dict[str, Any]) -> str:
    rates = ", ".join(
        f"{rate / 1e9:.0f} GFLOP/s {str(dtype).removeprefix('torch.')}"
        for dtype, rate in roof.flops.items()
    )
    return (
        f"{environment['cpu']}, {environment['threads']} threads, {environment['isa']}; "
        f"roof measured in this run: {roof.bandwidth / 1e9:.1f} GB/s read, {rates}. "
        f"Medians; in brackets the median ratio to {BASELINE}. Roofline is fastalex's. "
        "Saved and peak memory: one figure a provider, in the order of the columns."
    )


def notes(rows: Sequence[Row]) -> list[str]:
    """Why providers have no time, and what was done where they have one; each once."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row.note is not None:
            reasons.setdefault((row.provider, row.note), []).append(row.case)
    return [
        f"{provider}: {note} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for (provider, note), names in reasons.items()
    ]


def print_parity(console: Console, label: str, checks: Sequence[Check]) -> None:
    """One line a subject, its tightest quantity; every failed quantity."""
    tightest = max(checks, key=lambda check: check.error / check.allowed)
    verdict = "[green]equal[/]" if all(check.passed for check in checks) else "[red]DIFFERS[/]"
    console.print(
        f"  {verdict} {label}: {len(checks)} quantities; nearest its bound: {tightest.quantity}, "
        f"{tightest.error:.1e} from float64 (stock {tightest.stock_error:.1e})",
        soft_wrap=True,
    )
    for check in checks:
        if not check.passed:
            console.print(
                f"    [red]{check.subject}: {check.quantity}[/] is {check.error:.2e} from float64; "
                f"stock is {check.stock_error:.2e}, allowed {check.allowed:.2e}",
                soft_wrap=True,
            )


def print_table(console: Console, rows: Sequence[Row], providers: Sequence[str]) -> None:
    headings, lines = cells(rows, providers)
    table = Table(pad_edge=False)
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="left" if index == 0 else "right", no_wrap=True)
    for line in lines:
        table.add_row(*line)
    console.print(table)
    for note in notes(rows):
        console.print(f"  {note}", soft_wrap=True, markup=False)


def markdown(rows: Sequence[Row], providers: Sequence[str]) -> str:
    """The table, without columns that are empty."""
    headings, lines = cells(rows, providers)
    used = [i for i in range(len(headings)) if any(line[i] for line in lines)]
    rule = ["---", *["---:"] * (len(headings) - 1)]
    return "\n".join(
        "| " + " | ".join(line[i] for i in used) + " |" for line in [headings, rule, *lines]
    )


def write_markdown(
    path: pathlib.Path, rows: Sequence[Row], providers: Sequence[str], caption: str
) -> None:
    extra = "".join(f"- {note}\n" for note in notes(rows))
    text = f"{markdown(rows, providers)}\n\n{caption}\n" + (f"\n{extra}" if extra else "")
    path.write_text(text)


def write_json(
    path: pathlib.Path,
    rows: Sequence[Row],
    roof: Roof,
    checks: Sequence[Check],
    environment: dict[str, Any],
) -> None:
    document = {
        "environment": environment,
        "roof": {
            "bytes_per_second": roof.bandwidth,
            "flops_per_second": {
                str(dtype).removeprefix("torch."): rate for dtype, rate in roof.flops.items()
            },
        },
        "parity": [asdict(check) for check in checks],
        "rows": [asdict(row) for row in rows],
    }
    path.write_text(json.dumps(document, indent=1) + "\n")
