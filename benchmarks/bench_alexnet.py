"""Rows of the whole network on photographs: two-tower AlexNet, inference and training step."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import bench_conv_relu, bench_max_pool, peers, photos
from benchmarks.cases import DTYPES, PEERS, Case, Prepared, Unavailable, compiled
from fastalex import costs
from fastalex.models import AlexNet, alexnet

NORM = (5, 1e-4 / 5, 0.75, 2.0, 2)  # size, scale, beta, k, groups, as the operator has them
CLASSES = 1000
HIDDEN = ((9216, 4096), (4096, 4096), (4096, CLASSES))
PARAMETERS = 60_965_224
# At the paper's rate of 0.01 these few photographs make the loss infinite within a run.
SGD = {"lr": 0.001, "momentum": 0.9, "weight_decay": 5e-4}


@functools.cache
def weights() -> dict[str, Tensor]:
    """One set of initial weights, so that every provider computes the same."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return alexnet("paper", fused=False).state_dict()


def network(fused: bool, device: torch.device) -> AlexNet:
    with torch.device("meta"):  # skips an initialisation that is overwritten at once
        net = alexnet("paper", fused=fused)
    net = net.to_empty(device=device)
    net.load_state_dict(weights())
    return net


def prepare_inference(
    batch: int, dtype: torch.dtype, provider: str, device: torch.device
) -> Prepared:
    images = photos.batch(batch).to(device)
    if provider in PEERS:
        if device.type != "cpu":
            raise Unavailable(f"{provider} is measured on the CPU")
        return Prepared(peers.inference(provider, network(False, device), images, dtype))
    net = network(provider == "fastalex", device).eval().to(dtype)
    images = images.to(dtype)
    forward: Callable[..., object] = net
    if provider == "compile":
        forward = compiled(net, freezing=True)
    # Eager torch has no bfloat16 LRN on the CPU; autocast runs that layer alone in float32.
    needs_autocast = provider == "eager" and dtype is not torch.float32
    context = functools.partial(torch.autocast, device.type, dtype, enabled=needs_autocast)

    def call() -> object:
        with torch.no_grad(), context() if needs_autocast else contextlib.nullcontext():
            return forward(images)

    return Prepared(call, tuple(net.parameters()))


def prepare_training(
    batch: int, dtype: torch.dtype, provider: str, device: torch.device
) -> Prepared:
    """Forward, cross-entropy, backward, SGD with momentum; bfloat16 means autocast."""
    if provider in PEERS:
        raise Unavailable(f"{provider} does not train")
    net = network(provider == "fastalex", device).train()
    images, labels = photos.batch(batch).to(device), photos.labels(batch).to(device)
    optimizer = torch.optim.SGD(net.parameters(), **SGD)
    forward = compiled(net, freezing=False) if provider == "compile" else net
    autocast = dtype is not torch.float32

    def call() -> object:
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            loss = F.cross_entropy(forward(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return Prepared(call, tuple(net.parameters()))


def _empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def inference_costs(batch: int, dtype: torch.dtype, saves: bool = False) -> Iterator[costs.Cost]:
    """Of every operator of the fused network, first to last."""
    for name, layer in bench_conv_relu.LAYERS.items():
        tensors = [_empty(*shape, dtype=dtype) for shape in layer.shapes(batch)]
        yield costs.conv_relu(*tensors, *layer.arguments)
        output = layer.output(tensors[0])
        if name in ("conv1", "conv2"):
            yield costs.lrn_max_pool(output, *NORM, *bench_max_pool.GEOMETRY[:3], False, saves)
        elif name == "conv5":
            yield costs.max_pool(output, *bench_max_pool.GEOMETRY, False, saves)
    for inputs, outputs in HIDDEN:
        yield costs.linear_relu(
            _empty(batch, inputs, dtype=dtype),
            _empty(outputs, inputs, dtype=dtype),
            _empty(outputs, dtype=dtype),
            outputs != CLASSES,
        )


def training_costs(batch: int, dtype: torch.dtype) -> Iterator[costs.Cost]:
    """Forward, backward and the update; weights are float32 whatever the arithmetic is done in."""
    yield from inference_costs(batch, dtype, saves=True)
    for name, layer in bench_conv_relu.LAYERS.items():
        input, weight, _ = (_empty(*shape, dtype=dtype) for shape in layer.shapes(batch))
        output = layer.output(input)
        wanted = (name != "conv1", True, True)  # nobody asks for the images' gradient
        yield costs.conv_relu_backward(output, output, input, weight, *layer.arguments, wanted)
        grad = bench_max_pool.outputs_of(output, dtype)
        offsets = bench_max_pool.outputs_of(output, torch.uint8)
        if name in ("conv1", "conv2"):
            yield costs.lrn_max_pool_backward(
                grad, output, offsets, *NORM, *bench_max_pool.GEOMETRY[:3]
            )
        elif name == "conv5":
            yield costs.max_pool_backward(grad, offsets, (13, 13), *bench_max_pool.GEOMETRY)
    for inputs, outputs in HIDDEN:
        grad, weight = _empty(batch, outputs, dtype=dtype), _empty(outputs, inputs, dtype=dtype)
        output = grad if outputs != CLASSES else None
        input = _empty(batch, inputs, dtype=dtype)
        yield costs.linear_relu_backward(grad, output, input, weight, (True, True, True))
    yield costs.sgd_step([_empty(PARAMETERS, dtype=torch.float32)])


def cases() -> Iterator[Case]:
    for short, dtype in DTYPES.items():
        for batch in (32, 1, 8):
            yield Case(
                f"alexnet/infer/{short}/b{batch}",
                "alexnet",
                dtype,
                functools.partial(prepare_inference, batch, dtype),
                tuple(inference_costs(batch, dtype)),
                full=batch == 8,
            )
            if batch == 32:
                yield Case(
                    f"alexnet/train/{short}/b{batch}",
                    "alexnet",
                    dtype,
                    functools.partial(prepare_training, batch, dtype),
                    tuple(training_costs(batch, dtype)),
                    trains=True,
                )
