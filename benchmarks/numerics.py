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
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor

import fastalex
from fastalex import _native, ops, reference
from fastalex.ops.linear_relu import LINEAR_RELU_BACKWARD
from fastalex.ops.lrn_max_pool import LRN_MAX_POOL_BACKWARD
from fastalex.reference.lrn import _denominator_base, _window_sum

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


@dataclass(frozen=True)
class Case:
    """One random call: what fastalex runs, what stock torch runs, the oracle and the magnitude of its terms."""

    tensors: tuple[Tensor, ...]  # float64, to be rounded to the dtype
    ours: Callable[..., Tensor]
    stock: Callable[..., Tensor]
    magnitude: Callable[..., Tensor]


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


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def lrn_case(draw: random.Random) -> Case:
    shape = (draw.randint(1, 2), draw.randint(1, 40), draw.randint(1, 9), draw.randint(1, 9))
    arguments = (
        *(draw.randint(1, 9), draw.choice((1e-4, 0.01, 0.3))),
        *(draw.choice((0.75, 0.5, 1.0, 0.6)), draw.choice((1.0, 2.0))),
    )
    return Case(
        (_normal(*shape) * draw.choice((1.0, 30.0)),),
        lambda x: ops.local_response_norm(x, *arguments),
        lambda x: F.local_response_norm(x, *arguments),
        lambda x: F.local_response_norm(x, *arguments).abs(),
    )


