"""One HTML file with the table, the plot and where they come from; it loads nothing, so it opens offline."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from benchmarks import report
from benchmarks.parity import Check
from benchmarks.roofline import Roof
from benchmarks.runner import Row

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --page: #fff; --line: #d5d9de; --soft: #f3f5f7; --dim: #57606a }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e8ec; --page: #14171a; --line: #363c43; --soft: #1e2328; --dim: #9aa4ae }
}
body { margin: 0 auto; padding: 1rem; max-width: 75rem; color: var(--ink); background: var(--page);
       font: 1rem/1.5 system-ui, sans-serif }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2rem }
.box { overflow-x: auto; border: 1px solid var(--line); border-radius: .4rem }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums }
.box table { min-width: 100% }
th, td { padding: .3rem .7rem; text-align: right; white-space: nowrap; border-top: 1px solid var(--line) }
thead th { border-top: 0; background: var(--soft) }
th:first-child { text-align: left; font-weight: normal; position: sticky; left: 0; background: var(--page) }
thead th:first-child { background: var(--soft) }
@media (max-width: 40rem) {  /* the names stay put, so they must leave room for the figures */
  th:first-child { white-space: normal; overflow-wrap: anywhere; min-width: 10rem }
}
.ours { font-weight: bold }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; font-size: .9rem }
dt { color: var(--dim) } dd { margin: 0; overflow-wrap: anywhere }
figure { margin: 0 } svg { max-width: 100%; height: auto }
p, li { overflow-wrap: anywhere }
"""


def _table(rows: Sequence[Row], providers: Sequence[str]) -> str:
    headings, lines = report.cells(rows, providers)
    ours = [' class="ours"' if heading == "fastalex" else "" for heading in headings]
    head = "".join(f'<th scope="col">{escape(heading)}</th>' for heading in headings)
    body = "\n".join(
        f'<tr><th scope="row">{escape(case)}</th>'
        + "".join(
            f"<td{mark}>{escape(cell)}</td>" for mark, cell in zip(ours[1:], cells, strict=True)
        )
        + "</tr>"
        for case, *cells in lines
    )
    return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>"


def _provenance(
    roof: Roof, checks: Sequence[Check], environment: dict[str, Any]
) -> Iterable[tuple[str, str]]:
    """Names and values, in the order of reading."""
    yield "date", environment["date"]
    yield "commit", environment["commit"] or "unknown: not a git checkout"
    yield "CPU", f"{environment['cpu']}, {environment['cores']} cores"
    yield "device", environment["device"]
    yield "threads", str(environment["threads"])
    yield "instruction set", environment["isa"]
    yield "Python", environment["python"]
    yield from environment["versions"].items()
    yield "memory roof", f"{roof.bandwidth / 1e9:.1f} GB/s, measured in this run"
    for dtype, rate in roof.flops.items():
        name = str(dtype).removeprefix("torch.")
        yield f"{name} roof", f"{rate / 1e9:.0f} GFLOP/s, measured in this run"
    passed = sum(check.passed for check in checks)
    yield "parity", f"{passed} of {len(checks)} quantities within their bounds of float64"


def render(
    rows: Sequence[Row],
    providers: Sequence[str],
    roof: Roof,
    checks: Sequence[Check],
    environment: dict[str, Any],
    figures: Mapping[str, str],
) -> str:
    """The page; ``figures`` are SVG elements by title, none where no row has a ratio to draw."""
    facts = "\n".join(
        f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>"
        for name, value in _provenance(roof, checks, environment)
    )
    pictures = "\n".join(
        f"<h2>{escape(title)}</h2>\n<figure>{figure}</figure>" for title, figure in figures.items()
    )
    if not figures:
        pictures = "<p>No row has a ratio to eager, so there is nothing to draw.</p>"
    remarks = "\n".join(f"<li>{escape(note)}</li>" for note in report.notes(rows))
    notes = f"<h2>Notes</h2>\n<ul>\n{remarks}\n</ul>" if remarks else ""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>fastalex: benchmarks of {escape(environment["date"][:10])}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>fastalex: benchmarks</h1>
<p>{escape(report.legend(roof, environment))}</p>
<div class="box" tabindex="0" role="region" aria-label="Timings">
{_table(rows, providers)}
</div>
{notes}
{pictures}
<h2>Provenance</h2>
<dl>
{facts}
</dl>
</body>
</html>
"""
