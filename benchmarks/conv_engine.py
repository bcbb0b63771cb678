"""The CPU convolution engine by itself: against oneDNN, against its own alternatives, accuracy.

    python benchmarks/conv_engine.py layers    # AlexNet: forward, packing, gradients
    python benchmarks/conv_engine.py linear    # its fully connected layers, forward and backward
    python benchmarks/conv_engine.py picks     # the cost model's pick and every alternative
    python benchmarks/conv_engine.py accuracy  # error of every tile against float64

Providers are interleaved and compared by medians. FASTALEX_CPU_ISA chooses the instruction set.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import fastalex
from fastalex.ops import _cpu_conv
from fastalex.ops.conv_relu import CONV_RELU, CONV_RELU_BACKWARD

NHWC = torch.channels_last
DIRECT, WINOGRAD = 1, 2


@dataclass(frozen=True)
class Shape:
    """A convolution; ``input`` is (batch, channels, height, width)."""

    input: tuple[int, int, int, int]
    filters: int
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    groups: int = 1

    @property
    def geometry(self) -> tuple[Any, ...]:
        return self.stride, self.padding, (1, 1), self.groups

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Rectified input, a weight that keeps its variance, and a bias."""
        x = torch.randn(self.input).relu().contiguous(memory_format=NHWC)
        shape = (self.filters, self.input[1] // self.groups, *self.kernel)
        weight = torch.randn(shape) * (2 / (shape[1] * shape[2] * shape[3])) ** 0.5
        return x, weight, torch.randn(self.filters) * 0.1


@contextlib.contextmanager
def forced(engine: int, tile: int = 0) -> Iterator[None]:
    """Runs one engine, with one size of tile, whatever the cost model says."""
    torch.ops.fastalex_cpu.force_conv_engine(engine, tile)
    try:
        yield
    finally:
        torch.ops.fastalex_cpu.force_conv_engine(0, 0)


ALEXNET = {
    "conv1": Shape((32, 3, 227, 227), 96, (11, 11), (4, 4)),
    "conv2": Shape((32, 96, 27, 27), 256, (5, 5), padding=(2, 2), groups=2),
    "conv3": Shape((32, 256, 13, 13), 384, padding=(1, 1)),
    "conv4": Shape((32, 384, 13, 13), 384, padding=(1, 1), groups=2),
    "conv5": Shape((32, 384, 13, 13), 256, padding=(1, 1), groups=2),
}


def picks() -> list[Shape]:
    """VGG, ResNet, SqueezeNet and AlexNet layers, at batch 1 and 8, and odd ones between."""
    maps = [
        (64, 112, 128),
        (128, 56, 128),
        (256, 28, 256),
        (512, 14, 512),
        (64, 56, 64),
        (128, 28, 128),
    ]
    maps += [(256, 14, 256), (512, 7, 512), (32, 27, 64), (48, 13, 192), (16, 55, 64), (96, 9, 40)]
    same3 = [Shape((n, c, s, s), k, padding=(1, 1)) for n in (1, 8) for c, s, k in maps]
    strided = [(64, 56, 128), (128, 28, 256), (256, 14, 512), (32, 112, 64)]
    down3 = [Shape((n, c, s, s), k, (3, 3), (2, 2), (1, 1)) for n in (1, 8) for c, s, k in strided]
    point = [
        (64, 55, 16),
        (128, 27, 32),
        (512, 13, 64),
        (256, 56, 64),
        (64, 56, 256),
        (512, 7, 2048),
    ]
    pointwise = [Shape((n, c, s, s), k, (1, 1)) for n in (1, 8) for c, s, k in point]
    five = [(48, 27, 128), (32, 28, 96), (16, 14, 48)]
    fives = [Shape((n, c, s, s), k, (5, 5), padding=(2, 2)) for n in (1, 8) for c, s, k in five]
    stems = [
        Shape((n, 3, s, s), k, (t, t), (d, d), (p, p))
        for n in (1, 4)
        for s, k, t, d, p in [
            (227, 96, 11, 4, 0),
            (224, 64, 11, 4, 2),
            (224, 64, 7, 2, 3),
            (224, 64, 3, 1, 1),
        ]
    ]
    grouped = [Shape((8, 32, 56, 56), 32, padding=(1, 1), groups=32), *list(ALEXNET.values())[1:]]
    return same3 + down3 + pointwise + fives + stems + grouped


def interleave(providers: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median milliseconds of each, the calls taking turns; every turn starts with one that is not timed."""
    times: dict[str, list[float]] = {name: [] for name in providers}
    for _ in range(repeats):
        for name, run in providers.items():
            run()
            start = time.perf_counter()
            run()
            times[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def layers() -> None:
    print("| layer | pass | engine ms | oneDNN ms | ratio | plan |\n|---|---|---|---|---|---|")
    for name, shape in ALEXNET.items():
        x, weight, bias = shape.tensors()
        y = CONV_RELU.run(x, weight, bias, *shape.geometry)
        grad = torch.randn_like(y)
        sizes = (list(shape.padding), list(shape.stride), [1, 1], shape.groups)
        packed = torch.ops.mkldnn._reorder_convolution_weight(weight, *sizes, list(x.shape))
        fused = torch.ops.mkldnn._convolution_pointwise
        engine = partial(CONV_RELU.run, x, weight, bias, *shape.geometry)
        stock = partial(fused, x, packed, bias, *sizes, "relu", [], "")
        report(name, shape, 0, interleave({"engine": engine, "oneDNN": stock}, 9))
        for direction in (1, 2):
            if direction == 1 and name == "conv1":
                continue  # pixels want no gradient
            gradient_layer(name, shape, direction, (grad, y, x, weight))


def gradient_layer(name: str, shape: Shape, direction: int, tensors: tuple[Tensor, ...]) -> None:
    """ReLU's mask included on both sides."""
    grad, y, x, weight = tensors
    wanted = [direction == 1, direction == 2, direction == 2]
    sizes = (shape.stride, shape.padding, (1, 1), False, [0, 0], shape.groups)

    def stock() -> None:
        dz = torch.ops.aten.threshold_backward(grad, y, 0)
        torch.ops.aten.convolution_backward(dz, x, weight, [shape.filters], *sizes, wanted)

    engine = partial(CONV_RELU_BACKWARD.run, grad, y, x, weight, *shape.geometry, wanted)
    report(name, shape, direction, interleave({"engine": engine, "oneDNN": stock}, 5))


def plan_of(shape: Shape, direction: int = 0) -> str:
    x, weight = (
        torch.empty(shape.input),
        torch.empty(shape.filters, shape.input[1] // shape.groups, *shape.kernel),
    )
    text = _cpu_conv.plan(x, weight, None, *shape.geometry, direction)
    return text.split(";")[0]


def report(name: str, shape: Shape, direction: int, result: dict[str, float]) -> None:
    ratio = result["engine"] / result["oneDNN"]
    label = ("forward", "input gradient", "weight gradient")[direction]
    times = f"{result['engine']:.2f} | {result['oneDNN']:.2f} | {ratio:.2f}"
    print(f"| {name} | {label} | {times} | {plan_of(shape, direction)} |", flush=True)


def linears() -> None:
    """Of a fully connected layer, and of all three gradients: torch's own and the operator's."""
    print(
        "| rows x inputs x outputs | dtype | pass | engine ms | torch ms | ratio |\n|---|---|---|---|---|---|"
    )
    sizes = ((9216, 4096), (4096, 4096), (4096, 1000))
    dtypes = (torch.float32, torch.bfloat16)
    for rows, (inputs, outputs), dtype in itertools.product((1, 32, 128), sizes, dtypes):
        shapes = ((rows, inputs), (outputs, inputs), (outputs,))
        leaves = [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]
        layers = {
            "engine": partial(fastalex.ops.linear_relu, *leaves),
            "torch": lambda leaves=leaves: torch.nn.functional.linear(*leaves).relu_(),
        }
        result = interleave(layers, 9)
        report_linear((rows, inputs, outputs), dtype, "forward", result)
        with torch.enable_grad():
            made = {name: run() for name, run in layers.items()}
        grad = torch.randn(rows, outputs).to(dtype)
        gradients = {
            name: partial(torch.autograd.grad, out, leaves, grad, retain_graph=True)
            for name, out in made.items()
        }
        report_linear((rows, inputs, outputs), dtype, "backward", interleave(gradients, 5))


def report_linear(
    sizes: tuple[int, ...], dtype: torch.dtype, direction: str, result: dict[str, float]
) -> None:
    engine, stock = result["engine"], result["torch"]
    times = f"{engine:.2f} | {stock:.2f} | {engine / stock:.2f}"
    print(f"| {'x'.join(map(str, sizes))} | {str(dtype)[6:]} | {direction} | {times} |", flush=True)


def compare_picks() -> None:
    print("| input | filters | kernel, stride | pick ms | direct ms | tiles ms | pick / best |")
    print("|---|---|---|---|---|---|---|")
    within = [compare_pick(shape) for shape in picks()]
    close = sum(ratio <= 1.15 for ratio in within)
    print(f"\n{close} of {len(within)} picks within 15 % of the best; worst {max(within):.2f}")


def compare_pick(shape: Shape) -> float:
    """Time of the pick over that of the best alternative, itself among them."""
    x, weight, bias = shape.tensors()

    def run(engine: int, tile: int = 0) -> None:
        with forced(engine, tile):
            CONV_RELU.run(x, weight, bias, *shape.geometry)

    runs: dict[str, Callable[[], None]] = {"pick": partial(run, 0), "direct": partial(run, DIRECT)}
    for tile in range(3, 7):
        with forced(WINOGRAD, tile):
            if plan_of(shape).startswith(f"winograd F({tile},"):
                runs[f"{tile}"] = partial(run, WINOGRAD, tile)
    result = interleave(runs, 5)
    pick, direct = result.pop("pick"), result.pop("direct")
    ratio = pick / min(pick, direct, *result.values())
    tiles = ", ".join(f"F({tile}) {ms:.2f}" for tile, ms in result.items()) or "none fits"
    kernel = f"{shape.kernel[0]}, {shape.stride[0]}"
    times = f"{pick:.2f} | {direct:.2f} | {tiles} | {ratio:.2f}"
    print(
        f"| {'x'.join(map(str, shape.input))} | {shape.filters} | {kernel} | {times} |", flush=True
    )
    return ratio


def accuracy() -> None:
    tiles = [(2, 3), (2, 4), (3, 3), (3, 4), (3, 5), (3, 6), (3, 7)]
    tiles += [(4, 3), (4, 4), (5, 3), (5, 4), (5, 5)]
    print("| tile | relative norm | largest / largest output |\n|---|---|---|")
    fastalex.set_conv_precision("medium")
    for taps, tile in tiles:
        size = 3 * tile + 2 * (tile - 1) + taps - 1
        shape = Shape((4, 256, size, size), 64, (taps, taps))
        x, weight, bias = shape.tensors()
        with forced(WINOGRAD, tile):
            out = CONV_RELU.run(x, weight, bias, *shape.geometry)
        expected = torch.conv2d(x.double(), weight.double(), bias.double()).relu()
        error = out.double() - expected
        norm, largest = error.norm() / expected.norm(), error.abs().max() / expected.abs().max()
        print(f"| F({tile},{taps}) | {norm.item():.1e} | {largest.item():.1e} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["layers", "linear", "picks", "accuracy"])
    what = parser.parse_args().what
    torch.manual_seed(0)
    with torch.no_grad():
        runs = {"layers": layers, "linear": linears, "picks": compare_picks, "accuracy": accuracy}
        runs[what]()


if __name__ == "__main__":
    main()
