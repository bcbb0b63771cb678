"""AlexNet's inference from batch 1 to 128 on one thread and on more: time per image, first calls, a plot.

    python benchmarks/batch_sweep.py [--plot out/batch_sweep.png] [--rounds 5]

A round runs every batch once on every number of threads, after one call that is not timed; medians of the rounds are
shown. The first call of a network packs its weights: its time is given in steady calls. FASTALEX_CPU_ISA chooses the
instruction set.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from fastalex import _native, models

BATCHES = (1, 2, 3, 4, 5, 7, 8, 12, 16, 24, 32, 48, 64, 96, 128)
FIRST_CALLS = (1, 8, 32)  # batches of which a fresh network's first call is timed
Times = dict[tuple[int, int], float]  # milliseconds by threads and batch


def milliseconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def images(batch: int) -> Tensor:
    return torch.randn(batch, 3, 227, 227).contiguous(memory_format=torch.channels_last)


def sweep(net: nn.Module, threads: Sequence[int], rounds: int) -> Times:
    samples: dict[tuple[int, int], list[float]] = {}
    inputs = {batch: images(batch) for batch in BATCHES}
    for _ in range(rounds):
        for count in threads:
            torch.set_num_threads(count)
            for batch, x in inputs.items():
                net(x)
                calls = max(1, 8 // batch)  # a short call is timed by several in a row
                taken = milliseconds(lambda x=x, calls=calls: [net(x) for _ in range(calls)])
                samples.setdefault((count, batch), []).append(taken / calls)
    return {key: statistics.median(values) for key, values in samples.items()}


def first_calls(net: nn.Module, batch: int, repeats: int = 5) -> float:
    """Milliseconds of the first call of a network whose weights nobody has seen."""
    x = images(batch)
    fresh = [copy.deepcopy(net) for _ in range(repeats)]
    return statistics.median(milliseconds(lambda net=net: net(x)) for net in fresh)


def plot(path: Path, times: Times, threads: Sequence[int]) -> None:
    import matplotlib.pyplot as plt

    figure, (per_image, efficiency) = plt.subplots(1, 2, figsize=(10, 4))
    for count in threads:
        shares = [times[count, batch] / batch for batch in BATCHES]
        label = f"{count} thread" + "s" * (count > 1)
        per_image.plot(BATCHES, shares, marker="o", label=label)
        efficiency.plot(BATCHES, [min(shares) / share for share in shares], marker="o", label=label)
    for axes, title in ((per_image, "ms per image"), (efficiency, "share of the best rate")):
        axes.set(xscale="log", xlabel="batch", title=title, ylim=0)
        axes.set_xticks(BATCHES[::2], BATCHES[::2])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(f"AlexNet inference, float32, {_native.isa()}")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plot", type=Path, default=Path("out/batch_sweep.png"))
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    most = torch.get_num_threads()
    threads = sorted({1, most})
    net = models.alexnet("paper").eval()
    with torch.inference_mode():
        times = sweep(net, threads, options.rounds)
        heads = (f"ms per image, threads: {count} |" for count in threads)
        print("| batch |", *heads)
        print("|---" * (len(threads) + 1) + "|")
        for batch in BATCHES:
            shares = " | ".join(f"{times[count, batch] / batch:.2f}" for count in threads)
            print(f"| {batch} | {shares} |")
        torch.set_num_threads(most)
        for batch in FIRST_CALLS:
            first, steady = first_calls(net, batch), times[most, batch]
            print(
                f"first call at batch {batch}: {first:.1f} ms, {first / steady:.1f} steady calls",
                flush=True,
            )
    plot(options.plot, times, threads)
    print(f"Wrote {options.plot}, {_native.isa()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
