"""``make gpu-check``: everything that only a GPU can show, in under ten minutes, as one results file.

    python benchmarks/gpu_check.py [--json out/gpu-check.json] [--seconds 570]

On a machine with an NVIDIA GPU and torch: the tests marked `gpu`; compute-sanitizer over a part of them, where it is
installed; and every operator of the network on every backend that takes it, in turns, as a share of the measured roof
(bytes by a copy, products by a matrix product). The file holds all of that beside the machine, versions and commit. A
backend that cannot run is listed with its reason. The exit status is 1 if a test or the sanitizer failed.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import environment, roofline  # noqa: E402
from fastalex import BackendError, costs, use_backend  # noqa: E402
from fastalex.ops._operator import REGISTRY  # noqa: E402

BACKENDS = ("torch", "cuda", "triton", "cupy")
DTYPES = (torch.float16, torch.float32)
BATCH = 128
LRN, POOL = (5, 2e-5, 0.75, 2.0), ((3, 3), (2, 2), (0, 0))
# input [C, H, W], output channels, kernel, stride, padding, groups; rows of 228 pixels for 227
CONVOLUTIONS = {
    "conv1": ((3, 227, 228), 96, 11, 4, 0, 1),
    "conv2": ((96, 27, 27), 256, 5, 1, 2, 2),
    "conv3": ((256, 13, 13), 384, 3, 1, 1, 1),
    "conv4": ((384, 13, 13), 384, 3, 1, 1, 2),
    "conv5": ((384, 13, 13), 256, 3, 1, 1, 2),
}
LAYERS = {"fc6": (9216, 4096), "fc7": (4096, 4096), "fc8": (4096, 1000)}
SANITIZED = "test_cuda_cases.py and float16 and cuda"
TESTS_SHARE, SANITIZER_SHARE = 0.5, 0.2  # of the time


def calls(dtype: torch.dtype, device: str) -> dict[str, tuple[str, tuple[Any, ...]]]:
    """{case: (operator, arguments)} of AlexNet's layers, channels_last, forward and backward."""

    def make(*shape: int) -> torch.Tensor:
        values = torch.randn(shape, device=device).to(dtype)
        return values.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else values

    found: dict[str, tuple[str, tuple[Any, ...]]] = {}
    for name, (shape, outputs, kernel, stride, padding, groups) in CONVOLUTIONS.items():
        x = make(BATCH, *shape)
        weight = make(outputs, shape[0] // groups, kernel, kernel) / kernel
        geometry = ((stride, stride), (padding, padding), (1, 1), groups)
        side = [(n + 2 * padding - kernel) // stride + 1 for n in shape[1:]]
        y = make(BATCH, outputs, *side)
        found[f"conv_relu/fwd/{name}"] = "conv_relu", (x, weight, None, *geometry)
        conv = (x, weight, None, *geometry)
        if name in ("conv1", "conv2"):
            arguments = (*conv, *LRN, groups, *POOL, False)
            found[f"conv_relu_lrn_max_pool/infer/{name}"] = "conv_relu_lrn_max_pool", arguments
        if name in ("conv1", "conv5"):  # CaffeNet pools conv1 at once
            found[f"conv_relu_max_pool/infer/{name}"] = "conv_relu_max_pool", (*conv, *POOL, False)
        mask = [name != "conv1", True, True]
        found[f"conv_relu/bwd/{name}"] = "conv_relu_backward", (y, y, x, weight, *geometry, mask)
    for name, (inputs, outputs) in LAYERS.items():
        x, weight, y = make(BATCH, inputs), make(outputs, inputs) / 64, make(BATCH, outputs)
        found[f"linear_relu/fwd/{name}"] = "linear_relu", (x, weight, None, True)
        found[f"linear_relu/bwd/{name}"] = "linear_relu_backward", (y, y, x, weight, [True] * 3)
    for name, channels, side in (("norm1", 96, 55), ("norm2", 256, 27)):
        x, g = make(BATCH, channels, side, side), make(BATCH, channels, side // 2, side // 2)
        offsets = torch.zeros_like(g, dtype=torch.uint8)
        lrn = (*LRN, 2)
        found[f"lrn/fwd/{name}"] = "lrn", (x, *lrn)
        found[f"lrn/bwd/{name}"] = "lrn_backward", (x, x, *lrn)
        found[f"max_pool/fwd/{name}"] = "max_pool", (x, *POOL, (1, 1), False, True)
        size = (side, side)
        found[f"max_pool/bwd/{name}"] = "max_pool_backward", (g, offsets, size, *POOL, (1, 1))
        found[f"lrn_max_pool/infer/{name}"] = "lrn_max_pool", (x, *lrn, *POOL, False, False)
        found[f"lrn_max_pool/fwd/{name}"] = "lrn_max_pool", (x, *lrn, *POOL, False, True)
        arguments = (g, x, offsets, *lrn, *POOL)
        found[f"lrn_max_pool/bwd/{name}"] = "lrn_max_pool_backward", arguments
    return found


def milliseconds(run: Callable[[], Any], repeats: int) -> float:
    """One call's share of ``repeats`` calls in a row, by the device's own clock."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / repeats


def compare(
    op: str, args: tuple[Any, ...], clock: Callable[..., float] = milliseconds
) -> dict[str, Any]:
    """{backend: median ms, or why it did not run}; backends take turns."""
    told: dict[str, Any] = {}
    running: dict[str, list[float]] = {}
    for backend in BACKENDS:
        try:
            with use_backend(backend):
                REGISTRY[op].run(*args)
            running[backend] = []
        except (BackendError, RuntimeError) as error:
            told[backend] = str(error).splitlines()[0]
    for turn in range(8):
        for backend, times in running.items():
            with use_backend(backend):
                spent = clock(lambda: REGISTRY[op].run(*args), 10)
            if turn:  # the first warms up
                times.append(spent)
    return told | {backend: statistics.median(times) for backend, times in running.items()}


def benchmark(
    deadline: float, device: str = "cuda"
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """(the roof, a row a case and backend) until the time is spent; what is left out is listed too."""
    roof = roofline.measure(torch.device(device), DTYPES)
    rows: list[dict[str, Any]] = []
    for dtype in DTYPES:
        for case, (op, args) in calls(dtype, device).items():
            named = {"case": f"{case}/{str(dtype)[6:]}/b{BATCH}"}
            if time.monotonic() > deadline:
                rows.append({**named, "skipped": "the time was spent"})
                continue
            least = 1e3 * roof.seconds([getattr(costs, op)(*args)], dtype)
            for backend, outcome in compare(op, args).items():
                if isinstance(outcome, str):
                    rows.append({**named, "provider": backend, "refused": outcome})
                else:
                    share = {"median_ms": outcome, "pct_roofline": 100 * least / outcome}
                    rows.append({**named, "provider": backend, **share})
    rates = {f"{str(dtype)[6:]}_flops": rate for dtype, rate in roof.flops.items()}
    return {"copy_bytes_per_second": roof.bandwidth, **rates}, rows


def run_tests(seconds: float, prefix: Sequence[str] = (), *selection: str) -> dict[str, Any]:
    """The tests marked `gpu`, in a process of their own."""
    command = [*prefix, sys.executable, "-m", "pytest", "tests", "-q", "-m", "gpu", *selection]
    # Deterministic matrix products, which the tests ask for, need a fixed workspace.
    surroundings = {**os.environ, "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "FASTALEX_TUNE": "0"}
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=surroundings, timeout=seconds, capture_output=True, text=True
        )
    except subprocess.TimeoutExpired as late:
        text = late.stdout.decode() if isinstance(late.stdout, bytes) else late.stdout or ""
        return {"status": "out of time", "seconds": seconds, "output": text[-4000:]}
    counts = {
        word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|skipped|error)", done.stdout)
    }
    status = "passed" if done.returncode == 0 and counts.get("passed") else "failed"
    output = "" if status == "passed" else (done.stdout + done.stderr)[-4000:]
    return {"status": status, **counts, "output": output}


def sanitize(seconds: float) -> dict[str, Any]:
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return {"status": "not run", "reason": "compute-sanitizer is not on PATH"}
    prefix = (tool, "--tool", "memcheck", "--error-exitcode", "9", "--target-processes", "all")
    return run_tests(seconds, prefix, "-k", SANITIZED, "-x")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=pathlib.Path, default=ROOT / "out" / "gpu-check.json")
    parser.add_argument("--seconds", type=float, default=570)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("gpu-check: this torch sees no CUDA GPU: run it where there is one", file=sys.stderr)
        return 2
    begin = time.monotonic()
    tests = run_tests(TESTS_SHARE * options.seconds)
    sanitizer = sanitize(SANITIZER_SHARE * options.seconds)
    roof, rows = benchmark(begin + options.seconds)
    device = torch.device("cuda")
    result = {
        **environment.describe(device),
        "capability": list(torch.cuda.get_device_capability()),
        "tests": tests,
        "sanitizer": sanitizer,
        "roof": roof,
        "rows": rows,
        "seconds": time.monotonic() - begin,
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=1) + "\n")
    print(f"tests {tests['status']}, sanitizer {sanitizer['status']}; {options.json}")
    for row in rows:
        if "median_ms" in row:
            print(
                f"{row['case']:40} {row['provider']:7} {row['median_ms']:9.3f} ms {row['pct_roofline']:5.1f} %"
            )
    return int("failed" in (tests["status"], sanitizer["status"]))


if __name__ == "__main__":
    sys.exit(main())
