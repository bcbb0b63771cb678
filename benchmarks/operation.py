"""Turns one operator at one setting into rows: forward, forward and backward, overhead."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.cases import DTYPES, PEERS, Bound, Case, Prepared, Unavailable, compiled
from fastalex.costs import Cost


@dataclass(frozen=True)
class Operation:
    """The same function twice: torch's and fastalex's, each of (input, *weights)."""

    op: str
    stock: Callable[..., Tensor]
    fused: Callable[..., Tensor]
    shapes: tuple[tuple[int, ...], ...]  # of the input and the weights
    forward_cost: Callable[
        [Sequence[Tensor], bool], Cost
    ]  # of the tensors; whether a backward follows
    backward_cost: Callable[[Sequence[Tensor]], Cost]

    def tensors(
        self, dtype: torch.dtype, device: torch.device, channels_last: bool
    ) -> list[Tensor]:
        """Random input, and random weights of a layer's scale."""
        generator = torch.Generator().manual_seed(0)
        values = [torch.randn(shape, generator=generator) for shape in self.shapes]
        for weight in values[1:]:
            weight *= weight[0].numel() ** -0.5 if weight.dim() > 1 else 1
        result = [value.to(device, dtype) for value in values]
        if channels_last:
            result[0] = result[0].contiguous(memory_format=torch.channels_last)
        return result

    def function(self, provider: str) -> Callable[..., Tensor]:
        if provider in PEERS:
            raise Unavailable(f"{provider} runs whole networks here, not operators")
        return self.fused if provider == "fastalex" else self.stock

    def prepare_forward(
        self, dtype: torch.dtype, channels_last: bool, provider: str, device: torch.device
    ) -> Prepared:
        function = self.function(provider)
        input, *weights = self.tensors(dtype, device, channels_last)
        if provider == "compile":
            function, weights = compiled(Bound(function, weights).eval(), freezing=True), []

        def call() -> object:
            with torch.no_grad():
                return function(input, *weights)

        return Prepared(call)

    def prepare_training(
        self, dtype: torch.dtype, channels_last: bool, provider: str, device: torch.device
    ) -> Prepared:
        """Forward, and the gradients of the input and every weight."""
        function = self.function(provider)
        tensors = [t.requires_grad_() for t in self.tensors(dtype, device, channels_last)]
        if provider == "compile":
            function = compiled(function, freezing=False)
        with torch.no_grad():
            output = self.function(provider)(*tensors)
        grad = torch.randn_like(output)

        def call() -> object:
            return torch.autograd.grad(function(*tensors), tensors, grad)

        return Prepared(call, tensors[1:])

    def cases(
        self, label: str, dtypes: Sequence[str], layouts: Sequence[str], full: bool = False
    ) -> Iterator[Case]:
        """Rows ``<op>/<pass>/<dtype>/<label>``, with -nhwc for channels_last."""
        for short in dtypes:
            for layout in layouts:
                yield from self._pair(f"{short}/{label}{layout}", short, layout == "-nhwc", full)

    def _pair(self, tail: str, short: str, channels_last: bool, full: bool) -> Iterator[Case]:
        dtype = DTYPES[short]
        meta = [torch.empty(shape, dtype=dtype, device="meta") for shape in self.shapes]
        yield Case(
            f"{self.op}/fwd/{tail}",
            self.op,
            dtype,
            functools.partial(self.prepare_forward, dtype, channels_last),
            (self.forward_cost(meta, False),),
            full=full,
        )
        yield Case(
            f"{self.op}/fwdbwd/{tail}",
            self.op,
            dtype,
            functools.partial(self.prepare_training, dtype, channels_last),
            (self.forward_cost(meta, True), self.backward_cost(meta)),
            trains=True,
            full=full,
        )

    def overhead(self) -> Iterator[Case]:
        """Time of a call on a tiny input: what is paid before any arithmetic."""
        dtype = torch.float32
        builders = {"": self.prepare_forward, "-grad": self.prepare_training}
        for suffix, prepare in builders.items():
            yield Case(
                f"overhead/{self.op}{suffix}",
                self.op,
                dtype,
                functools.partial(prepare, dtype, False),
                (),
            )


def cases_of_maps(
    operation: Callable[[tuple[int, ...]], Operation],
    maps: Mapping[str, tuple[int, ...]],
    bf16_is_full: bool = False,
) -> Iterator[Case]:
    """Rows of an operator without weights on AlexNet's maps [C, H, W]: conv1's at batch 32 are in a default run."""
    for name, size in maps.items():
        for batch in (32, 1):
            rows = operation((batch, *size))
            label = f"{name}-b{batch}"
            quick = name == "conv1" and batch == 32
            yield from rows.cases(label, ("f32",), ("", "-nhwc"), full=not quick)
            yield from rows.cases(label, ("bf16",), ("",), full=not quick or bf16_is_full)
            yield from rows.cases(label, ("bf16",), ("-nhwc",), full=True)
    yield from operation((1, 1, 3, 3)).overhead()
