"""``python benchmarks/run.py``: proves that fastalex equals stock torch, then times them."""

from __future__ import annotations

import argparse
import os
import pathlib
import sys
import time
from collections.abc import Sequence

sys.path.append(str(pathlib.Path(__file__).resolve().parents[1]))
# The memory profile chats on stderr otherwise.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import environment, html_report, parity, plots, report, roofline, runner
from benchmarks.cases import PEERS, PROVIDERS, Case, all_cases, select

#: A default run starts no compilation after this; the longest takes most of a minute.
COMPILE_FOR_SECONDS = 80.0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks/run.py", description=__doc__)
    parser.add_argument(
        "--cases", metavar="GLOB", help="cases by name, e.g. 'alexnet/*,lrn/fwd/*'; see --list"
    )
    parser.add_argument(
        "--providers",
        metavar="A,B",
        default=",".join(PROVIDERS),
        help=f"of {', '.join((*PROVIDERS, *PEERS))} (default: %(default)s)",
    )
    parser.add_argument("--full", action="store_true", help="every case, longer samples")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--json", type=pathlib.Path, help="rows as JSON (default: OUT/results.json)"
    )
    parser.add_argument("--markdown", type=pathlib.Path, help="the table as markdown")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"))
    parser.add_argument("--list", action="store_true", help="print the names of all cases and stop")
    options = parser.parse_args(arguments)
    options.providers = [name.strip() for name in options.providers.split(",")]
    unknown = [name for name in options.providers if name not in (*PROVIDERS, *PEERS)]
    if unknown:
        known = ", ".join((*PROVIDERS, *PEERS))
        parser.error(f"no provider {', '.join(unknown)}; there are {known}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this torch sees no CUDA GPU; --device cpu measures the CPU")
    return options


def progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:36}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    )


def verify(cases: Sequence[Case], device: torch.device, console: Console) -> list[parity.Check]:
    """Every check, printed as it ends."""
    console.print("Parity with stock torch on photographs, against float64:")
    subjects = {(case.subject, case.dtype) for case in cases}
    found: list[parity.Check] = []
    with progress(console) as bar:
        task = bar.add_task("parity", total=len(subjects))
        for label, checks in parity.verify(cases, device):
            report.print_parity(console, label, checks)
            found.extend(checks)
            bar.advance(task)
    return found


def measure(
    cases: Sequence[Case],
    options: argparse.Namespace,
    device: torch.device,
    roof: roofline.Roof,
    compile_until: float,
    console: Console,
) -> list[runner.Row]:
    rows: list[runner.Row] = []
    with progress(console) as bar:
        task = bar.add_task("", total=len(cases))
        for case in cases:
            bar.update(task, description=case.name)
            rows += runner.run_case(
                case, options.providers, device, roof, options.full, compile_until
            )
            bar.advance(task)
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit codes: 0, 1 where parity fails (nothing is timed then), 2 for a wrong argument."""
    started = time.monotonic()
    options = parse(arguments)
    console = Console(width=None if sys.stdout.isatty() else 180)
    if options.list:
        for case in all_cases():
            console.print(case.name, highlight=False)
        return 0
    try:
        cases = select(all_cases(), options.cases, options.full)
    except ValueError as failure:
        print(f"benchmarks/run.py: error: {failure}", file=sys.stderr)
        return 2
    use_cuda = options.device != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda" if use_cuda else "cpu")

    checks = verify(cases, device, console)
    if not all(check.passed for check in checks):
        console.print("[red]Parity failed: nothing was timed.[/]")
        return 1
    roof = roofline.measure(device, dict.fromkeys(case.dtype for case in cases))
    limited = options.cases is None and not options.full
    compile_until = started + COMPILE_FOR_SECONDS if limited else float("inf")
    rows = measure(cases, options, device, roof, compile_until, console)

    described = environment.describe(device)
    caption = report.legend(roof, described)
    report.print_table(console, rows, options.providers)
    console.print(caption, markup=False)
    options.out.mkdir(parents=True, exist_ok=True)
    json_path = options.json or options.out / "results.json"
    report.write_json(json_path, rows, roof, checks, described)
    picture, page = options.out / "speedup.png", options.out / "report.html"
    drawn = {
        "Speed-up over eager torch": plots.speedup(rows, caption),
        "Operators under the measured roof": plots.roofline(rows, roof, caption),
    }
    figures = {title: plots.svg(draw, title) for title, draw in drawn.items() if draw}
    text = html_report.render(rows, options.providers, roof, checks, described, figures)
    page.write_text(text, encoding="utf-8")
    written = [json_path, page]
    if (bars := drawn["Speed-up over eager torch"]) is not None:
        picture.write_bytes(plots.png(bars))
        written.append(picture)
    if options.markdown:
        report.write_markdown(options.markdown, rows, options.providers, caption)
        written.append(options.markdown)
    seconds = time.monotonic() - started
    console.print(f"Wrote {', '.join(map(str, written))} in {seconds:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
