"""The CPU convolution engine by itself: against oneDNN, against its own alternatives, accuracy.

    python benchmarks/conv_engine.py layers [--isa avx2]  # AlexNet: forward, gradients
    python benchmarks/conv_engine.py linear    # its fully connected layers, forward and backward
    python benchmarks/conv_engine.py picks     # the cost model's pick and every alternative
    python benchmarks/conv_engine.py accuracy  # error of every tile against float64

Providers are interleaved and compared by medians; a pause after each oneDNN call lets torch's own
threads, which spin for a while, go to sleep before the engine's are timed.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.support.conv_library import LinearPlan, Plan, Shape, available_isas

NHWC = torch.channels_last
PAUSE = 0.01

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
    return same3 + down3 + pointwise + fives + stems


def interleave(providers: dict[str, Callable[[], float]], repeats: int) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in providers}
    for repeat in range(repeats + 1):
        for name, run in providers.items():
            run()
            elapsed = run()
            if repeat:
                times[name].append(elapsed * 1e3)
            if name == "oneDNN":
                time.sleep(PAUSE)
    return {name: statistics.median(values) for name, values in times.items()}


def timed(run: Callable[[], object]) -> Callable[[], float]:
    def measure() -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    return measure


def tensors(shape: Shape) -> tuple[torch.Tensor, ...]:
    x = torch.randn(shape.input).relu().contiguous(memory_format=NHWC)
    scale = (2 / (shape.weight_shape[1] * shape.kernel[0] * shape.kernel[1])) ** 0.5
    weight = torch.randn(shape.weight_shape) * scale
    out = torch.empty(shape.output_shape).contiguous(memory_format=NHWC)
    return x, weight, torch.randn(shape.filters) * 0.1, out


def onednn(shape: Shape, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor):
    convolve = torch.ops.mkldnn._convolution_pointwise
    weight = weight.contiguous(memory_format=NHWC)
    sizes = (list(shape.padding), list(shape.stride), list(shape.dilation), shape.groups)
    return timed(lambda: convolve(x, weight, bias, *sizes, "relu", [], ""))


def layers(isa: str) -> None:
    print(f"{'layer':8}{'pass':18}{'engine ms':>10}{'oneDNN ms':>11}{'ratio':>7}  plan")
    for name, shape in ALEXNET.items():
        forward_layer(name, shape, isa)
        if name != "conv1":
            gradient_layer(name, shape, isa, "input_gradient")
        gradient_layer(name, shape, isa, "weight_gradient")


def linears(isa: str) -> None:
    sizes = ((9216, 4096), (4096, 4096), (4096, 1000))
    dtypes = (torch.float32, torch.bfloat16)
    for rows, (inputs, outputs), dtype in itertools.product((1, 32, 128), sizes, dtypes):
        linear(isa, rows, inputs, outputs, dtype)


def forward_layer(name: str, shape: Shape, isa: str) -> None:
    x, weight, bias, out = tensors(shape)
    plan = Plan(shape, isa=isa)
    packing = statistics.median(plan.pack(weight) for _ in range(5)) * 1e3
    engine = lambda: plan.forward(x, weight, bias, out)  # noqa: E731
    providers = {"engine": engine, "oneDNN": onednn(shape, x, weight, bias)}
    report(name, "forward", interleave(providers, 9), plan)
    print(f"{name:8}{'packing':18}{packing:10.2f}")


def gradient_layer(name: str, shape: Shape, isa: str, direction: str) -> None:
    """ReLU's mask included on both sides."""
    x, weight, _, out = tensors(shape)
    out.normal_()
    grad = torch.randn(shape.output_shape).contiguous(memory_format=NHWC)
    grad_x, grad_weight = torch.empty_like(x), torch.empty_like(weight)
    grad_bias = torch.empty(shape.filters)
    plan = Plan(shape, direction=direction, isa=isa)
    plan.pack(weight)
    data = direction == "input_gradient"
    sizes = (shape.stride, shape.padding, shape.dilation, False, [0, 0], shape.groups)

    def engine() -> float:
        if data:
            return plan.input_gradient(grad, out, weight, grad_x)
        return plan.weight_gradient(grad, out, x, grad_weight, grad_bias)

    def stock() -> None:
        dz = torch.where(out > 0, grad, 0)
        wanted = [data, not data, not data]
        torch.ops.aten.convolution_backward(dz, x, weight, [shape.filters], *sizes, wanted)

    report(name, direction, interleave({"engine": engine, "oneDNN": timed(stock)}, 5), plan)


