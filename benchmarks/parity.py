"""Proves on photographs that fastalex computes what torch does, before anything is timed.

Everything is compared with stock torch in float64 by the relative 2-norm of the difference.
fastalex may be at most twice as far from it as stock torch in the same dtype, plus one eps. Convolutions
are held to that at the precision "highest", and at the default to what set_conv_precision admits besides.

Gradients need care: where two elements of a pooling window or a pre-activation and zero nearly tie,
any rounding may route a gradient elsewhere. So stock's error is the largest over roundings that are
equally good: two layouts, and in float32 the input nudged by half an eps where an operator rounds
before it routes. In bfloat16 stock's own rounding routes as freely as ours, without a nudge.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import fastalex
from benchmarks import (
    bench_alexnet,
    bench_augment,
    bench_conv_relu,
    bench_conv_relu_max_pool,
    bench_linear_relu,
    bench_lrn,
    bench_lrn_max_pool,
    bench_max_pool,
    bench_zoo,
    photos,
)
from benchmarks.cases import Case
from fastalex import ops

PHOTOGRAPHS = 2
EPS_ALLOWED = 1  # twice what one rounding can do
#: The relative error that each level of set_conv_precision admits, beyond rounding.
ADMITTED = {"highest": 0.0, "high": 1e-5, "medium": 1e-4}
LAYOUTS = (torch.contiguous_format, torch.channels_last)

Function = Callable[..., Tensor]
Results = dict[str, Tensor]


@dataclass(frozen=True)
class Check:
    """One quantity of one subject: its distance from float64, stock's, and what is allowed."""

    subject: str
    quantity: str
    error: float
    stock_error: float
    allowed: float

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed  # false for NaN


def distance(result: Tensor, oracle: Tensor) -> float:
    """‖result - oracle‖ / ‖oracle‖."""
    if result.shape != oracle.shape:
        return float("inf")
    scale = oracle.norm().item()
    return (result.double() - oracle).norm().item() / (scale or 1.0)


def judge(
    subject: str,
    oracle: Results,
    stock: Sequence[Results],
    fused: Sequence[Results],
    eps: float,
    admitted: float = 0.0,
) -> Iterator[Check]:
    """A check per quantity; the worst run of each side counts."""
    for quantity, truth in oracle.items():
        stock_error = max(distance(run[quantity], truth) for run in stock)
        errors = [distance(run[quantity], truth) for run in fused]
        worst = max(errors, key=lambda error: float("inf") if error != error else error)
        allowed = 2 * stock_error + EPS_ALLOWED * eps + admitted
        yield Check(subject, quantity, worst, stock_error, allowed)


def run_function(function: Function, tensors: Sequence[Tensor]) -> Results:
    """Output with and without gradients, every tensor's gradient for a random output gradient."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    with torch.no_grad():
        inference = function(*leaves)
    output = function(*leaves)
    generator = torch.Generator().manual_seed(2)
    grad = torch.randn(output.shape, generator=generator).to(output)
    gradients = torch.autograd.grad(output, leaves, grad)
    names = ("input", "weight", "bias")
    results = {f"gradient of {name}": g for name, g in zip(names, gradients, strict=False)}
    return {"output": inference, "output in training": output.detach(), **results}


def nudged(tensor: Tensor, least: float = 0.0) -> Tensor:
    """The same values rounded otherwise: up here, down there, by half an eps or by ``least`` where that is more."""
    generator = torch.Generator().manual_seed(3)
    signs = torch.randint(0, 2, tensor.shape, generator=generator).to(tensor.device) * 2 - 1
    step = max(torch.finfo(tensor.dtype).eps / 2, least)
    return (tensor.double() * (1 + signs * step)).to(tensor.dtype)


def check_function(
    subject: str,
    stock: Function,
    fused: Function,
    tensors: Sequence[Tensor],
    rounds_before_routing: bool = False,
    admitted: float = 0.0,
    rounded_within: Function | None = None,
) -> Iterator[Check]:
    """``rounded_within``: the stock function with what it routes by rounded otherwise."""
    input, *weights = tensors
    oracle = run_function(stock, [tensor.double() for tensor in tensors])
    formats = LAYOUTS if input.dim() == 4 else LAYOUTS[:1]
    layouts = [[input.contiguous(memory_format=layout), *weights] for layout in formats]
    roundings = list(layouts)
    if rounds_before_routing and input.dtype is torch.float32:
        roundings.append([nudged(input), *weights])
    stock_runs = [run_function(stock, run) for run in roundings]
    if rounded_within is not None:
        routed = run_function(rounded_within, layouts[0])
        gradients = {name: value for name, value in routed.items() if "gradient" in name}
        stock_runs.append({**stock_runs[0], **gradients})
    yield from judge(
        subject,
        oracle,
        stock_runs,
        [run_function(fused, run) for run in layouts],
        torch.finfo(input.dtype).eps,
        admitted,
    )


@functools.cache
def activations(device: torch.device) -> dict[str, Tensor]:
    """Every layer's input in the stock network, float32, on photographs."""
    net = bench_alexnet.network(False, device).eval()
    value = photos.batch(PHOTOGRAPHS).to(device)
    inputs = {}
    with torch.no_grad():
        for name, module in net.features.named_children():
            inputs[name] = value
            value = module(value)
        value = value.flatten(1)
        for name, module in net.classifier.named_children():
            inputs[name] = value
            value = module(value)
    return inputs


