"""``python docs/diagrams.py``: draws the kernels' ideas as docs/figures/*.svg.

A test asks that running this changes nothing. Those of the GPU kernels are in gpu_diagrams.py.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))
from docs import gpu_diagrams
from docs.drawing import COLOURS, Drawing

FIGURES = Path(__file__).resolve().parent / "figures"


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


def dot_block() -> Drawing:
    d = Drawing("A linear layer forward: rows times rows, a block of 4 x 6 sums in registers", 310)
    d.text(16, 22, "x: rows of the batch", "head")
    d.text(16, 150, "w: rows of the weight, as they lie in memory", "head")
    for row in range(4):
        for vector in range(9):
            style = "a strong" if vector == 3 else "a"
            d.rect(16 + vector * 40, 34 + row * 20, 40, 17, style, 0)
    for row in range(6):
        for vector in range(9):
            style = "b strong" if vector == 3 else "b"
            d.rect(16 + vector * 40, 162 + row * 20, 40, 17, style, 0)
    d.text(156, 132, "one vector of 16 inputs of each", "mid small dim")
    d.text(384, 262, "read once", "small dim")
    d.arrow(384, 74, 448, 94)
    d.arrow(384, 212, 448, 160)
    d.text(456, 22, "4 x 6 sums, each a vector of 16", "head")
    for row in range(4):
        for column in range(6):
            d.rect(456 + column * 30, 66 + row * 30, 30, 30, "d", 0)
    d.text(546, 206, "10 loads for 24 multiply-adds;", "mid")
    d.text(546, 224, "lanes are added at the end", "mid dim")
    d.arrow(638, 126, 660, 126)
    d.box(664, 98, 90, 56, "y\n+ bias, ReLU")
    d.text(
        16,
        302,
        "1,024 inputs of the weight's rows wait in L1 while all rows of the batch pass.",
        "dim",
    )
    return d


def pool_columns() -> Drawing:
    d = Drawing("A 3x3 pool, two apart, of planes: columns first, which neighbours share", 250)
    side, x = 34, 100
    d.text(16, 22, "three rows of a plane", "head")
    for row in range(3):
        d.text(x - 10, 54 + row * 22, f"row {row}", "end small dim")
        for column in range(11):
            d.rect(x + column * side, 38 + row * 22, side, 20, "a", 0)
    d.text(x - 10, 134, "columns", "end small dim")
    for column in range(11):
        d.rect(x + column * side, 118, side, 22, "c" if column % 2 else "c strong", 0)
        d.arrow(x + (column + 0.5) * side, 102, x + (column + 0.5) * side, 116)
    d.text(x - 10, 204, "y", "end head")
    for window in range(5):
        left = x + 2 * window * side
        d.rect(left + 0.6 * side, 188, 1.8 * side, 24, "b", 3)
        for column in range(3):
            d.arrow(left + (column + 0.5) * side, 142, left + (1.2 + 0.3 * column) * side, 186)
    d.text(500, 54, "nine loads make 33 columns' maxima,")
    d.text(500, 74, "three vectors of 16 and a bit;")
    d.text(500, 132, "dark columns end one window")
    d.text(500, 150, "and begin the next")
    d.text(500, 194, "three shuffles and two maxima:")
    d.text(500, 212, "16 outputs")
    d.text(16, 242, "Tap by tap, a vector of outputs takes eighteen loads.", "dim")
    return d


def augment() -> Drawing:
    d = Drawing(
        "Crop, mirror, colour shift and mean subtraction: one pass from bytes to floats", 236
    )
    d.text(16, 22, "image: bytes", "head")
    d.rect(16, 36, 130, 130, "a")
    d.rect(34, 46, 100, 100, "a strong")
    d.rect(34, 92, 100, 8, "b strong", 0)
    d.text(84, 140, "crop", "mid small")
    d.text(16, 186, "256 x 256 x 3")
    d.arrow(150, 96, 196, 96)
    d.text(200, 22, "one row, in L1", "head")
    d.box(200, 74, 110, 44, "turned round\nwhere mirrored", "b")
    d.arrow(312, 96, 346, 96)
    d.box(
        350,
        36,
        176,
        120,
        "(x + shift - mean) scale\nshift: one colour an image\nmean: pixel or image",
        "c",
    )
    d.text(350, 186, "rounded as the transforms round,")
    d.text(350, 204, "so that every bit is theirs", "dim")
    d.arrow(528, 96, 572, 96)
    d.text(576, 22, "y: channels-last", "head")
    d.rect(576, 36, 120, 120, "d")
    d.rect(576, 92, 120, 8, "d strong", 0)
    d.rect(696, 36, 10, 120, "over", 0)
    d.text(576, 186, "227 x 227 x 3 floats;")
    d.text(576, 204, "a pitch of 228 adds zeros", "dim")
    d.text(
        16, 230, "A byte read and four written an element; nothing is written in between.", "dim"
    )
    return d


DRAWINGS: dict[str, Callable[[], Drawing]] = {
    "towers": towers,
    "winograd": winograd,
    "space_to_depth": space_to_depth,
    "lrn_window": lrn_window,
    "lrn_max_pool": lrn_max_pool,
    "conv_pool": conv_pool,
    "dot_block": dot_block,
    "pool_columns": pool_columns,
    "augment": augment,
    "implicit_gemm": gpu_diagrams.implicit_gemm,
    "split_k": gpu_diagrams.split_k,
    "stages": gpu_diagrams.stages,
    "lanes": gpu_diagrams.lanes,
    "pool_gather": gpu_diagrams.pool_gather,
    "pool_patch": gpu_diagrams.pool_patch,
}


def main() -> int:
    FIGURES.mkdir(exist_ok=True)
    for name, draw in DRAWINGS.items():
        (FIGURES / f"{name}.svg").write_text(draw().svg())
    return 0


if __name__ == "__main__":
    sys.exit(main())