def linear(isa: str, rows: int, inputs: int, outputs: int, dtype: torch.dtype) -> None:
    """Forward, and all three gradients, against torch's own."""
    tensors = torch.randn(rows, inputs), torch.randn(outputs, inputs), torch.randn(outputs)
    x, weight, bias = (tensor.to(dtype) for tensor in tensors)
    plan = LinearPlan(rows, inputs, outputs, isa=isa, dtype=dtype)
    out, grad = torch.empty(rows, outputs, dtype=dtype), torch.randn(rows, outputs).to(dtype)
    results = tuple(torch.empty_like(tensor) for tensor in (x, weight, bias))
    masked = torch.empty_like(grad)

    def stock_backward() -> None:
        torch.mul(grad, out > 0, out=masked)
        torch.mm(masked, weight, out=results[0])
        torch.mm(masked.t(), x, out=results[1])
        torch.sum(masked, 0, out=results[2])

    pairs = {
        "forward": (
            lambda: plan.forward(x, weight, bias, out),
            timed(lambda: torch.nn.functional.linear(x, weight, bias).relu_()),
        ),
        "backward": (
            lambda: plan.backward(grad, out, x, weight, results),
            timed(stock_backward),
        ),
    }
    for direction, (engine, stock) in pairs.items():
        result = interleave({"engine": engine, "torch": stock}, 9)
        rate = weight.nbytes / result["engine"] / 1e6
        print(
            f"linear {str(dtype)[6:]} {rows}x{inputs}x{outputs} {direction}: "
            f"engine {result['engine']:.2f} ms ({rate:.0f} GB/s of weights), "
            f"torch {result['torch']:.2f} ms, ratio {result['engine'] / result['torch']:.2f}",
            flush=True,
        )


def report(name: str, direction: str, result: dict[str, float], plan: Plan) -> None:
    ratio = result["engine"] / result["oneDNN"]
    text = plan.explain().split(";")[0]
    print(
        f"{name:8}{direction:18}{result['engine']:10.2f}{result['oneDNN']:11.2f}{ratio:7.2f}  {text}",
        flush=True,
    )


def compare_picks(isa: str) -> None:
    within = [compare_pick(shape, isa) for shape in picks()]
    close = sum(ratio <= 1.15 for ratio in within)
    print(f"{close} of {len(within)} picks within 15 % of the best; worst {max(within):.2f}")


def compare_pick(shape: Shape, isa: str) -> float:
    """Time of the pick over that of the best alternative."""
    x, weight, bias, out = tensors(shape)
    plans = {"auto": Plan(shape, isa=isa), "direct": Plan(shape, isa=isa, engine="direct")}
    for tile in range(3, 7):
        plan = Plan(shape, isa=isa, engine="winograd", tile=tile)
        if plan.chosen == "winograd":
            plans[f"tile {tile}"] = plan
    for plan in plans.values():
        plan.pack(weight)
    runs = {n: partial(p.forward, x, weight, bias, out) for n, p in plans.items()}
    result = interleave(runs, 3)
    times = "  ".join(f"{k} {v:.2f}" for k, v in result.items())
    kernel = f"k{shape.kernel[0]} s{shape.stride[0]}"
    print(f"{shape.input} -> {shape.filters} {kernel}: {times}", flush=True)
    return result["auto"] / min(v for k, v in result.items() if k != "auto")


def accuracy(isa: str) -> None:
    tiles = [
        (2, 3),
        (2, 4),
        (3, 3),
        (3, 4),
        (3, 5),
        (3, 6),
        (3, 7),
        (4, 3),
        (4, 4),
        (5, 3),
        (5, 4),
        (5, 5),
    ]
    print(f"{'tile':10}{'relative norm':>15}{'largest / largest output':>26}")
    for taps, tile in tiles:
        size = 3 * tile + 2 * (tile - 1) + taps - 1
        shape = Shape((4, 256, size, size), 64, (taps, taps))
        x, weight, _, out = tensors(shape)
        plan = Plan(shape, engine="winograd", tile=tile, precision="medium", relu=False, isa=isa)
        plan.pack(weight)
        plan.forward(x, weight, None, out)
        expected = torch.conv2d(x.double(), weight.double())
        error = out.double() - expected
        norm, largest = error.norm() / expected.norm(), error.abs().max() / expected.abs().max()
        print(f"F({tile}, {taps})   {norm.item():15.1e}{largest.item():26.1e}", flush=True)


COMMANDS = {
    "layers": layers,
    "linear": linears,
    "picks": compare_picks,
    "accuracy": accuracy,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=list(COMMANDS))
    parser.add_argument("--isa", choices=available_isas(), default=available_isas()[-1])
    arguments = parser.parse_args()
    torch.manual_seed(0)
    COMMANDS[arguments.what](arguments.isa)


if __name__ == "__main__":
    main()
