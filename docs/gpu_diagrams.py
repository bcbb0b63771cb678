"""Diagrams of the GPU kernels' ideas, for diagrams.py."""

from __future__ import annotations

from docs.drawing import COLOURS, Drawing


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


def stages() -> Drawing:
    d = Drawing(
        "CUDA C++: a ring of four stages in shared memory keeps copies ahead of products", 300
    )
    d.text(16, 22, "shared memory: four stages, a slice of pixels and one of filters each", "head")
    for slot in range(4):
        x = 16 + slot * 130
        d.box(x, 36, 74, 40, f"stage {slot}\n128 pixels", "a")
        d.rect(x + 78, 36, 38, 40, "b", 5)
        d.text(x + 97, 60, "96", "mid small")
    d.text(544, 52, "57 KB: two blocks share")
    d.text(544, 70, "a multiprocessor", "dim")
    d.text(16, 110, "in time", "head")
    for step in range(5):
        x = 100 + step * 112
        d.text(x + 52, 110, f"slice {step}", "mid small dim")
        d.box(x, 120, 104, 34, f"multiply {step}", COLOURS[step % 4] + " strong")
        d.rect(x, 158, 104, 24, COLOURS[(step + 3) % 4], 5)
        d.text(x + 52, 174, f"copy of {step + 3} starts", "mid small")
    d.text(92, 142, "products", "end small dim")
    d.text(92, 174, "copies", "end small dim")
    d.arrow(664, 152, 716, 152)
    d.box(
        16,
        206,
        352,
        48,
        "mma.sync, compute capability 8.0 on\nldmatrix: stage to registers, then 16 x 8 x 16 products",
    )
    d.box(
        392,
        206,
        352,
        48,
        "wgmma, 9.0 alone\nfour warps multiply out of the stage, by its descriptor",
    )
    d.text(
        16,
        284,
        "A slice is 64 bytes deep: 32 halves or 16 floats. One barrier a slice; sums never leave registers.",
        "dim",
    )
    return d


def lanes() -> Drawing:
    d = Drawing("LRN on a GPU: a lane owns eight channels and reads its neighbours' again", 236)
    side, x, y = 28, 44, 44
    d.text(x, 22, "a pixel's channels, in halves", "head")
    for at in range(24):
        d.rect(x + at * side, y, side, side, COLOURS[(0, 2, 3)[at // 8]], 0)
        d.text(x + (at + 0.5) * side, y + 18, f"{at}", "mid small")
    for lane in range(3):
        top = 92 + lane * 34
        left = x + 8 * lane * side
        d.rect(left, top, 8 * side, 24, COLOURS[(0, 2, 3)[lane]] + " strong", 3)
        d.text(left + 4 * side, top + 17, f"lane {lane}: one load of 16 bytes", "mid small")
        for start in (8 * lane - 2, 8 * lane + 8):
            if 0 <= start < 24:
                d.rect(x + start * side, top, 2 * side, 24, "over", 3)
                d.text(x + (start + 1) * side, top + 17, "4 bytes", "mid small dim")
    d.text(
        x,
        214,
        "Dashed: the neighbours that a window of five reaches, from L1, for their line is there.",
    )
    d.text(x, 232, "Nothing crosses lanes: no shuffle, no shared memory, no barrier.", "dim")
    return d


def pool_gather() -> Drawing:
    d = Drawing("The pool's gradient gathers: a pixel asks each window that holds it", 270)
    side, x, y = 28, 24, 40
    d.text(x, 22, "input: windows of 3x3, two apart", "head")
    d.grid(x, y, 7, 7, side)
    for number, (row, column) in enumerate(((0, 0), (0, 2), (2, 0), (2, 2))):
        inset = 2 * number
        d.rect(
            x + (column + 1) * side + inset,
            y + (row + 1) * side + inset,
            3 * side - 2 * inset,
            3 * side - 2 * inset,
            COLOURS[number] + " bold",
        )
    d.rect(x + 3 * side, y + 3 * side, side, side, "d strong", 0)
    d.text(x + 3.5 * side, y + 3.5 * side + 5, "p", "mid head")
    d.text(x, 256, "four windows hold p; others, one or two", "dim")
    ox = 330
    d.text(ox, 22, "saved byte of each window: its winner's tap", "head")
    for number, (tap, saved) in enumerate(((8, 8), (6, 1), (2, 2), (0, 4))):
        top = 40 + number * 46
        d.box(ox, top, 110, 34, f"saved {saved}", COLOURS[number])
        mark = "yes" if tap == saved else "no"
        d.text(ox + 122, top + 21, f"p is its tap {tap}: {mark}")
        if tap == saved:
            d.arrow(ox + 256, top + 17, ox + 300, 118)
    d.box(ox + 304, 96, 110, 44, "gradient of p\nthe sum of two", "d")
    d.text(ox, 240, "Each pixel adds its own, in one order: no atomics,")
    d.text(ox, 256, "every gradient and byte read once from memory", "dim")
    return d


def pool_patch() -> Drawing:
    d = Drawing(
        "Convolution and pool in one kernel: a patch of 16 x 16 pixels for 7 x 7 windows", 310
    )
    side, x, y = 14, 24, 40
    d.text(x, 22, "the patch, in registers", "head")
    for row in range(8):
        for column in range(8):
            style = "" if row == 7 or column == 7 else "a"
            d.rect(x + 2 * column * side, y + 2 * row * side, 2 * side, 2 * side, style, 0)
    d.rect(x, y, 3 * side, 3 * side, "b bold", 0)
    d.rect(x + 2 * side, y, 3 * side, 3 * side, "d bold", 0)
    d.rect(x + 14 * side, y, 4 * side, 16 * side, "over", 0)
    d.text(
        x,
        288,
        "a cell of 2 x 2 starts a window; the next patch (dashed) computes the last two columns again",
    )
    d.arrow(300, 150, 338, 150)
    d.box(342, 56, 200, 54, "split columns in pairs\nmaximum, and the next pair's first", "b")
    d.arrow(442, 112, 442, 132)
    d.box(342, 136, 200, 54, "split rows in pairs\nmaximum, and the next pair's first", "b")
    d.text(342, 216, "the neighbour comes by one gather")
    d.text(342, 234, "across lanes each", "dim")
    d.arrow(544, 164, 584, 164)
    d.grid(590, 96, 7, 7, 18, "c")
    d.text(653, 86, "7 x 7 maxima", "mid head")
    d.text(590, 246, "the map itself is", "dim")
    d.text(590, 262, "never in memory", "dim")
    return d
