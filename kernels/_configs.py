"""Which tile each kernel runs with: plain tables by operator, layout, shape class, architecture."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch

from ._conv import Conv
from ._layout import is_channels_last, readable


@dataclass(frozen=True)
class Launch:
    """A kernel that works lane by lane: `block` lanes a program, `rows` output rows each lane."""

    block: int
    warps: int
    rows: int = 1

    def __str__(self) -> str:
        rows = f" of {self.rows} rows" if self.rows > 1 else ""
        return f"{self.block} lanes{rows}, {self.warps} warps"


@dataclass(frozen=True)
class ConvTile:
    """A convolution's tile: m pixels by n + n2 channels, k products a step, `split` parts of K."""

    m: int
    n: int
    n2: int
    k: int
    warps: int
    stages: int
    split: int = 1

    def __str__(self) -> str:
        second = f"+{self.n2}" if self.n2 else ""
        parts = f", {self.split} parts" if self.split > 1 else ""
        sizes = f"{self.m}x{self.n}{second}x{self.k}"
        return f"{sizes}, {self.warps} warps, {self.stages} stages{parts}"


# (direction, channels_last): candidates, best guess first
LRN = {
    ("forward", True): (Launch(128, 4), Launch(256, 4)),
    ("forward", False): (Launch(128, 4), Launch(256, 4)),
    ("backward", True): (Launch(128, 4), Launch(64, 2)),
    ("backward", False): (Launch(128, 4), Launch(64, 2)),
}

# (direction, channels_last, normalised): a lane that normalises walks further, as each row it keeps
# saves more
POOL = {
    ("forward", True, False): (Launch(128, 4, 2), Launch(128, 4, 4)),
    ("forward", False, False): (Launch(256, 4, 2), Launch(512, 4, 2)),
    ("forward", True, True): (Launch(128, 4, 4), Launch(128, 4, 8)),
    ("forward", False, True): (Launch(128, 4, 4), Launch(128, 4, 8)),
    ("backward", True, False): (Launch(128, 4), Launch(256, 8)),
    ("backward", False, False): (Launch(256, 4), Launch(512, 4)),
    ("backward", True, True): (Launch(128, 4), Launch(64, 2)),
    ("backward", False, True): (Launch(128, 4), Launch(64, 2)),
}


def lrn_launches(direction: str, x: torch.Tensor) -> tuple[Launch, ...]:
    """Every launch of LRN that can be chosen for x, the one taken unmeasured first."""
    return LRN[direction, is_channels_last(readable(x))]


def pool_launches(direction: str, x: torch.Tensor, normalised: bool) -> tuple[Launch, ...]:
    return POOL[direction, is_channels_last(readable(x)), normalised]