def check_lrn(dtype: torch.dtype, device: torch.device) -> Iterator[Check]:
    input = activations(device)["norm1"].to(dtype)
    yield from check_function("lrn", bench_lrn.stock, bench_lrn.fused, [input])


def check_max_pool(dtype: torch.dtype, device: torch.device) -> Iterator[Check]:
    input = activations(device)["pool1"].to(dtype)
    yield from check_function("max_pool", bench_max_pool.stock, bench_max_pool.fused, [input])


def check_lrn_max_pool(dtype: torch.dtype, device: torch.device) -> Iterator[Check]:
    input = activations(device)["norm1"].to(dtype)
    yield from check_function(
        "lrn_max_pool", bench_lrn_max_pool.stock, bench_lrn_max_pool.fused, [input], True
    )


def check_conv_relu(dtype: torch.dtype, device: torch.device) -> Iterator[Check]:
    state = bench_alexnet.weights()
    for name, layer in bench_conv_relu.LAYERS.items():
        tensors = [activations(device)[name]]
        tensors += [state[f"features.{name}.{kind}"].to(device) for kind in ("weight", "bias")]
        operation = bench_conv_relu.operation(layer, PHOTOGRAPHS)
        tensors = [tensor.to(dtype) for tensor in tensors]
        chosen = fastalex.get_conv_precision()
        for level in dict.fromkeys(("highest", chosen)):
            fastalex.set_conv_precision(level)
            try:
                yield from check_function(
                    f"conv_relu {name} at {level}",
                    operation.stock,
                    operation.fused,
                    tensors,
                    True,
                    ADMITTED[level],
                )
            finally:
                fastalex.set_conv_precision(chosen)


def check_conv_pool(op: str, dtype: torch.dtype, device: torch.device) -> Iterator[Check]:
    """The map that is pooled may be rounded by what the convolution's precision admits, for stock too."""
    state = bench_alexnet.weights()
    admitted = ADMITTED[fastalex.get_conv_precision()]
    rounding = functools.partial(nudged, least=admitted)
    for name in bench_conv_relu_max_pool.STAGES[op]:
        tensors = [activations(device)[name]]
        tensors += [state[f"features.{name}.{kind}"].to(device) for kind in ("weight", "bias")]
        layer = bench_conv_relu.LAYERS[name]
        stage = bench_conv_relu_max_pool.operation(op, layer, PHOTOGRAPHS)
        yield from check_function(
            f"{op} {name}",
            stage.stock,
            stage.fused,
            [tensor.to(dtype) for tensor in tensors],
            True,
            admitted,
            bench_conv_relu_max_pool.rounding_the_map(op, layer, rounding),
        )


