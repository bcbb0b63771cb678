"""Lower bounds on the time of the Triton kernels, from counts over published peaks; and whether pooling in a
convolution's epilogue could pay.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fastalex.kernels._conv import Conv, geometry, packed_products

from tests.support import triton_cases
from tests.support.triton_cases import BATCH, DTYPES, LAYERS
from tests.support.triton_launches import Launched, recording

BYTES = 2  # of a float16


@dataclass(frozen=True)
class Gpu:
    """Published dense peaks. The clock is the one that the matrix peak implies."""

    arch: str
    tera: float  # float16 matrix FLOP/s
    giga: float  # DRAM bytes/s
    sms: int
    flops_a_clock: int  # of an SM's matrix units

    @property
    def clock(self) -> float:
        return self.tera * 1e12 / (self.sms * self.flops_a_clock)

    @property
    def issued(self) -> float:
        """Warp instructions a second: four schedulers an SM, one each clock."""
        return 4 * self.sms * self.clock


GPUS = {
    "A100 80GB": Gpu("sm_80", 312, 2039, 108, 2048),
    "H100 SXM": Gpu("sm_90", 989, 3350, 132, 4096),
    "B200": Gpu("sm_100", 2250, 8000, 148, 8192),
}


def trips(launched: Launched) -> float:
    """How often a program of this launch runs its innermost loop."""
    a = launched.arguments
    if launched.kernel == "conv_relu_forward":
        body = packed_products(a["CONV"], a["SCHEME"], a["BK"])[0]
        return -(-body // a["BK"]) / a["SPLIT"]
    if launched.kernel == "conv_relu_pool_forward":
        return -(-packed_products(a["CONV"], a["SCHEME"], a["BK"])[0] // a["BK"])
    if launched.kernel == "conv_input_gradient":
        conv: Conv = a["CONV"]
        return conv.r * conv.s / (conv.sh * conv.sw) * -(-conv.outputs // a["BK"])
    if launched.kernel == "conv_weight_gradient":
        return -(-a["batch"] * a["CONV"].out_pixels // a["BP"]) / a["SPLIT"]
    return a["ROWS"] if launched.kernel == "pool_forward" else 1


def warp_instructions(case: triton_cases.Case, facts: dict) -> float:
    """At least: the innermost loop's, where there is one, else all of a straight kernel's."""
    with recording() as found:
        case.call()
    (launched,) = (each for each in found if each.kernel == case.kernel)
    a_warp = facts["instructions"]
    if facts["inner_loops"] and launched.kernel == "conv_relu_pool_forward":  # a long epilogue
        a_warp += max(facts["inner_loops"]) * (trips(launched) - 1)
    elif facts["inner_loops"]:
        a_warp = max(facts["inner_loops"]) * trips(launched)
    return math.prod(launched.grid) * facts["warps"] * a_warp


def costs() -> dict[str, tuple[str, float, float]]:
    """{kernel: (prefix of its ledger entry, FLOPs, compulsory bytes)} of one call."""
    found = {}
    for name, ((c, h, w), _, o, kernel, stride, padding, groups) in LAYERS.items():
        if name in ("narrow", "conv1-unpadded"):
            continue
        out = ((h + 2 * padding - kernel) // stride + 1) * (
            (w + 2 * padding - kernel) // stride + 1
        )
        products = kernel * kernel * c // groups
        flops = 2.0 * BATCH * out * o * products
        moved = float(BYTES * (BATCH * (c * h * w + out * o) + o * products))
        found[f"conv_relu {name}"] = f"conv_relu/{name}/fp16/nhwc/b{BATCH}/", flops, moved
        for which in ("input", "weight"):
            prefix = f"conv_relu_backward/{which}/{name}/fp16/nhwc/"
            found[f"{which} gradient {name}"] = prefix, flops, moved
    rows, inputs, outputs = BATCH, 9216, 4096
    moved = float(BYTES * (rows * (inputs + outputs) + inputs * outputs))
    prefix = f"linear_relu/fc6/fp16/b{BATCH}"
    found["linear_relu fc6"] = prefix, 2.0 * rows * inputs * outputs, moved
    moved = float(BATCH * 227 * 3 * (227 + 228 * BYTES))
    found["augment to 227 x 227"] = "augment/fp16/colour", 0.0, moved
    x, y = BATCH * 96 * 55 * 55 * BYTES, BATCH * 96 * 27 * 27
    conv = pooled_conv("conv1 of CaffeNet")
    flops = 2.0 * BATCH * 16 * 256 * conv.out_channels * conv.products  # 16 patches of 16 x 16
    moved = float(BYTES * BATCH * (3 * 227 * 227 + pooled(55) ** 2 * conv.out_channels))
    found["conv_relu_max_pool conv1"] = "conv_relu_max_pool/conv1/fp16/nhwc/", flops, moved
    found["lrn norm1"] = "lrn/fp16/nhwc/", 0.0, 2.0 * x
    found["lrn_backward norm1"] = "lrn_backward/fp16/nhwc/", 0.0, 3.0 * x
    for op, prefix in (("max_pool", "max_pool/train"), ("lrn_max_pool", "lrn_max_pool/train")):
        found[f"{op} norm1, training"] = f"{prefix}/fp16/nhwc/", 0.0, float(x + y * (BYTES + 1))
    found["max_pool norm1, inference"] = "max_pool/infer/fp16/nhwc/", 0.0, float(x + y * BYTES)
    found["lrn_max_pool norm1, inference"] = (
        "lrn_max_pool/infer/fp16/nhwc/",
        0.0,
        float(x + y * BYTES),
    )
    found["max_pool_backward norm1"] = (
        "max_pool_backward/fp16/nhwc/",
        0.0,
        float(x + y * (BYTES + 1)),
    )
    prefix = "lrn_max_pool_backward/fp16/nhwc/"
    found["lrn_max_pool_backward norm1"] = prefix, 0.0, 2.0 * x + y * (BYTES + 1)
    return found


def bounds(ledger: dict, names: dict) -> dict[str, dict[str, dict[str, float]]]:
    """{kernel: {GPU: {"f", "b", "i": microseconds at least, by FLOPs, bytes and instruction issue}}}."""
    found: dict = {}
    for label, (prefix, flops, moved) in costs().items():
        found[label] = {}
        for title, gpu in GPUS.items():
            name = next(n for n in names if n.startswith(f"{gpu.arch}/{prefix}"))
            issued = warp_instructions(names[name][0], ledger[name]) / gpu.issued
            seconds = {
                "f": flops / gpu.tera / 1e12,
                "b": moved / gpu.giga / 1e9,
                "i": issued,
            }
            found[label][title] = {kind: 1e6 * s for kind, s in seconds.items()}
    return found


# --- conv + bias + ReLU + max_pool in one kernel? ---------------------------------------------------

POOLED = {  # [C, H, W], O, kernel, stride, padding, groups: layers that a 3x3/2 pool follows at once
    "conv1 of CaffeNet": ((3, 227, 227), 96, 11, 4, 0, 1),
    "conv1 of torchvision": ((3, 224, 224), 64, 11, 4, 2, 1),
    "conv2 of CaffeNet": ((96, 27, 27), 256, 5, 1, 2, 2),
    "conv2 of torchvision": ((64, 27, 27), 192, 5, 1, 2, 1),
    "conv5 of every preset": ((384, 13, 13), 256, 3, 1, 1, 2),
}
TILES = (64, 128, 256)  # pixels an accumulator may hold: powers of two


def pooled_conv(name: str) -> Conv:
    (c, h, w), o, kernel, stride, padding, groups = POOLED[name]
    weight = triton_cases.meta((o, c // groups, kernel, kernel), DTYPES["fp16"], True)
    return geometry((h, w), weight, (stride,) * 2, (padding,) * 2, (1, 1), groups)


def pooled(n: int) -> int:
    return (n - 3) // 2 + 1


def recomputed(conv: Conv) -> tuple[float, int, int, int]:
    """(multiply-adds over the convolution's own, pixels of the tile, pooled rows and columns it yields), the least.

    A tile of p by q pooled outputs needs (2p + 1)(2q + 1) pixels of the map: what tiles share is computed twice, and
    what is left of a power of two not used.
    """
    rows, columns = pooled(conv.out_rows), pooled(conv.out_columns)
    options = []
    for size in TILES:
        for p in range(1, rows + 1):
            q = min((size // (2 * p + 1) - 1) // 2, columns)
            if q >= 1:
                tiles = -(-rows // p) * -(-columns // q)
                options.append((tiles * size / conv.out_pixels, size, p, q))
    return min(options)


def fusion(name: str, gpu: Gpu) -> tuple[float, float]:
    """Lower bounds of an image in microseconds: (convolution then pool, both in one kernel)."""
    (c, h, w), *_ = POOLED[name]
    conv = pooled_conv(name)
    full = conv.out_pixels * conv.out_channels * BYTES
    small = pooled(conv.out_rows) * pooled(conv.out_columns) * conv.out_channels * BYTES
    image = c * h * w * BYTES
    flops = 2 * conv.out_pixels * conv.out_channels * conv.products

    def seconds(flops: float, moved: float) -> float:
        return max(flops / gpu.tera / 1e12, moved / gpu.giga / 1e9)

    apart = seconds(flops, image + full) + seconds(0, full + small)
    together = seconds(flops * recomputed(conv)[0], image + small)
    return 1e6 * apart, 1e6 * together
