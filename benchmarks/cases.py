"""The case: one row of the table, timed for every provider; and the choice of cases by name."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch._dynamo
from torch import Tensor, nn

from benchmarks.timing import Call
from fastalex.costs import Cost

#: The providers of a default run, the baseline first.
PROVIDERS = ("eager", "compile", "fastalex")
PEERS = ("onnxruntime", "openvino")
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


class Unavailable(Exception):
    """A provider cannot run a case; the message says why and stands in its row."""


@dataclass(frozen=True)
class Prepared:
    """A provider made ready: the call to time, and the weights that don't count as activations.

    ``costs`` are those of a case that cannot know its own before a model is built; ``note`` is shown under the table.
    """

    call: Call
    parameters: Sequence[Tensor] = ()
    costs: tuple[Cost, ...] = ()
    note: str | None = None


@dataclass(frozen=True)
class Case:
    """``prepare(provider, device)`` builds what is timed; raises Unavailable where it cannot."""

    name: str
    subject: str  # whose parity must hold before this case is timed
    dtype: torch.dtype
    prepare: Callable[[str, torch.device], Prepared]
    costs: tuple[Cost, ...]  # of the operators that run one after another
    trains: bool = False  # memory is measured as well
    full: bool = False  # left to --full


def compiled(function: Callable[..., object], freezing: bool) -> Callable[..., object]:
    """torch.compile as its users call it, with frozen weights for inference.

    Compiles at the first call. Dynamo starts afresh: rows must not make each other recompile.
    """
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False, options={"freezing": freezing})


class Bound(nn.Module):
    """A function with its weights as parameters, so that torch.compile may freeze them."""

    def __init__(self, function: Callable[..., Tensor], weights: Sequence[Tensor]) -> None:
        super().__init__()
        self.function = function
        self.weights = nn.ParameterList(nn.Parameter(weight) for weight in weights)

    def forward(self, input: Tensor) -> Tensor:
        return self.function(input, *self.weights)


def all_cases() -> list[Case]:
    """Every case, the most telling first."""
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
    )

    modules = (
        bench_alexnet,
        bench_lrn,
        bench_max_pool,
        bench_lrn_max_pool,
        bench_conv_relu,
        bench_conv_relu_max_pool,
        bench_linear_relu,
        bench_augment,
        bench_zoo,
    )
    cases = [case for module in modules for case in module.cases()]
    return sorted(cases, key=lambda case: case.name.startswith("overhead/"))


def select(cases: Sequence[Case], pattern: str | None, full: bool) -> list[Case]:
    """The cases that match one of the comma-separated globs, or those of a default or full run.

    Raises:
        ValueError: where nothing matches.
    """
    if pattern is None:
        return [case for case in cases if full or not case.full]
    globs = [re.compile(fnmatch.translate(glob.strip())) for glob in pattern.split(",")]
    chosen = [case for case in cases if any(glob.match(case.name) for glob in globs)]
    if not chosen:
        known = ", ".join(case.name for case in cases)
        raise ValueError(f"no case matches {pattern!r}; there are {known}")
    return chosen