def check_linear_relu(dtype: torch.dtype, device: torch.device) -> Iterator[Check]:
    state = bench_alexnet.weights()
    for name in bench_linear_relu.LAYERS:
        tensors = [activations(device)[name]]
        tensors += [state[f"classifier.{name}.{kind}"].to(device) for kind in ("weight", "bias")]
        tensors = [tensor.to(dtype) for tensor in tensors]
        yield from check_function(
            f"linear_relu {name}", bench_linear_relu.stock, ops.linear_relu, tensors, True
        )


def run_network(fused: bool, dtype: torch.dtype, images: Tensor) -> Results:
    """Logits and the loss's gradient by parameter; dropout is off. bfloat16 means autocast."""
    net = bench_alexnet.network(fused, images.device).eval()
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    net, images = net.to(wide), images.to(wide)
    labels = photos.labels(len(images)).to(images.device)
    with torch.autocast(images.device.type, torch.bfloat16, enabled=dtype is torch.bfloat16):
        with torch.no_grad():
            logits = net(images)
        loss = F.cross_entropy(net(images), labels)
    loss.backward()
    gradients = {f"gradient of {name}": p.grad for name, p in net.named_parameters()}
    return {"logits": logits, **gradients}


@functools.cache
def network_oracle(device: torch.device) -> Results:
    return run_network(False, torch.float64, photos.batch(PHOTOGRAPHS).to(device))


def check_alexnet(dtype: torch.dtype, device: torch.device) -> Iterator[Check]:
    images = photos.batch(PHOTOGRAPHS).to(device)
    roundings = [images.contiguous(memory_format=layout) for layout in LAYOUTS]
    if dtype is torch.float32:
        roundings.append(nudged(images))
    yield from judge(
        "alexnet",
        network_oracle(device),
        [run_network(False, dtype, rounding) for rounding in roundings],
        [run_network(True, dtype, images)],
        torch.finfo(dtype).eps,
    )


def check_augment(dtype: torch.dtype, device: torch.device) -> Iterator[Check]:
    """No rounding of one's own: the transform chain bit for bit."""
    tensors = bench_augment.inputs(PHOTOGRAPHS, device)
    stock = bench_augment.stock(*tensors).to(dtype)
    fused = ops.augment(*tensors, bench_augment.CROP, dtype=dtype)
    smallest = sys.float_info.min  # nothing that differs is as near as this
    yield Check("augment", "output", distance(fused, stock.double()), 0.0, smallest)


CHECKS: dict[str, Callable[[torch.dtype, torch.device], Iterator[Check]]] = {
    "alexnet": check_alexnet,
    "lrn": check_lrn,
    "max_pool": check_max_pool,
    "lrn_max_pool": check_lrn_max_pool,
    "conv_relu": check_conv_relu,
    **{op: functools.partial(check_conv_pool, op) for op in bench_conv_relu_max_pool.STAGES},
    "linear_relu": check_linear_relu,
    "augment": check_augment,
}


def check_zoo(
    network: bench_zoo.Network, dtype: torch.dtype, device: torch.device
) -> Iterator[Check]:
    """Twice stock's own error, and what the convolution's precision allows each layer."""
    truth = network.results(torch.float64, False)
    stock, ours = (distance(network.results(dtype, fast), truth) for fast in (False, True))
    layers = sum(isinstance(module, torch.nn.Conv2d) for module in network.build().modules())
    allowed = 2 * stock + layers * ADMITTED[fastalex.get_conv_precision()]
    yield Check(network.name, "output", ours, stock, allowed)


CHECKS |= {net.name: functools.partial(check_zoo, net) for net in bench_zoo.networks()}


def verify(cases: Iterable[Case], device: torch.device) -> Iterator[tuple[str, list[Check]]]:
    """The checks of everything that ``cases`` time, as (label, checks)."""
    wanted = dict.fromkeys((case.subject, case.dtype) for case in cases)
    for subject, dtype in wanted:
        short = str(dtype).removeprefix("torch.")
        yield f"{subject} {short}", list(CHECKS[subject](dtype, device))
