"""``python benchmarks/numerics.py``: the error of every operator, dtype and backend on random cases, as a table.

The oracle is stock torch in float64. An error is in units of the dtype's eps, relative to the terms that an element
sums: |y - oracle| / (eps * magnitude). The magnitude is the operator's result on absolute values, or the size of the
result itself where nothing cancels. Rounding the result alone costs up to 0.5. Stock torch runs the same cases.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import os
import pathlib
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

sys.path.append(str(pathlib.Path(__file__).resolve().parents[1]))

import torch
from rich.progress import track
from torch import Tensor

import fastalex
from benchmarks.numeric_cases import CASES
from fastalex import _native

HEADING = """# Errors in units of eps

Largest / mean error over {cases} random cases an operator and dtype, relative to the terms that an element sums;
rounding the result alone costs up to 0.5. The oracle is stock torch in float64, so its own float64 rows are zero
where it is compared with itself. "raises": stock torch has no such kernel on the CPU; "refused": the backend leaves
the dtype to torch; "-": it has no kernel of its own.
{shares}
Convolutions run at the default precision, "high". Its Winograd tiles are allowed 5e-5 of the largest element, 420 eps
of float32, which is more of an element whose own terms are small, as at a border.
Written by `python benchmarks/numerics.py --markdown docs/numerics.md`.
"""

#: Interpreting is slow: one case in so many.
TRITON_EVERY, CUDA_EVERY = 250, 10

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16, "f64": torch.float64}


@dataclass
class Errors:
    """Largest and mean error, in eps."""

    largest: float = 0.0
    total: float = 0.0
    count: int = 0
    refused: set[str] = field(default_factory=set)

    def add(self, errors: Tensor) -> None:
        if errors.numel():
            self.largest = max(self.largest, errors.max().item())
            self.total += errors.sum().item()
            self.count += errors.numel()

    def __str__(self) -> str:
        if not self.count:
            return next(iter(self.refused), "-")
        return f"{self.largest:.2f} / {self.total / self.count:.3f}"


@dataclass(frozen=True)
class Provider:
    """A column: the backend, the CPU's instruction set, which share of the cases it runs, and where."""

    column: str
    backend: str
    isa: str | None = None
    every: int = 1
    host: bool = False  # csrc/cuda, built by g++ to run on CPU tensors

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            if self.isa is not None:
                before = _native.isa()
                _native.set_isa(self.isa)
                stack.callback(_native.set_isa, before)
            if self.host:
                from tests.support import cuda_host

                stack.enter_context(cuda_host.serving_cpu())
            stack.enter_context(fastalex.use_backend(self.backend))
            yield


@functools.cache
def providers(device: str) -> tuple[Provider, ...]:
    """Everything this machine can run: without a GPU, Triton in its interpreter and CUDA C++ by the host's compiler."""
    if device != "cpu":
        return tuple(Provider(name, name) for name in ("triton", "cuda", "cupy", "torch"))
    found = [Provider("torch", "torch")]
    if _native.error is None:
        found += [Provider(f"cpu {isa}", "cpu", isa) for isa in _native.available_isas()]
    if importlib.util.find_spec("triton"):
        found.append(Provider("triton, interpreted", "triton", every=TRITON_EVERY))
    try:
        from tests.support.cuda_host import unavailable
    except ImportError:  # no tests beside
        return tuple(found)
    if unavailable() is None:
        found.append(Provider("cuda, on the host", "cuda", every=CUDA_EVERY, host=True))
    return tuple(found)


def in_eps(result: Tensor, oracle: Tensor, magnitude: Tensor, eps: float) -> Tensor:
    scale = magnitude.clamp_min(torch.finfo(result.dtype).smallest_normal)
    return ((result.double() - oracle).abs() / (eps * scale)).flatten()


def measure(op: str, dtype: torch.dtype, count: int, device: str) -> dict[str, Errors]:
    """Errors by column over ``count`` random cases, the same for every backend."""
    found: dict[str, Errors] = {}
    eps = torch.finfo(dtype).eps
    draw = random.Random(f"{op}/{dtype}")
    torch.manual_seed(2012)
    for index in range(count):
        case = CASES[op](draw)
        narrow = [tensor.to(device, dtype) for tensor in case.tensors]
        if index % 2 and narrow[0].dim() == 4:
            narrow[0] = narrow[0].contiguous(memory_format=torch.channels_last)
        wide = [tensor.double().contiguous() for tensor in narrow]
        oracle, magnitude = case.stock(*wide), case.magnitude(*wide)

        def record(
            column: str,
            run: Callable[..., Tensor],
            narrow: list[Tensor] = narrow,
            oracle: Tensor = oracle,
            magnitude: Tensor = magnitude,
        ) -> None:
            errors = found.setdefault(column, Errors())
            try:
                errors.add(in_eps(run(*narrow), oracle, magnitude, eps))
            except (RuntimeError, NotImplementedError, ValueError) as refusal:
                errors.refused.add(_why(refusal))

        record("stock", case.stock)
        for provider in providers(device):
            if index % provider.every == 0:
                with provider.running():
                    record(provider.column, case.ours)
    return found


def _why(refusal: Exception) -> str:
    if isinstance(refusal, fastalex.BackendError):
        return "-" if "has no backend" in str(refusal) else "refused"
    return "refused" if isinstance(refusal, ValueError) else "raises"


def table(count: int, device: str) -> str:
    columns = ["stock", *(provider.column for provider in providers(device))]
    lines = [
        "| operator | dtype | " + " | ".join(columns) + " |",
        "|---|---|" + "---|" * len(columns),
    ]
    rows = [(op, name) for op in CASES for name in DTYPES]
    for op, name in track(rows, description="operators"):
        found = measure(op, DTYPES[name], count, device)
        cells = " | ".join(str(found[column]) for column in columns)
        lines.append(f"| `{op}` | {name} | {cells} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", type=int, default=10_000, help="per operator and dtype")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--markdown", type=pathlib.Path, help="where to write the table")
    options = parser.parse_args(arguments)
    if options.device == "cpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton decides when it is imported
    torch.set_num_threads(1)  # the cases are tiny
    text = table(options.cases, options.device)
    if options.markdown:
        shares = "".join(
            f'"{provider.column}" runs one case in {provider.every}.\n'
            for provider in providers(options.device)
            if provider.every > 1
        )
        heading = HEADING.format(cases=options.cases, shares=shares)
        options.markdown.write_text(f"{heading}\n{text}")
    print(text)


if __name__ == "__main__":
    main()
