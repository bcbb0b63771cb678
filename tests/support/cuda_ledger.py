"""Writes the ledger of what nvcc makes of every CUDA kernel, for sm_90a: python -m tests.support.cuda_ledger.

The ledger, tests/ledger/cuda.json, is reviewed in diffs and checked by tests/test_cuda_extension.py.
"""

from __future__ import annotations

import itertools
from functools import cache
from pathlib import Path

import torch

from fastalex import _cuda_native
from tests.support import cuda_extension, static_ledger

LEDGER = Path(__file__).parent.parent / "ledger" / "cuda.json"
ARCH = f"sm_{cuda_extension.ARCHITECTURE}"
LRN, POOL, ONES = (5, 2e-5, 0.75, 2.0, 2), ((3, 3), (2, 2), (0, 0)), (1, 1)
# input shape, output channels, kernel, stride, padding, groups: the network's, batch 128
LAYERS = {
    "conv1": ((128, 3, 227, 228), 96, 11, 4, 0, 1),
    "conv2": ((128, 96, 27, 27), 256, 5, 1, 2, 2),
    "conv3": ((128, 256, 13, 13), 384, 3, 1, 1, 1),
    "conv4": ((128, 384, 13, 13), 384, 3, 1, 1, 2),
    "conv5": ((128, 384, 13, 13), 256, 3, 1, 1, 2),
}
FULLY_CONNECTED = {"fc6": (9216, 4096), "fc7": (4096, 4096), "fc8": (4096, 1000)}


def on_meta(shape, dtype, last: bool):
    order = torch.channels_last if last and len(shape) == 4 else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device="meta").to(memory_format=order)


def calls(dtype: torch.dtype, last: bool, tf32: bool):
    """(row of the evidence, operator, arguments) of the network."""
    yield from products(dtype, last, tf32, wgmma=False)
    x = on_meta((128, 96, 55, 55), dtype, last)
    pooled = on_meta((128, 96, 27, 27), dtype, last)
    offsets = on_meta((128, 96, 27, 27), torch.uint8, last)
    yield "lrn", "lrn", (x, *LRN)
    yield "lrn_backward", "lrn_backward", (x, x, *LRN)
    yield "max_pool/train", "max_pool", (x, *POOL, ONES, False, True)
    size = (55, 55)
    yield "max_pool_backward", "max_pool_backward", (pooled, offsets, size, *POOL, ONES)
    for save in (False, True):
        row = f"lrn_max_pool/{'train' if save else 'infer'}"
        yield row, "lrn_max_pool", (x, *LRN, *POOL, False, save)
    arguments = (pooled, x, offsets, *LRN, *POOL)
    yield "lrn_max_pool_backward", "lrn_max_pool_backward", arguments


def products(dtype: torch.dtype, last: bool, tf32: bool, wgmma: bool):
    """The same of convolutions and layers; of Hopper's instruction, those that it can serve."""
    for name, (shape, outputs, kernel, stride, padding, groups) in LAYERS.items():
        x = on_meta(shape, dtype, last)
        weight = on_meta((outputs, shape[1] // groups, kernel, kernel), dtype, last)
        side = (shape[2] + 2 * padding - kernel) // stride + 1
        y = on_meta((shape[0], outputs, side, side), dtype, last)
        geometry = ((stride, stride), (padding, padding), ONES, groups)
        if not wgmma or x.shape[1] % 8 == 0:
            yield f"conv_relu/{name}", "conv_relu", (x, weight, None, *geometry, tf32, wgmma)
        for i, which in enumerate(("input",) if wgmma else ("input", "weight")):
            mask = [j == i for j in range(3)]
            row = f"conv_relu_backward/{which}/{name}"
            yield row, "conv_relu_backward", (y, y, x, weight, *geometry, mask, tf32, wgmma)
    for name, (inputs, outputs) in FULLY_CONNECTED.items():
        x, weight = on_meta((128, inputs), dtype, last), on_meta((outputs, inputs), dtype, last)
        yield f"linear_relu/{name}", "linear_relu", (x, weight, None, True, tf32, wgmma)


def main_launch(op: str, arguments) -> _cuda_native.Launch:
    """The launch that does the work, not its preparation."""
    side = ("pack_weight", "reduce_splits", "mask_gradient", "sum_bias")
    launches = _cuda_native.planned(op, arguments)
    return next(one for one in launches if not any(name in one.kernel for name in side))


@cache
def shared_bytes() -> dict[str, int]:
    """{kernel: the most that a launch of the network asks for}."""
    most: dict[str, int] = {}
    halves, floats = (torch.float16, torch.bfloat16), torch.float32
    rows = [calls(dtype, last, False) for dtype in (*halves, floats) for last in (True, False)]
    rows += [calls(floats, last, True) for last in (True, False)]
    rows += [products(dtype, True, False, wgmma=True) for dtype in halves]
    for _, op, arguments in itertools.chain(*rows):
        for launch in _cuda_native.planned(op, arguments):
            most[launch.kernel] = max(most.get(launch.kernel, 0), launch.shared_bytes)
    return most


@cache
def measure() -> dict[str, dict]:
    """{entry: facts} of the library as it is built now."""
    facts = static_ledger.library_facts(cuda_extension.build(), shared_bytes())
    return {f"{ARCH}/{name}": row for name, row in facts.items()}


if __name__ == "__main__":
    static_ledger.write(LEDGER, measure())
    print(f"{len(measure())} entries")
