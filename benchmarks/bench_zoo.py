"""Rows of networks that others wrote, optimised in place: torchvision's, BVLC's with LRN, and LPIPS."""

from __future__ import annotations

import contextlib
import functools
import io
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fastalex
from benchmarks import peers
from benchmarks.cases import PEERS, Case, Prepared, Unavailable, compiled
from fastalex import costs, models

TORCHVISION = (
    "alexnet", "vgg11", "vgg16", "vgg19", "vgg11_bn", "vgg16_bn", "vgg19_bn", "googlenet", "squeezenet1_0",
    "squeezenet1_1", "resnet18", "resnet50", "resnet152", "wide_resnet50_2", "resnext50_32x4d", "densenet121",
    "efficientnet_b0",
)  # fmt: skip
#: fastalex's own, in their stock form, and the side of their images.
FAMILY: dict[str, tuple[Callable[[], nn.Module], int]] = {
    **{
        name: (functools.partial(models.alexnet, name, fused=False), 227)
        for name in ("caffenet", "bvlc", "batchnorm")
    },
    "zfnet": (functools.partial(models.ZFNet, fused=False), 224),
    "nin": (functools.partial(models.NetworkInNetwork, fused=False), 224),
    "bvlc_googlenet": (functools.partial(models.GoogLeNet, fused=False), 224),
}
BATCH, PAIRS = 8, 8


def _torchvision(name: str) -> nn.Module:
    try:
        from torchvision.models import get_model
    except ImportError as failure:
        raise Unavailable("torchvision is not installed: pip install 'fastalex[zoo]'") from failure
    options: dict[str, Any] = {"init_weights": False} if name == "googlenet" else {}
    return get_model(name, weights=None, **options)


def _lpips(copy_of: str, net: str = "alex") -> nn.Module:
    """The distance with random backbones, so that nothing is downloaded; its own layers have their weights."""
    options = {"net": net, "pretrained": True, "pnet_rand": True}
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            if copy_of == "torchmetrics":
                from torchmetrics.functional.image.lpips import _LPIPS

                return _LPIPS(**options)
            from lpips import LPIPS

            return LPIPS(verbose=False, **options)
    except ImportError as failure:
        raise Unavailable(f"{copy_of} is not installed: pip install 'fastalex[zoo]'") from failure


_COUNTED = (nn.Conv2d, nn.Linear, nn.LocalResponseNorm, nn.MaxPool2d)


def _costs(module: Any, inputs: tuple[Tensor], output: Tensor) -> Iterator[costs.Cost]:
    """Of one layer's call, and of the gradient with respect to its input where that will follow.

    Pointwise layers count nothing: each can be part of its neighbour.
    """
    (input,) = inputs
    wanted = output.requires_grad, False, False
    if isinstance(module, nn.Conv2d):
        geometry = module.stride, module.padding, module.dilation, module.groups
        yield costs.conv_relu(input, module.weight, module.bias, *geometry)
        if wanted[0]:
            yield costs.conv_relu_backward(output, output, input, module.weight, *geometry, wanted)
    elif isinstance(module, nn.Linear):
        yield costs.linear_relu(input, module.weight, module.bias, False)
        if wanted[0]:
            yield costs.linear_relu_backward(output, None, input, module.weight, wanted)
    elif isinstance(module, nn.LocalResponseNorm):
        window = module.size, module.alpha / module.size, module.beta, module.k
        groups = getattr(module, "groups", 1)
        yield costs.lrn(input, *window, groups)
        if wanted[0]:
            yield costs.lrn_backward(output, input, *window, groups)
    else:
        size, stride, padding, dilation = (
            (value, value) if isinstance(value, int) else value
            for value in (module.kernel_size, module.stride, module.padding, module.dilation)
        )
        yield costs.max_pool(input, size, stride, padding, dilation, module.ceil_mode, wanted[0])
        if wanted[0]:
            offsets = torch.empty_like(output, dtype=torch.uint8)
            sides = input.shape[-2:]
            yield costs.max_pool_backward(output, offsets, sides, size, stride, padding, dilation)


@dataclass(frozen=True)
class Network:
    """How to build it, and the shapes of its inputs."""

    name: str
    build: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...]
    to_images: bool = False  # times the gradient with respect to the first input

    def prepare(self, provider: str, device: torch.device) -> Prepared:
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            net = self.build().eval().requires_grad_(False).to(device)
            inputs = [torch.rand(shape).to(device) for shape in self.shapes]
        if provider in PEERS:
            if self.to_images:
                raise Unavailable(f"{provider} has no gradients")
            return Prepared(peers.inference_of(provider, net, inputs), costs=self.costs())
        note = fastalex.optimize(net).summary() if provider == "fastalex" else None
        done: dict[str, Any] = {"costs": self.costs(), "note": note and note.replace("\n", "; ")}
        forward: Callable[..., Tensor] = net
        if provider == "compile":
            forward = compiled(net, freezing=not self.to_images)
        if self.to_images:
            inputs[0].requires_grad_()
            return Prepared(
                lambda: torch.autograd.grad(forward(*inputs).sum(), inputs[0]),
                tuple(net.parameters()),
                **done,
            )

        def call() -> object:
            with torch.no_grad():
                return forward(*inputs)

        return Prepared(call, tuple(net.parameters()), **done)

    def costs(self) -> tuple[costs.Cost, ...]:
        """What the stock network's convolutions, linear layers, LRN and max-pools cost, one after another."""
        with torch.device("meta"):
            net = self.build()
        net.to("meta").eval().requires_grad_(False)
        found: list[costs.Cost] = []
        for module in net.modules():
            if isinstance(module, _COUNTED):
                module.register_forward_hook(lambda *call: found.extend(_costs(*call)))
        first, *others = (torch.empty(shape, device="meta") for shape in self.shapes)
        net(first.requires_grad_(self.to_images), *others)
        return tuple(found)

    def results(self, dtype: torch.dtype, optimised: bool) -> Tensor:
        """The output, or the images' gradient, for the check of parity."""
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            net = self.build().eval().requires_grad_(False).to(dtype)
            inputs = [torch.rand((2, *shape[1:])).to(dtype) for shape in self.shapes]
        if optimised:
            fastalex.optimize(net)
        if self.to_images:
            inputs[0].requires_grad_()
            return torch.autograd.grad(net(*inputs).sum(), inputs[0])[0]
        with torch.no_grad():
            return net(*inputs)


def networks() -> Iterator[Network]:
    image = ((BATCH, 3, 224, 224),)
    for name in TORCHVISION:
        yield Network(f"zoo/{name}", functools.partial(_torchvision, name), image)
    for name, (build, side) in FAMILY.items():
        yield Network(f"zoo/{name}", build, ((BATCH, 3, side, side),))
    pairs = ((PAIRS, 3, 256, 256),) * 2
    for copy_of, suffix in (("lpips", ""), ("torchmetrics", "-torchmetrics")):
        build = functools.partial(_lpips, copy_of)
        yield Network(f"lpips/alex/infer/256{suffix}", build, pairs)
        yield Network(f"lpips/alex/grad/256{suffix}", build, pairs, to_images=True)


def cases() -> Iterator[Case]:
    for network in networks():
        yield Case(network.name, network.name, torch.float32, network.prepare, (), full=True)