# scheme: tiles for halves; a float32 tile has half the k, to take the same shared memory. Tiles of 32 pixels are for
# batch 1, where 64 would leave more of a map's last one empty.
CONV_FORWARD = {
    "rows": (
        ConvTile(128, 64, 32, 32, 8, 3),
        ConvTile(64, 64, 32, 32, 4, 3),
        ConvTile(128, 64, 0, 32, 4, 3),
        ConvTile(64, 32, 0, 32, 4, 3),
    ),
    "flat": (
        ConvTile(128, 128, 0, 64, 8, 3),
        ConvTile(64, 128, 0, 32, 8, 4),
        ConvTile(128, 64, 0, 32, 4, 3),
        ConvTile(64, 64, 0, 32, 4, 3),
        ConvTile(128, 32, 16, 32, 4, 3),
        ConvTile(32, 64, 0, 32, 4, 3),
        ConvTile(64, 32, 0, 32, 4, 3),
        ConvTile(64, 16, 0, 32, 4, 3),
    ),
    "taps": (
        ConvTile(128, 128, 0, 64, 8, 3),
        ConvTile(64, 128, 0, 64, 4, 3),
        ConvTile(128, 64, 0, 64, 4, 3),
        ConvTile(64, 64, 0, 64, 4, 3),
        ConvTile(64, 32, 0, 64, 4, 3),
        ConvTile(64, 16, 0, 64, 4, 3),
    ),
    "planes": (
        ConvTile(128, 64, 32, 32, 8, 3),
        ConvTile(128, 64, 0, 32, 8, 3),
        ConvTile(64, 64, 0, 32, 4, 3),
        ConvTile(32, 64, 0, 32, 4, 3),
        ConvTile(64, 32, 0, 16, 4, 3),
        ConvTile(64, 16, 0, 32, 4, 3),
    ),
}
# with a max-pool behind: m pixels are a patch of the map
CONV_POOL = (
    ConvTile(256, 64, 32, 32, 8, 3),
    ConvTile(256, 64, 0, 32, 8, 3),
    ConvTile(128, 64, 32, 32, 8, 3),
    ConvTile(128, 64, 0, 32, 8, 3),
    ConvTile(64, 32, 0, 32, 4, 3),
)
# whether channels_last: scattered loads leave registers for small tiles only
CONV_INPUT_GRADIENT = {
    True: (
        ConvTile(128, 128, 0, 64, 8, 3),
        ConvTile(128, 64, 0, 64, 4, 3),
        ConvTile(64, 64, 0, 64, 4, 3),
        ConvTile(128, 32, 16, 64, 4, 3),
        ConvTile(64, 32, 0, 32, 4, 3),
        ConvTile(64, 16, 0, 32, 4, 3),
    ),
    False: (
        ConvTile(64, 64, 0, 32, 4, 3),
        ConvTile(64, 32, 0, 32, 4, 3),
        ConvTile(64, 16, 0, 32, 4, 3),
    ),
}
# m pixels a step, tiles of n + n2 output channels by k products
CONV_WEIGHT_GRADIENT = {
    True: (
        ConvTile(32, 128, 0, 128, 8, 4),
        ConvTile(64, 128, 0, 64, 4, 3),
        ConvTile(64, 64, 0, 64, 4, 3),
        ConvTile(64, 64, 32, 64, 4, 3),
        ConvTile(32, 32, 0, 64, 4, 3),
        ConvTile(32, 16, 0, 64, 4, 3),
    ),
    False: (
        ConvTile(32, 128, 0, 128, 8, 4),
        ConvTile(32, 64, 0, 64, 4, 3),
        ConvTile(32, 32, 0, 64, 4, 3),
        ConvTile(32, 16, 0, 64, 4, 3),
    ),
}
# float32 products outside the tensor cores: registers are all it needs
IEEE_TILE = ConvTile(64, 32, 0, 16, 4, 2)
LEAST_K = 16  # that tl.dot takes
CANDIDATES = 4  # tiles worth measuring for one shape
NARROWEST = 32  # channels: every table has a tile no wider
FEW_PROGRAMS = 128  # a launch with fewer leaves most of a GPU idle: split K, or take a smaller tile
MOST_PARTS = 8
MOST_WEIGHT_PARTS = 96
FEWEST_STEPS = 4  # of K that a part is worth


