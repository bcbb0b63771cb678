"""The roof of this machine, measured: how fast memory is read and how fast multiply-adds run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from fastalex.costs import Cost

READ_MIB = 512  # far larger than any last-level cache it should not fit into
MATMUL = 2048


@dataclass(frozen=True)
class Roof:
    """Bytes read a second, and FLOP/s by dtype."""

    bandwidth: float
    flops: dict[torch.dtype, float]

    def seconds(self, costs: Iterable[Cost], dtype: torch.dtype) -> float:
        """Least time of operators in turn, each as fast as memory or arithmetic lets it be."""
        rate = self.flops[dtype]
        return sum(max(cost.bytes / self.bandwidth, cost.flops / rate) for cost in costs)


def _best(call: Callable[[], object], device: torch.device, times: int = 5) -> float:
    """The shortest time: a roof is what the machine can do, not what it usually does."""
    elapsed = []
    for _ in range(times + 1):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        elapsed.append(time.perf_counter() - start)
    return min(elapsed[1:])


def _read_rate(device: torch.device) -> float:
    values = torch.randn(READ_MIB * 2**20 // 4, device=device)
    if device.type == "cuda":  # a copy reads and writes: what a GPU's kernels do
        target = torch.empty_like(values)
        return 2 * values.nbytes / _best(lambda: target.copy_(values), device)
    return values.nbytes / min(_best(values.sum, device), _best(values.amax, device))


def _fma_rate(dtype: torch.dtype, device: torch.device) -> float:
    a, b = (torch.randn(MATMUL, MATMUL, device=device).to(dtype) for _ in range(2))
    return 2 * MATMUL**3 / _best(lambda: a @ b, device)


def measure(device: torch.device, dtypes: Iterable[torch.dtype]) -> Roof:
    return Roof(_read_rate(device), {dtype: _fma_rate(dtype, device) for dtype in dtypes})
