"""Rows of ``conv_relu_lrn_max_pool`` and ``conv_relu_max_pool``: AlexNet's stages that end in a pool."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from benchmarks import bench_conv_relu, bench_lrn, bench_lrn_max_pool, bench_max_pool
from benchmarks.bench_conv_relu import LAYERS, Layer
from benchmarks.cases import Case
from benchmarks.operation import Operation
from fastalex import costs, ops

STAGES = {
    "conv_relu_lrn_max_pool": ("conv1", "conv2"),
    "conv_relu_max_pool": ("conv5",),
}


def rounding_the_map(
    op: str, layer: Layer, rounding: Callable[[Tensor], Tensor] = lambda map: map
) -> Callable[..., Tensor]:
    """Stock torch, with the map that is pooled passed through ``rounding``."""
    conv = bench_conv_relu.operation(layer, 1).stock
    after = (bench_lrn_max_pool if "lrn" in op else bench_max_pool).stock
    return lambda input, weight, bias: after(rounding(conv(input, weight, bias)))


def operation(op: str, layer: Layer, batch: int) -> Operation:
    conv = bench_conv_relu.operation(layer, batch)
    normalises = "lrn" in op
    stock = rounding_the_map(op, layer)

    def fused(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        tensors = (input, weight, bias)
        if not normalises:
            return ops.conv2d_relu_max_pool2d(*tensors, *layer.geometry)
        lrn = {"alpha": bench_lrn.ALPHA, "beta": bench_lrn.BETA, "k": bench_lrn.K}
        return ops.conv2d_relu_lrn_max_pool2d(*tensors, *layer.geometry, size=bench_lrn.SIZE, **lrn)

    def forward_cost(tensors: Sequence[Tensor], saves: bool) -> costs.Cost:
        lrn = bench_lrn.ARGUMENTS if normalises else ()
        pool = (*bench_max_pool.GEOMETRY[:3], False)
        if not saves:
            return getattr(costs, op)(*tensors, *layer.arguments, *lrn, *pool)  # type: ignore[no-any-return]
        map = layer.output(tensors[0])  # in training the two operators run in turn
        if normalises:
            rest = costs.lrn_max_pool(map, *lrn, *pool, True)
        else:
            rest = costs.max_pool(map, *bench_max_pool.GEOMETRY, False, True)
        return costs.conv_relu(*tensors, *layer.arguments) + rest

    def backward_cost(tensors: Sequence[Tensor]) -> costs.Cost:
        map = layer.output(tensors[0])
        pool = bench_lrn_max_pool if normalises else bench_max_pool
        return conv.backward_cost(tensors) + pool.backward_cost(map)

    return Operation(op, stock, fused, layer.shapes(batch), forward_cost, backward_cost)


def cases() -> Iterator[Case]:
    for op, names in STAGES.items():
        for name in names:
            for batch in (32, 8, 1):
                rows = operation(op, LAYERS[name], batch)
                label = f"{name}-b{batch}"
                yield from rows.cases(label, ("f32",), ("-nhwc",), full=True)
                yield from rows.cases(label, ("f32",), ("",), full=True)
                yield from rows.cases(label, ("bf16",), ("", "-nhwc"), full=True)
        yield from operation(op, Layer((1, 5, 5), 1, 1, 1, 0, 1), 1).overhead()