def fits(tile: ConvTile, channels: int) -> bool:
    """Whether at most half of the tile's channels would be padding."""
    return tile.n + tile.n2 < 2 * max(channels, NARROWEST // 2 + 1)


def conv_tiles(
    conv: Conv, scheme: str, batch: int, dtype: torch.dtype, precision: str
) -> list[ConvTile]:
    """Every forward tile that can be chosen, the one the model below expects most of first."""
    tiles = [IEEE_TILE] if dtype == torch.float32 and precision == "ieee" else CONV_FORWARD[scheme]
    if dtype == torch.float32 and precision != "ieee":
        tiles = [replace(t, k=max(t.k // 2, LEAST_K)) for t in tiles]
    fitted = [with_split(t, conv, scheme, batch) for t in tiles if fits(t, conv.outputs)]
    return sorted(fitted, key=lambda t: tile_cost(t, conv, batch))[:CANDIDATES]


def pooled_tiles(conv: Conv, dtype: torch.dtype, precision: str) -> list[ConvTile]:
    """Of a convolution with its pool, every tile that can be chosen."""
    if dtype == torch.float32 and precision == "ieee":
        return [IEEE_TILE]
    k = 2 if dtype == torch.float32 else 1
    return [replace(t, k=t.k // k) for t in CONV_POOL if fits(t, conv.outputs)][:CANDIDATES]


def tile_programs(tile: ConvTile, conv: Conv, batch: int) -> int:
    return (
        -(-batch * conv.out_pixels // tile.m) * -(-conv.outputs // (tile.n + tile.n2)) * conv.groups
    )


def with_split(tile: ConvTile, conv: Conv, scheme: str, batch: int) -> ConvTile:
    """The tile with K split as the shape alone decides: no device changes a result's bits."""
    if scheme == "rows":
        return tile
    most = min(
        MOST_PARTS,
        conv.products // (tile.k * FEWEST_STEPS),
        FEW_PROGRAMS // tile_programs(tile, conv, batch),
    )
    steps = max(-(-conv.products // tile.k), 1)  # without products there is still the bias
    share = -(-steps // max(most, 1))
    return replace(tile, split=-(-steps // share))  # no part without a step


def tile_cost(tile: ConvTile, conv: Conv, batch: int) -> float:
    """Relative time, by a model: programs beyond a full GPU (a multiprocessor holds several, so no whole waves),
    products a step, values a step must load.
    """
    programs = tile_programs(tile, conv, batch) * tile.split
    waves = max(programs / FEW_PROGRAMS, 1)
    n = tile.n + tile.n2
    products = tile.m * n
    loads = 32 * (tile.m + n)
    reduction = 2e-2 * batch * conv.out_pixels * conv.outputs * conv.groups * (tile.split > 1)
    return waves * (products + loads) * conv.products / tile.split / 1e3 + reduction


def input_gradient_tiles(
    conv: Conv, last: bool, batch: int, dtype: torch.dtype, precision: str, arch: str
) -> list[ConvTile]:
    """Every tile of the input gradient that can be chosen, the one expected best first."""
    if dtype == torch.float32 and precision == "ieee":
        return [IEEE_TILE]
    tiles = CONV_INPUT_GRADIENT[last]
    if dtype == torch.float32:  # on sm_100 two accumulators spill
        tiles = [replace(t, k=t.k // 2) for t in tiles if not (t.n2 and arch.startswith("sm_10"))]
    fitted = [t for t in tiles if fits(t, conv.inputs)]
    return sorted(fitted, key=lambda t: input_gradient_cost(t, conv, batch))[:CANDIDATES]


def input_gradient_cost(tile: ConvTile, conv: Conv, batch: int) -> float:
    n = tile.n + tile.n2
    programs = -(-batch * conv.rows * conv.columns // tile.m) * -(-conv.inputs // n) * conv.groups
    steps = -(-conv.outputs // tile.k) * tile.k
    return -(-programs // FEW_PROGRAMS) * (tile.m * n + 32 * (tile.m + n)) * steps


@functools.cache
def architecture(device: torch.device) -> str:
    """A name such as sm_90 or gfx942; empty where there is no GPU."""
    if device.type != "cuda" or not torch.cuda.is_available():  # a fake tensor needs no GPU
        return ""
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def outputs_first(tile: ConvTile, arch: str) -> bool:
    """Whether the weight gradient's tiles are [outputs, products].

    sm_80 copies both operands asynchronously in this order alone; on sm_100 it spills.
    """
    return tile.n2 == 0 and tile.n >= 64 and not arch.startswith("sm_10")


def masks_at_load(output_mask, arch: str) -> bool:
    """Whether the weight gradient masks its own operand: see conv_relu_backward.py; sm_8x lacks the registers."""
    return output_mask[1] and not output_mask[0] and not arch.startswith("sm_8")


def weight_gradient_table(last: bool, arch: str) -> list[ConvTile]:
    """The table but for what an architecture can't hold: two accumulators on sm_8x take 255 registers."""
    return [t for t in CONV_WEIGHT_GRADIENT[last] if not (t.n2 and arch.startswith("sm_8"))]


def weight_gradient_tiles(
    conv: Conv, last: bool, batch: int, dtype: torch.dtype, precision: str, arch: str
) -> list[ConvTile]:
    """Every tile of the weight gradient that can be chosen, the one expected best first."""
    if dtype == torch.float32 and precision == "ieee":
        tiles = [replace(IEEE_TILE, m=16, n=32, k=32)]
    else:
        table = weight_gradient_table(last, arch)
        tiles = [replace(t, m=t.m // 2) if dtype == torch.float32 else t for t in table]
    split = [
        replace(t, split=weight_gradient_split(t, conv, batch))
        for t in tiles
        if fits(t, conv.outputs)
    ]
    return sorted(split, key=lambda t: weight_gradient_cost(t, conv, batch))[:CANDIDATES]


def weight_gradient_programs(tile: ConvTile, conv: Conv) -> int:
    return -(-conv.outputs // (tile.n + tile.n2)) * conv.groups * -(-conv.products // tile.k)


def weight_gradient_split(tile: ConvTile, conv: Conv, batch: int) -> int:
    """Parts the pixels are summed in, by the shape alone: enough for two waves of programs."""
    by_pixels = batch * conv.out_pixels // (tile.m * FEWEST_STEPS)
    return max(
        1,
        min(MOST_WEIGHT_PARTS, 2 * FEW_PROGRAMS // weight_gradient_programs(tile, conv), by_pixels),
    )


def weight_gradient_cost(tile: ConvTile, conv: Conv, batch: int) -> float:
    n = tile.n + tile.n2
    waves = -(-weight_gradient_programs(tile, conv) * tile.split // FEW_PROGRAMS)
    return waves * (tile.k * n + 32 * (tile.k + n)) * -(-batch * conv.out_pixels // tile.split)
