"""How much of the matrix units' work is padding: what the docstrings and `explain` say of a tile, and tests hold it to.

Each function gives work done over work needed, minus one. Needed are a convolution's own multiply-adds, N OH OW O K,
taps in the image's padding included.
"""

from __future__ import annotations

from ._configs import ConvTile, tile_programs
from ._conv import Conv, packed_products
from ._conv_image_gradient import block_convolution, by_blocks


def padded(n: int, block: int) -> int:
    return -(-n // block) * block


def needed(conv: Conv, batch: int) -> int:
    """Multiply-adds of one group."""
    return batch * conv.out_pixels * conv.outputs * conv.products


def forward(conv: Conv, scheme: str, tile: ConvTile, batch: int) -> float:
    return forward_work(conv, scheme, tile, batch) / needed(conv, batch) - 1


def forward_work(conv: Conv, scheme: str, tile: ConvTile, batch: int) -> int:
    m = padded(batch * conv.out_pixels, tile.m)
    n = padded(conv.outputs, tile.n + tile.n2)
    return m * n * packed_products(conv, scheme, tile.k)[1]


def copied(conv: Conv, tile: ConvTile, batch: int) -> int:
    """Values of x and w that the programs of a forward pass copy, mostly from L2."""
    return tile_programs(tile, conv, batch) * (tile.m + tile.n + tile.n2) * conv.products


def input_gradient(conv: Conv, tile: ConvTile, batch: int) -> float:
    """Over all phases: a stride of 4 makes 16 of them, each with its own taps. Few channels go by blocks."""
    if by_blocks(conv):
        work = forward_work(block_convolution(conv), "flat", tile, batch)
        return work / needed(conv, batch) - 1
    m = padded(batch * -(-conv.rows // conv.sh) * -(-conv.columns // conv.sw), tile.m)
    n = padded(conv.inputs, tile.n + tile.n2)
    down = phase_taps(conv.sh, conv.ph, conv.dh, conv.r)
    across = phase_taps(conv.sw, conv.pw, conv.dw, conv.s)
    taps = sum(a * b for a in down for b in across)
    return m * n * taps * padded(conv.outputs, tile.k) / needed(conv, batch) - 1


def phase_taps(stride: int, padding: int, dilation: int, taps: int) -> list[int]:
    """Of each phase of the stride, the kernel taps that reach its pixels."""
    return [
        sum((phase + padding - tap * dilation) % stride == 0 for tap in range(taps))
        for phase in range(stride)
    ]


def weight_gradient(conv: Conv, run: int, tile: ConvTile, batch: int) -> float:
    """`run` is the pitch of a kernel row on the tile's N axis, 0 where rows aren't taken whole."""
    total = batch * conv.out_pixels
    share = padded(-(-total // tile.m), tile.split) // tile.split * tile.m
    n = padded(conv.r * run if run else conv.products, tile.k)
    o = padded(conv.outputs, tile.n + tile.n2)
    pixels = min(share * tile.split, padded(total, tile.m))
    return o * n * pixels / needed(conv, batch) - 1