def lrn_backward_case(draw: random.Random) -> Case:
    shape = (draw.randint(1, 2), draw.randint(1, 40), draw.randint(1, 9), draw.randint(1, 9))
    size, alpha = draw.randint(1, 9), draw.choice((1e-4, 0.01, 0.3))
    beta, k = draw.choice((0.75, 0.5, 1.0, 0.6)), draw.choice((1.0, 2.0))

    def gradient(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(x: Tensor, grad: Tensor) -> Tensor:
            leaf = x.detach().requires_grad_()
            return torch.autograd.grad(function(leaf, size, alpha, beta, k), leaf, grad)[0]

        return run

    return Case(
        (_normal(*shape), _normal(*shape)),
        gradient(ops.local_response_norm),
        gradient(F.local_response_norm),
        lambda x, grad: _lrn_terms(x, grad, size, alpha / size, beta, k),
    )


def _lrn_terms(x: Tensor, grad: Tensor, size: int, scale: float, beta: float, k: float) -> Tensor:
    """The terms that an element of normalization's gradient sums."""
    s = _denominator_base(x, size, scale, k, 1)
    direct = grad.abs() * s**-beta
    shared = _window_sum((direct * x / s).abs(), size - 1 - size // 2, size // 2, 1)
    return direct + 2 * scale * beta * x.abs() * shared


def _pool_geometry(draw: random.Random) -> tuple[tuple[int, int], int, int, int]:
    kernel = draw.choice((2, 3, 3, 5))
    return (draw.randint(5, 14), draw.randint(5, 14)), kernel, draw.randint(1, 3), kernel // 2


def max_pool_case(draw: random.Random) -> Case:
    size, *geometry = _pool_geometry(draw)
    return Case(
        (_normal(draw.randint(1, 2), draw.randint(1, 24), *size),),
        lambda x: ops.max_pool2d(x, *geometry),
        lambda x: F.max_pool2d(x, *geometry),
        lambda x: F.max_pool2d(x.abs(), *geometry),
    )


def max_pool_backward_case(draw: random.Random) -> Case:
    """The winners are of x rounded to bfloat16, so that every dtype has the same."""
    size, *geometry = _pool_geometry(draw)
    x = _normal(1, draw.randint(1, 24), *size).to(torch.bfloat16).half().double()
    outputs = F.max_pool2d(x, *geometry).shape

    def gradient(pool: Callable[..., Tensor], x: Tensor, grad: Tensor) -> Tensor:
        leaf = x.detach().requires_grad_()
        return torch.autograd.grad(pool(leaf, *geometry), leaf, grad)[0]

    return Case(
        (x, _normal(*outputs)),
        lambda x, grad: gradient(ops.max_pool2d, x, grad),
        lambda x, grad: gradient(F.max_pool2d, x, grad),
        lambda x, grad: gradient(F.max_pool2d, x, grad.abs()),
    )


def lrn_max_pool_case(draw: random.Random) -> Case:
    size, kernel, stride, padding = _pool_geometry(draw)
    lrn = (5, draw.choice((1e-4, 0.3)), 0.75, draw.choice((1.0, 2.0)))

    def stock(x: Tensor) -> Tensor:
        return F.max_pool2d(F.local_response_norm(x, *lrn), kernel, stride, padding)

    return Case(
        (_normal(1, draw.randint(1, 40), *size),),
        lambda x: ops.lrn_max_pool2d(x, *lrn, kernel, stride, padding),
        stock,
        lambda x: stock(x).abs(),
    )


def lrn_max_pool_backward_case(draw: random.Random) -> Case:
    """The winners are given, since near ties fall otherwise in float64."""
    size, kernel, stride, padding = _pool_geometry(draw)
    norm = (5, draw.choice((2e-5, 0.06)), 0.75, draw.choice((1.0, 2.0)), 1)
    pool = ((kernel,) * 2, (stride,) * 2, (padding,) * 2)
    x = _normal(1, draw.randint(1, 40), *size)
    _, offsets = reference.lrn_max_pool(x, *norm, *pool, False, True)

    def unpooled(grad: Tensor) -> Tensor:
        return reference.max_pool_backward(grad, offsets, size, *pool, (1, 1))

    def stock(x: Tensor, grad: Tensor) -> Tensor:
        leaf = x.detach().requires_grad_()
        y = F.local_response_norm(leaf, norm[0], norm[0] * norm[1], *norm[2:4])
        return torch.autograd.grad(y, leaf, unpooled(grad))[0]

    return Case(
        (x, _normal(*offsets.shape)),
        lambda x, grad: LRN_MAX_POOL_BACKWARD.run(grad, x, offsets, *norm, *pool),
        stock,
        lambda x, grad: _lrn_terms(x, unpooled(grad.abs()), *norm[:4]),
    )


def _conv(draw: random.Random) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[int, int, int, int]]:
    groups = draw.choice((1, 1, 2))
    inputs, outputs = groups * draw.randint(1, 24), groups * draw.randint(1, 24)
    kernel, stride = draw.choice((1, 3, 3, 5)), draw.choice((1, 1, 2))
    x = _normal(draw.randint(1, 2), inputs, draw.randint(5, 15), draw.randint(5, 15)).relu()
    weight = _normal(outputs, inputs // groups, kernel, kernel) / kernel
    return (x, weight, _normal(outputs)), (stride, kernel // 2, 1, groups)


def conv_relu_case(draw: random.Random) -> Case:
    tensors, geometry = _conv(draw)
    return Case(
        tensors,
        lambda *t: ops.conv2d_relu(*t, *geometry),
        lambda *t: F.relu(F.conv2d(*t, *geometry)),
        lambda x, w, b: F.conv2d(x.abs(), w.abs(), b.abs(), *geometry),
    )


def conv_relu_backward_case(draw: random.Random) -> Case:
    """The weight's gradient; a bias of 1000 keeps every ReLU open, since rounding may flip one near zero."""
    (x, weight, bias), geometry = _conv(draw)
    grad = _normal(*F.conv2d(x, weight, None, *geometry).shape)

    def gradient(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor) -> Tensor:
            leaf = weight.detach().requires_grad_()
            return torch.autograd.grad(function(x, leaf, bias, *geometry), leaf, grad)[0]

        return run

    return Case(
        (x, weight, torch.full_like(bias, 1000.0), grad),
        gradient(ops.conv2d_relu),
        gradient(lambda *t: F.relu(F.conv2d(*t))),
        lambda x, w, b, g: gradient(F.conv2d)(x.abs(), w, b, g.abs()),
    )


def conv_relu_max_pool_case(draw: random.Random) -> Case:
    tensors, geometry = _conv(draw)
    return Case(
        tensors,
        lambda *t: ops.conv2d_relu_max_pool2d(*t, *geometry, pool_size=2),
        lambda *t: F.max_pool2d(F.relu(F.conv2d(*t, *geometry)), 2, 2),
        lambda x, w, b: F.max_pool2d(F.conv2d(x.abs(), w.abs(), b.abs(), *geometry), 2, 2),
    )


def conv_relu_lrn_max_pool_case(draw: random.Random) -> Case:
    """The map is rounded to the dtype before it is normalised, as by the operators in turn; the oracle's is not."""
    tensors, geometry = _conv(draw)
    norm = (5, draw.choice((1e-4, 0.3)), 0.75, draw.choice((1.0, 2.0)))
    names = dict(zip(("size", "alpha", "beta", "k"), norm, strict=True))

    def stock(*t: Tensor) -> Tensor:
        return F.max_pool2d(F.local_response_norm(F.relu(F.conv2d(*t, *geometry)), *norm), 2, 2)

    return Case(
        tensors,
        lambda *t: ops.conv2d_relu_lrn_max_pool2d(*t, *geometry, **names, pool_size=2),
        stock,
        lambda x, w, b: (
            F.max_pool2d(F.conv2d(x.abs(), w.abs(), b.abs(), *geometry), 2, 2) * norm[3] ** -0.75
        ),
    )


def _linear(draw: random.Random) -> tuple[Tensor, Tensor, Tensor]:
    rows, inputs, outputs = draw.randint(1, 40), draw.randint(1, 300), draw.randint(1, 60)
    return _normal(rows, inputs), _normal(outputs, inputs) / inputs**0.5, _normal(outputs)


def linear_relu_case(draw: random.Random) -> Case:
    return Case(
        _linear(draw),
        ops.linear_relu,
        lambda *t: F.relu(F.linear(*t)),
        lambda x, w, b: F.linear(x.abs(), w.abs(), b.abs()),
    )


def linear_relu_backward_case(draw: random.Random) -> Case:
    """The weight's gradient, every ReLU open."""
    x, weight, _ = _linear(draw)
    return Case(
        (x, weight, _normal(len(x), len(weight))),
        lambda x, w, g: LINEAR_RELU_BACKWARD.run(g, None, x, w, [False, True, False])[1],
        lambda x, w, g: g.t() @ x,
        lambda x, w, g: g.abs().t() @ x.abs(),
    )


def augment_case(draw: random.Random) -> Case:
    """The dtype is the result's; shift and mean are float32."""
    images = torch.randint(0, 256, (2, 9, 11, 3), dtype=torch.uint8)
    corners, mirrored = torch.tensor([[1, 2], [0, 3]]), torch.tensor([False, True])
    scale = draw.choice((1.0, 1 / 58))

    def ours(shift: Tensor, mean: Tensor) -> Tensor:
        given = (shift.float(), mean.float(), 7)
        return ops.augment(images, corners, mirrored, *given, scale=scale, dtype=shift.dtype)

    def stock(shift: Tensor, mean: Tensor) -> Tensor:
        wide = torch.float64 if shift.dtype is torch.float64 else torch.float32
        crops = [images[0, 1:8, 2:9], images[1, 0:7, 3:10].flip(1)]
        values = torch.stack(crops).to(wide) + shift.to(wide)[:, None, None] - mean.to(wide)
        return (values * scale).to(shift.dtype).permute(0, 3, 1, 2)

    return Case(
        (_normal(2, 3) * 10, torch.rand(3, dtype=torch.float64) * 255),
        ours,
        stock,
        lambda shift, mean: stock(shift.abs(), -mean.abs()),
    )


CASES: dict[str, Callable[[random.Random], Case]] = {
    "lrn": lrn_case,
    "lrn_backward": lrn_backward_case,
    "max_pool": max_pool_case,
    "max_pool_backward": max_pool_backward_case,
    "lrn_max_pool": lrn_max_pool_case,
    "lrn_max_pool_backward": lrn_max_pool_backward_case,
    "conv_relu": conv_relu_case,
    "conv_relu_backward": conv_relu_backward_case,
    "conv_relu_max_pool": conv_relu_max_pool_case,
    "conv_relu_lrn_max_pool": conv_relu_lrn_max_pool_case,
    "linear_relu": linear_relu_case,
    "linear_relu_backward": linear_relu_backward_case,
    "augment": augment_case,
}


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
