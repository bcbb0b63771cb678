"""The pen of diagrams.py and gpu_diagrams.py: shapes and text as one SVG, which reads in light and in dark.

Lengths are pixels of a page 760 wide.
"""

from __future__ import annotations

from xml.sax.saxutils import escape

from benchmarks.plots import PALETTE

WIDTH = 760
STYLE = (
    PALETTE
    + """text { font: 13px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; fill: var(--ink) }
.head { font-weight: 600; font-size: 14px } .dim { fill: var(--dim) } .small { font-size: 11px }
.end { text-anchor: end } .mid { text-anchor: middle }
rect, path, line { fill: none; stroke: var(--line); stroke-width: 1 }
.a { stroke: var(--a); fill: var(--a); fill-opacity: .22 } .b { stroke: var(--b); fill: var(--b); fill-opacity: .22 }
.c { stroke: var(--c); fill: var(--c); fill-opacity: .22 } .d { stroke: var(--d); fill: var(--d); fill-opacity: .22 }
.over { stroke: var(--b); stroke-dasharray: 4 3 } .strong { fill-opacity: .5; stroke-width: 2 }
.arrow { stroke: var(--dim); stroke-width: 1.5 } .tip { fill: var(--dim); stroke: none } .bold { stroke-width: 2 }
"""
)
COLOURS = ("a", "b", "c", "d")


class Drawing:
    """Shapes and text, in the order in which they were added."""

    def __init__(self, title: str, height: int) -> None:
        self.title, self.height = title, height
        self.parts: list[str] = []

    def rect(self, x: float, y: float, w: float, h: float, style: str = "", round: int = 2) -> None:
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="{round}" class="{style}"/>'
        )

    def text(self, x: float, y: float, words: str, style: str = "") -> None:
        self.parts.append(f'<text x="{x:g}" y="{y:g}" class="{style}">{escape(words)}</text>')

    def box(self, x: float, y: float, w: float, h: float, words: str, style: str = "") -> None:
        """A rectangle with its lines of text in the middle."""
        self.rect(x, y, w, h, style, 5)
        lines = words.split("\n")
        for number, line in enumerate(lines):
            below = y + h / 2 + 4.5 + 16 * (number - (len(lines) - 1) / 2)
            self.text(x + w / 2, below, line, "mid" if number == 0 else "mid small dim")

    def grid(
        self, x: float, y: float, columns: int, rows: int, side: float, style: str = ""
    ) -> None:
        for row in range(rows):
            for column in range(columns):
                self.rect(x + column * side, y + row * side, side, side, style, 0)

    def arrow(self, x1: float, y1: float, x2: float, y2: float) -> None:
        length = ((x2 - x1) ** 2 + (y2 - y1) ** 2) ** 0.5
        u, v = (x2 - x1) / length, (y2 - y1) / length
        back, left, right = (x2 - 8 * u, y2 - 8 * v), (-4 * v, 4 * u), (4 * v, -4 * u)
        self.parts.append(
            f'<line x1="{x1:g}" y1="{y1:g}" x2="{back[0]:g}" y2="{back[1]:g}" class="arrow"/>'
            f'<path class="tip" d="M{x2:g} {y2:g} L{back[0] + left[0]:g} {back[1] + left[1]:g} '
            f'L{back[0] + right[0]:g} {back[1] + right[1]:g} Z"/>'
        )

    def line(self, x1: float, y1: float, x2: float, y2: float, style: str = "") -> None:
        self.parts.append(
            f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" class="{style}"/>'
        )

    def svg(self) -> str:
        inside = "\n".join(self.parts)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {self.height}" role="img">\n'
            f"<title>{escape(self.title)}</title>\n<style>{STYLE}</style>\n{inside}\n</svg>\n"
        )
