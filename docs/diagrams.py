"""``python docs/diagrams.py``: draws the kernels' ideas as docs/figures/*.svg, which read in light and in dark.

A test asks that running this changes nothing. Lengths are pixels of a page 760 wide.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from xml.sax.saxutils import escape

sys.path.append(str(Path(__file__).resolve().parents[1]))
from benchmarks.plots import PALETTE

FIGURES = Path(__file__).resolve().parent / "figures"
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


def towers() -> Drawing:
    d = Drawing("AlexNet's two towers: where they meet and where they do not", 260)
    stages = [
        ("conv1", "48 x 55²", 0), ("conv2", "128 x 27²", 0), ("conv3", "192 x 13²", 1),
        ("conv4", "192 x 13²", 0), ("conv5", "128 x 13²", 0), ("fc6", "2048", 1), ("fc7", "2048", 1),
    ]  # fmt: skip
    d.box(8, 96, 66, 56, "image\n3 x 227²")
    for at, (name, size, meets) in enumerate(stages):
        x = 100 + at * 84
        for tower, (y, style) in enumerate(((50, "a"), (150, "b"))):
            d.box(x, y, 68, 48, f"{name}\n{size}", style)
            if at == 0:
                d.arrow(76, 124, x - 2, y + 24)
                continue
            d.arrow(x - 15, y + 24, x - 1, y + 24)
            if meets:  # and from the other tower
                d.arrow(x - 15, 174 if tower == 0 else 74, x - 1, y + (34 if tower == 0 else 14))
    d.box(692, 96, 60, 56, "fc8\n1000")
    d.arrow(673, 78, 690, 112)
    d.arrow(673, 170, 690, 136)
    d.text(100, 36, "first tower", "head")
    d.text(100, 218, "second tower", "head")
    d.text(380, 18, "Maps cross between the towers at conv3, fc6, fc7 and fc8 alone", "mid")
    d.text(
        380,
        240,
        "conv2, conv4 and conv5 see their own tower: groups=2. LRN too stays inside its tower.",
        "mid dim",
    )
    return d


def _row_of_tiles(d: Drawing, x: float, y: float, tiles: Iterable[int], side: float) -> None:
    for number, tile in enumerate(tiles):
        d.rect(x, y, tile * side, 26, COLOURS[number % 2], 3)
        if tile * side > 14:
            d.text(x + tile * side / 2, y + 18, str(tile), "mid small")
        x += tile * side


def winograd() -> Drawing:
    d = Drawing("Nested Winograd tiles cover maps of 13, 27 and 55 without overhang", 330)
    d.text(8, 20, "One row of a map, tile by tile", "head")
    for y, size, tiles, words in (
        (36, 13, (5, 4, 4), "13 = 5 + 4 + 4"),
        (76, 27, (4,) * 6 + (3,), "27 = 6 x 4 + 3"),
        (116, 55, (5,) * 11, "55 = 11 x 5"),
    ):
        side = 13 if size < 55 else 7.2
        d.text(8, y + 18, words)
        _row_of_tiles(d, 112, y, tiles, side)
    d.text(8, 174, "tiles of 5 alone", "dim")
    _row_of_tiles(d, 112, 156, (5, 5, 5), 13)
    d.rect(112 + 13 * 13, 152, 2 * 13, 34, "over")
    d.text(112 + 16 * 13, 174, "15 for 13: in 2-D a third too many", "dim")
    d.text(8, 222, "One tile F(5, 3), in one dimension", "head")
    d.grid(112, 240, 7, 1, 24, "c")
    d.text(112 + 7 * 24 + 10, 257, "7 inputs, evaluated at 7 points: 7 products for 15")
    d.arrow(112 + 3.5 * 24, 268, 112 + 3.5 * 24, 290)
    d.grid(112 + 24, 294, 5, 1, 24, "a")
    d.text(112 + 7 * 24 + 10, 311, "5 outputs; F(4, 3) drops the last point, and keeps the weights")
    x, y, side = 590, 36, 11.5
    d.text(x, 20, "The map of 13 x 13", "head")
    for row, (top, h) in enumerate(((0, 5), (5, 4), (9, 4))):
        for column, (left, w) in enumerate(((0, 5), (5, 4), (9, 4))):
            style = COLOURS[(row + column) % 2] + (" strong" if row == column == 0 else "")
            d.rect(x + left * side, y + top * side, w * side, h * side, style)
            d.text(x + (left + w / 2) * side, y + (top + h / 2) * side + 4, f"{h}x{w}", "mid small")
    return d


def space_to_depth() -> Drawing:
    d = Drawing("conv1 by space to depth: 11x11 with stride 4 over 3 channels is 3x3 over 48", 268)
    side, x, y = 13, 20, 40
    d.text(x, 20, "11 x 11, 4 apart, 3 channels", "head")
    d.grid(x, y, 16, 14, side)
    d.rect(x, y, 11 * side, 11 * side, "a strong")
    d.rect(x + 4 * side, y, 11 * side, 11 * side, "b")
    for at in range(5):
        d.line(x + 4 * at * side, y, x + 4 * at * side, y + 14 * side, "arrow")
    for at in range(4):
        d.line(x, y + 4 * at * side, x + 16 * side, y + 4 * at * side, "arrow")
    d.text(x, 244, "the window, and its neighbour 4 pixels on;", "dim")
    d.text(x, 260, "heavy lines: blocks of 4 x 4 pixels", "dim")
    d.arrow(250, 120, 300, 120)
    d.text(275, 104, "while it", "mid small dim")
    d.text(275, 142, "is read", "mid small dim")
    bx, unit = 316, 16
    d.text(bx, 20, "one block", "head")
    for row in range(4):
        for column in range(4):
            d.rect(bx + column * unit, 60 + row * unit, unit, unit, COLOURS[(row + column) % 4], 0)
    d.text(bx, 150, "16 pixels x 3")
    d.text(bx, 168, "= 48 channels")
    d.arrow(400, 92, 444, 92)
    px, big = 462, 44
    d.text(px, 20, "3 x 3, 1 apart, 48 channels", "head")
    d.grid(px, 40, 4, 3, big)
    d.rect(px, 40, 3 * big, 3 * big, "a strong")
    d.rect(px + big, 40, 3 * big, 3 * big, "b")
    d.text(px + 4 * big + 14, 96, "stride 1, so", "dim")
    d.text(px + 4 * big + 14, 114, "Winograd's", "dim")
    d.text(px + 4 * big + 14, 132, "tiles apply", "dim")
    d.text(px, 204, "3 x 4 = 12 taps a side for 11: the")
    d.text(px, 222, "twelfth is zero, in the packed weights")
    return d


def lrn_window() -> Drawing:
    d = Drawing("LRN: a window of five channels slides along the channels of a pixel", 300)
    side, x, y = 28, 40, 60
    d.text(
        x,
        20,
        "A pixel's channels, adjacent in memory (channels-last), eight lanes a vector here",
        "head",
    )
    for at in range(24):
        d.rect(x + at * side, y, side, side, COLOURS[(0, 2, 3)[at // 8]], 0)
        d.text(x + (at + 0.5) * side, y + 18, f"{at}", "mid small")
    for at, words in enumerate(("before", "current", "after")):
        d.text(x + (8 * at + 4) * side, y - 8, words, "mid dim")
    d.rect(x + 8 * side, y - 3, 5 * side, side + 6, "over bold")
    d.text(x + 10.5 * side, y + 50, "window of channel 10: squares of 8 to 12", "mid")
    for number, (shift, words) in enumerate(
        ((-2, "<2"), (-1, "<1"), (0, "0"), (1, "1>"), (2, "2>"))
    ):
        top = 134 + number * 21
        d.rect(x + (8 + shift) * side, top, 8 * side, 17, "c" + (" strong" if not shift else ""), 3)
        d.text(x + 5.4 * side, top + 13, words, "end small dim")
    d.text(x + 18.6 * side, 152, "the squares, and four shifts")
    d.text(x + 18.6 * side, 170, "across their neighbours:")
    d.text(x + 18.6 * side, 188, "8 windows with 4 additions,")
    d.text(x + 18.6 * side, 206, "each channel loaded once")
    d.text(
        x,
        268,
        "y = x (k + scale * sum)^-beta. Beyond the edge of a tower lanes are zero: no window leaves it.",
    )
    d.text(
        x,
        288,
        "In NCHW neighbours are planes: four channels are made from the eight that their windows reach.",
        "dim",
    )
    return d


def lrn_max_pool() -> Drawing:
    d = Drawing(
        "LRN and 3x3/2 pooling in one pass: a row is normalised and joins the maxima at once", 300
    )
    d.text(20, 20, "rows of x, read once", "head")
    d.text(290, 20, "normalised, in registers", "head")
    d.text(520, 20, "best: a row of maxima, in L1", "head")
    for row in range(5):
        y = 36 + row * 46
        style = ("a", "a", "d", "b", "b")[row]
        d.rect(20, y, 190, 26, style)
        d.text(115, y + 18, f"row {row}", "mid")
        d.arrow(214, y + 13, 284, y + 13)
        for column in range(7):
            d.rect(290 + column * 22, y, 22, 26, style, 0)
        words = ("starts window 0", "joins it", "ends it, starts window 1", "joins it", "ends it")[
            row
        ]
        d.arrow(450, y + 13, 514, y + 13)
        d.text(520, y + 18, words)
        if row in (2, 4):
            d.arrow(680, y + 13, 712, y + 13)
            d.text(716, y + 18, f"y {row // 2 - 1}", "head")
    d.text(
        20,
        280,
        "Reads every x once, writes a quarter of as many y, and no normalised map ever reaches memory.",
        "dim",
    )
    return d


def conv_pool() -> Drawing:
    d = Drawing("Convolution, LRN and pool: in turn through memory, or fused inside the cache", 290)
    d.text(8, 22, "In turn", "head")
    d.box(8, 36, 120, 46, "convolution\nall images", "a")
    d.arrow(130, 59, 222, 59)
    d.box(226, 36, 190, 46, "memory: the whole map\nconv1 at batch 32: 37 MB", "b")
    d.arrow(418, 59, 510, 59)
    d.box(514, 36, 110, 46, "LRN + pool", "c")
    d.arrow(626, 59, 660, 59)
    d.box(664, 36, 88, 46, "pooled\n9 MB")
    d.text(176, 48, "writes", "mid small dim")
    d.text(464, 48, "reads", "mid small dim")
    d.text(8, 126, "Fused: each thread its own images", "head")
    for row, (name, y) in enumerate((("thread 0", 140), ("thread 1", 208))):
        d.rect(8, y, 640, 58, "", 6)
        d.text(18, y + 20, name, "small dim")
        for number in range(3):
            x = 84 + number * 190
            d.box(x, y + 7, 58, 44, f"conv\nimage {2 * number + row}", "a")
            d.arrow(x + 59, y + 29, x + 73, y + 29)
            d.box(x + 75, y + 7, 94, 44, "LRN + pool\n1.2 MB, cache", "c")
        d.arrow(650, y + 29, 662, y + 29)
        d.box(664, y + 6, 88, 46, "pooled\nto memory")
    return d


def implicit_gemm() -> Drawing:
    d = Drawing("A convolution as an implicit matrix product: a tile of pixels walks the taps", 330)
    side, x, y = 17, 16, 44
    d.text(x, 22, "input, channels-last", "head")
    d.grid(x, y, 11, 9, side)
    for number, (dy, dx) in enumerate(((0, 0), (0, 1), (1, 0))):
        d.rect(
            x + (2 + dx) * side, y + (2 + dy) * side, 6 * side, 2 * side, COLOURS[number] + " bold"
        )
    d.text(x, 220, "the same tile of 6 x 2 pixels, under three")
    d.text(x, 238, "of the nine taps: shifted addresses,")
    d.text(x, 256, "no im2col matrix in memory; what lies")
    d.text(x, 274, "outside the image is masked to zero")
    ax, ay = 300, 96
    d.text(ax, 22, "K: taps x channels, in steps", "head")
    for number in range(6):
        d.rect(ax + number * 30, ay, 30, 96, COLOURS[number // 2], 0)
    for number, words in enumerate(("tap 0,0", "tap 0,1", "tap 1,0")):
        d.text(ax + 30 + number * 60, ay - 8, words, "mid small")
    d.text(ax - 8, ay + 52, "M", "end head")
    d.text(ax, ay + 118, "M: pixels of the tile", "dim")
    bx = 560
    for number in range(6):
        d.rect(bx, 44 + number * 22, 84, 22, COLOURS[number // 2], 0)
    d.text(bx + 42, 36, "N: filters", "mid head")
    d.text(bx + 94, 112, "weights", "dim")
    d.arrow(490, 144, 552, 144)
    d.text(521, 136, "x", "mid")
    d.arrow(bx + 42, 180, bx + 42, 212)
    d.rect(bx, 216, 84, 76, "d strong")
    d.text(bx + 42, 250, "M x N sums", "mid")
    d.text(bx + 42, 268, "in registers", "mid small")
    d.text(bx + 94, 250, "+ bias, ReLU,", "dim")
    d.text(bx + 94, 268, "one write", "dim")
    d.text(
        16,
        318,
        "While one slice of K multiplies, the next ones are on their way to shared memory.",
        "dim",
    )
    return d


def split_k() -> Drawing:
    d = Drawing(
        "Split-K: a weight gradient's long sum is divided among programs, then added in order", 262
    )
    d.text(16, 22, "dw = sum over pixels of dy x", "head")
    d.text(
        16,
        42,
        "few outputs, a long sum: conv3 has 2,304 x 384 of them and 21,632 pixels at batch 128",
        "dim",
    )
    for number in range(4):
        x = 16 + number * 110
        d.rect(x, 64, 110, 34, COLOURS[number])
        d.text(x + 55, 86, "5,408 pixels", "mid small")
        d.arrow(x + 55, 100, x + 55, 126)
        d.box(x + 8, 130, 94, 44, f"program {number}\na tile of dw", COLOURS[number])
        d.arrow(x + 55, 176, 500, 200 + number * 3)
    d.box(506, 178, 110, 54, "add them\n0, 1, 2, 3: always", "")
    d.arrow(618, 205, 656, 205)
    d.box(660, 178, 88, 54, "dw", "d")
    d.text(16, 226, "Partial sums are float32, in a workspace;", "")
    d.text(16, 246, "no atomics, so the same bits on every run.", "")
    return d


DRAWINGS: dict[str, Callable[[], Drawing]] = {
    "towers": towers,
    "winograd": winograd,
    "space_to_depth": space_to_depth,
    "lrn_window": lrn_window,
    "lrn_max_pool": lrn_max_pool,
    "conv_pool": conv_pool,
    "implicit_gemm": implicit_gemm,
    "split_k": split_k,
}


def main() -> int:
    FIGURES.mkdir(exist_ok=True)
    for name, draw in DRAWINGS.items():
        (FIGURES / f"{name}.svg").write_text(draw().svg())
    return 0


if __name__ == "__main__":
    sys.exit(main())
