"""The plots of a run: speed-ups, the roofline, other engines; as PNG, or as SVG that reads in light and in dark."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.cases import all_cases
from benchmarks.report import by_case
from benchmarks.roofline import Roof
from benchmarks.runner import BASELINE, Row

#: Colours of a page and of the plots in it, by the reader's setting. docs/drawing.py draws with them too.
PALETTE = """
svg { --ink: #1b1f24; --dim: #59636e; --line: #b6bec7; --a: #2563c9; --b: #c2570c; --c: #1a7f4b; --d: #8b3fb8 }
@media (prefers-color-scheme: dark) {
  svg { --ink: #e6eaee; --dim: #9aa5b1; --line: #4c5661; --a: #79a8ff; --b: #ffa366; --c: #5fd08f; --d: #d29bf5 }
}
"""
#: What matplotlib draws with, and an SVG has replaced by the names above; a PNG is read on white.
_DRAWN = {
    "#1b1f24": "--ink",
    "#59636e": "--dim",
    "#b6bec7": "--line",
    "#2563c9": "--a",
    "#c2570c": "--b",
    "#1a7f4b": "--c",
    "#8b3fb8": "--d",
}
INK, DIM, LINE, A, B, C, D = _DRAWN
COLOURS = {"eager": DIM, "compile": D, "fastalex": A, "onnxruntime": C, "openvino": B}
_RC = {
    "axes.edgecolor": LINE,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "grid.color": LINE,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "svg.fonttype": "none",
    "svg.hashsalt": "fastalex",
    "text.color": INK,
    "xtick.color": DIM,
    "ytick.color": DIM,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
}


def _saved(draw: Callable[[Any], Any], format: str) -> bytes:
    """What ``draw(pyplot)``, which returns a figure, looks like as a file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with matplotlib.rc_context(_RC):
        figure = draw(pyplot)
        buffer = io.BytesIO()
        metadata = {"Date": None, "Creator": None} if format == "svg" else None
        figure.savefig(
            buffer, format=format, dpi=130, transparent=format == "svg", metadata=metadata
        )
        pyplot.close(figure)
    return buffer.getvalue()


def png(draw: Callable[[Any], Any]) -> bytes:
    return _saved(draw, "png")


def svg(draw: Callable[[Any], Any], title: str) -> str:
    """An <svg> element whose colours follow the reader's setting and whose text is text."""
    text = _saved(draw, "svg").decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    for colour, name in _DRAWN.items():
        text = text.replace(colour, f"var({name})")
    text = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font: \1 system-ui, sans-serif", text)
    text = re.sub(r'(<svg[^>]*?) width="[\d.]+pt"', r"\1", text)
    text = re.sub(r'(<svg[^>]*?) height="[\d.]+pt"', r'\1 role="img"', text)
    return text.replace("<defs>", f"<title>{title}</title>\n<style>{PALETTE}</style>\n<defs>", 1)


def _times(value: float) -> str:
    """Two digits, or all before the point."""
    return f"{value:.2g}" if value < 99.5 else f"{value:.0f}"


def speedup(rows: Sequence[Row], caption: str) -> Callable[[Any], Any] | None:
    """Times as fast as the baseline, a bar a provider and case, on a logarithmic axis; None where no row has one."""
    groups = {
        case: [row for row in group if row.ratio is not None and row.provider != BASELINE]
        for case, group in by_case(rows).items()
    }
    groups = {case: group for case, group in groups.items() if group}
    if not groups:
        return None
    providers = list(dict.fromkeys(row.provider for group in groups.values() for row in group))
    height = 0.8 / len(providers)

    def draw(pyplot: Any) -> Any:
        figure, axes = pyplot.subplots(figsize=(9, 1.5 + 0.3 * len(groups)), layout="constrained")
        for index, provider in enumerate(providers):
            bars = [
                (place + index * height, 1 / row.ratio)
                for place, group in enumerate(groups.values())
                for row in group
                if row.provider == provider and row.ratio is not None
            ]
            drawn = axes.barh(*zip(*bars), height, label=provider, color=COLOURS[provider])  # noqa: B905
            axes.bar_label(drawn, [f" {_times(value)}x" for _, value in bars], fontsize=7)
        places = [place + 0.4 - height / 2 for place in range(len(groups))]
        axes.set_yticks(places, list(groups), fontsize=8)
        axes.margins(y=0.01)
        axes.invert_yaxis()
        axes.set_xscale("log")
        axes.set_xlim(left=min(axes.get_xlim()[0], 0.9))  # bars say how far from 1 they end
        axes.set_xlim(right=2 ** math.ceil(math.log2(axes.get_xlim()[1]) + 0.5))
        axes.axvline(1, color=INK, linewidth=1)
        axes.set_xlabel(f"times as fast as torch {BASELINE}")
        axes.legend(loc="lower right")
        axes.set_title(caption, fontsize=8, wrap=True, loc="left")
        return figure

    return draw


def _batch(case: str) -> int:
    return int(case.rpartition("/b")[2])


def engines(rows: Sequence[Row], caption: str) -> Callable[[Any], Any]:
    """Milliseconds an image of a few cases of the network, a bar a provider; the README's plot."""
    groups = by_case([row for row in rows if row.median_ms is not None])
    groups = dict(sorted(groups.items(), key=lambda item: _batch(item[0])))

    def draw(pyplot: Any) -> Any:
        figure, panels = pyplot.subplots(
            1, len(groups), figsize=(9, 2.5), layout="constrained", squeeze=False
        )
        for axes, (case, group) in zip(panels[0], groups.items(), strict=True):
            batch = _batch(case)
            group = sorted(group, key=lambda row: -(row.median_ms or 0))
            names = [row.provider for row in group]
            each = [(row.median_ms or 0) / batch for row in group]
            bars = axes.barh(names, each, color=[COLOURS[name] for name in names])
            ratios = [
                f" {ms:.3g} ms, {1 / (row.ratio or 1):.2g}x"
                for ms, row in zip(each, group, strict=True)
            ]
            axes.bar_label(bars, ratios, fontsize=8)
            axes.invert_yaxis()
            axes.set_xlim(right=max(each) * 1.45)
            axes.set_xticks([])
            axes.spines.bottom.set_visible(False)
            axes.tick_params(length=0, labelsize=8)
            axes.set_title(f"batch {batch}", fontsize=10, loc="left")
        figure.suptitle(caption, fontsize=9, x=0.01, ha="left")
        return figure

    return draw


def roofline(rows: Sequence[Row], roof: Roof, caption: str) -> Callable[[Any], Any] | None:
    """Rates of single operators over their intensity, float32: stock's as rings, fastalex's as discs."""
    known = {case.name: case for case in all_cases()}
    points: dict[str, dict[str, tuple[float, float]]] = {}
    dtype = None
    for row in rows:
        case = known.get(row.case)
        if case is None or not case.costs or row.median_ms is None or "/f32/" not in row.case:
            continue
        if row.provider in (BASELINE, "fastalex") and not row.case.startswith("alexnet/"):
            dtype = case.dtype
            flops = sum(cost.flops for cost in case.costs)
            moved = sum(cost.bytes for cost in case.costs)
            place = (flops / moved, flops / row.median_ms / 1e6)
            points.setdefault(row.case, {})[row.provider] = place
    points = {case: found for case, found in points.items() if len(found) == 2}
    if not points or dtype is None:
        return None
    peak, read = roof.flops[dtype] / 1e9, roof.bandwidth / 1e9

    def draw(pyplot: Any) -> Any:
        figure, axes = pyplot.subplots(figsize=(9, 5.5), layout="constrained")
        operators = list(dict.fromkeys(case.partition("/")[0] for case in points))
        colours = dict(zip(operators, (A, B, C, D, DIM, INK), strict=False))
        for case, found in points.items():
            op, _, rest = case.partition("/")
            (x, stock), (_, ours) = found[BASELINE], found["fastalex"]
            colour = colours.get(op, INK)
            axes.plot([x, x], [stock, ours], color=colour, linewidth=1, alpha=0.6)
            axes.plot([x], [stock], "o", color=colour, fillstyle="none", markersize=6)
            axes.plot([x], [ours], "o" if "fwd/" in rest else "s", color=colour, markersize=6)
        for op in operators:
            axes.plot([], [], "o", color=colours.get(op, INK), label=op)
        axes.plot([], [], "o", color=INK, fillstyle="none", label="stock eager")
        axes.plot([], [], "s", color=INK, label="with gradients")
        axes.set(xscale="log", yscale="log", xlabel="FLOPs a byte, compulsory traffic")
        ridge = peak / read
        low, high = axes.get_xlim()
        low, high = min(low, ridge / 4), max(high, ridge * 4)  # both halves of the roof
        axes.plot([low, ridge, high], [low * read, peak, peak], color=INK, linewidth=1.5)
        axes.text(low * 1.1, low * read * 1.6, f"{read:.0f} GB/s read", fontsize=8)
        axes.text(high, peak * 0.8, f"{peak:.0f} GFLOP/s", fontsize=8, ha="right", va="top")
        axes.set_xlim(low, high)
        axes.set_ylabel("GFLOP/s, counted as direct sums")
        axes.legend(loc="lower right", fontsize=8)
        axes.set_title(caption, fontsize=8, wrap=True, loc="left")
        return figure

    return draw
