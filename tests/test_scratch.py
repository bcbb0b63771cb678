"""Working memory of every operator on the CPU: what its docstring states, against the most a call held on the heap."""

from __future__ import annotations

import contextvars
import ctypes
import json
import os
import random
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastalex import use_backend
from fastalex._geometry import convolved_size
from fastalex.ops import _cpu_conv
from fastalex.ops.augment import AUGMENT
from fastalex.ops.conv_relu import CONV_RELU, CONV_RELU_BACKWARD
from fastalex.ops.conv_relu_max_pool import CONV_RELU_LRN_MAX_POOL, CONV_RELU_MAX_POOL
from fastalex.ops.linear_relu import LINEAR_RELU, LINEAR_RELU_BACKWARD
from fastalex.ops.lrn import LRN, LRN_BACKWARD
from fastalex.ops.lrn_max_pool import LRN_MAX_POOL, LRN_MAX_POOL_BACKWARD
from fastalex.ops.max_pool import MAX_POOL, MAX_POOL_BACKWARD
from tests.support.packaging import ROOT

KIB, MIB = 1 << 10, 1 << 20
#: What Python, torch and their threads take for themselves during a call.
OTHERS = 32 * KIB
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


def size_of(dtype: torch.dtype) -> int:
    """Bytes of an element of the arithmetic: float32's for the half types."""
    return 8 if dtype is torch.float64 else 4


# --- the docstrings' formulas: bytes, of T threads


def lrn(threads: int, x: Tensor, size: int) -> int:
    return threads * size_of(x.dtype) * (512 * (3 * size + 4) + 4 * (x.shape[1] + 2 * size))


def max_pool(threads: int, x: Tensor, kernel: int) -> int:
    return threads * 64 * (x.shape[3] + kernel**2)


def max_pool_backward(threads: int, x: Tensor, kernel: int) -> int:
    plane = x.shape[2] * x.shape[3]
    return threads * (size_of(x.dtype) * plane + 64 * (x.shape[2] + x.shape[3] + kernel**2))


def lrn_max_pool(threads: int, x: Tensor, size: int, kernel: int) -> int:
    band = max(128 * KIB, kernel * x.shape[1] * x.shape[3])
    tables = 64 * (x.shape[2] + x.shape[3] + kernel**2)
    return lrn(threads, x, size) + threads * (size_of(x.dtype) * band + tables)


def images(x: Tensor, weight: Tensor, geometry: tuple[Any, ...]) -> tuple[int, int]:
    """Bytes in float32 of one padded input image, and of its output."""
    _, (pad_h, pad_w), *_ = geometry
    out = convolved_size(x.shape[2:], weight.shape[2:], *geometry[:3])
    padded = x.shape[1] * (x.shape[2] + 2 * pad_h) * (x.shape[3] + 2 * pad_w)
    return 4 * padded, 4 * weight.shape[0] * out[0] * out[1]


def conv(threads: int, x: Tensor, weight: Tensor, geometry: tuple[Any, ...]) -> int:
    return 16 * MIB + threads * (2 * MIB + 8 * sum(images(x, weight, geometry)))


def conv_backward(threads: int, x: Tensor, weight: Tensor, geometry: tuple[Any, ...]) -> int:
    both = 10 * (sum(images(x, weight, geometry)) + 4 * weight.numel())
    return conv(threads, x, weight, geometry) + both


def linear(threads: int, rows: int, inputs: int, outputs: int) -> int:
    return 2 * MIB + threads * 4 * MIB + 4 * rows * (inputs + outputs)


# --- what calls hold


def calls(threads: int) -> Iterator[tuple[str, Callable[[], Any], int]]:
    """(name, call, bytes allowed)."""
    norm, pool = (5, 0.02, 0.75, 1.0, 1), ((3, 3), (2, 2), (0, 0))
    dtypes = (torch.float32, torch.bfloat16, torch.float64)
    for dtype in dtypes:
        for layout, format in LAYOUTS.items():
            for shape in ((4, 96, 55, 55), (2, 300, 5, 300)):
                x = torch.randn(shape).to(dtype).contiguous(memory_format=format)
                g, name = torch.randn_like(x), f"{dtype} {layout} {shape}"
                for size in (5, 12):
                    n = (size, *norm[1:])
                    allowed = lrn(threads, x, size)
                    yield f"lrn {size} {name}", partial(LRN.run, x, *n), allowed
                    yield (
                        f"lrn_backward {size} {name}",
                        partial(LRN_BACKWARD.run, g, x, *n),
                        allowed,
                    )
                    for track in (True, False):
                        yield (
                            f"lrn_max_pool {size} {name}",
                            partial(LRN_MAX_POOL.run, x, *n, *pool, False, track),
                            lrn_max_pool(threads, x, size, 3),
                        )
                y, offsets = MAX_POOL.run(x, *pool, (1, 1), False, True)
                gy, sizes = torch.randn_like(y), x.shape[2:]
                yield (
                    f"max_pool {name}",
                    partial(MAX_POOL.run, x, *pool, (1, 1), False, True),
                    max_pool(threads, x, 3),
                )
                yield (
                    f"max_pool_backward {name}",
                    partial(MAX_POOL_BACKWARD.run, gy, offsets, sizes, *pool, (1, 1)),
                    max_pool_backward(threads, x, 3),
                )
                yield (
                    f"lrn_max_pool_backward {name}",
                    partial(LRN_MAX_POOL_BACKWARD.run, gy, x, offsets, *norm, *pool),
                    lrn_max_pool(threads, x, 5, 3),
                )
    yield from conv_calls(threads)
    for rows in (1, 70, 500):
        for dtype in (torch.float32, torch.bfloat16):
            x, weight = torch.randn(rows, 2000).to(dtype), torch.randn(1000, 2000).to(dtype)
            y = LINEAR_RELU.run(x, weight, None, True)
            allowed = linear(threads, rows, 2000, 1000)
            yield (
                f"linear_relu {rows} {dtype}",
                partial(LINEAR_RELU.run, x, weight, None, True),
                allowed,
            )
            yield (
                f"linear_relu_backward {rows} {dtype}",
                partial(LINEAR_RELU_BACKWARD.run, y, y, x, weight, [True] * 3),
                allowed,
            )
    stored = torch.randint(0, 256, (8, 128, 150, 3), dtype=torch.uint8)
    corners, mirrored = torch.full((8, 2), 5), torch.arange(8) % 2 == 0
    for mean in (torch.zeros(3), torch.zeros(128, 150, 3)):
        call = (stored, corners, mirrored, torch.zeros(8, 3), mean, (99, 99), 1.0, 100)
        allowed = 4 * stored[0].numel() + threads * 16 * 99 * 3
        yield "augment", partial(AUGMENT.run, *call, torch.float32), allowed


CONVOLUTIONS = {
    "conv1": ((4, 3, 227, 227), (96, 3, 11, 11), 4, 0, 1),
    "conv2": ((5, 96, 27, 27), (256, 48, 5, 5), 1, 2, 2),
    "conv3": ((8, 256, 13, 13), (384, 256, 3, 3), 1, 1, 1),
    "conv4, alone": ((1, 384, 13, 13), (384, 192, 3, 3), 1, 1, 2),
    "depthwise": ((4, 64, 56, 56), (64, 1, 3, 3), 1, 1, 64),
    "pointwise": ((4, 256, 28, 28), (512, 256, 1, 1), 1, 0, 1),
    "wide": ((1, 8, 24, 2000), (8, 8, 3, 3), 1, 1, 1),
}


def conv_calls(threads: int) -> Iterator[tuple[str, Callable[[], Any], int]]:
    """Against what explain says, too: no more, but that large memory comes in whole pages of 2 MiB, and aligned."""
    pool = ((3, 3), (2, 2), (0, 0))
    for name, (shape, weights, stride, padding, groups) in CONVOLUTIONS.items():
        geometry: Any = ((stride,) * 2, (padding,) * 2, (1, 1), groups)
        weight, bias = torch.randn(weights) / 30, torch.randn(weights[0])
        for layout, format in LAYOUTS.items():
            x = torch.randn(shape).contiguous(memory_format=format)
            call = (x, weight, bias, *geometry)
            y = CONV_RELU.run(*call)
            explained = [planned(*call, direction) for direction in range(3)]
            paged = [4 * KIB + bytes + (4 * MIB if bytes > 3.9e6 else 0) for bytes in explained]
            forward = min(conv(threads, x, weight, geometry), paged[0])
            yield f"conv_relu {name} {layout}", partial(CONV_RELU.run, *call), forward
            yield (
                f"conv_relu_backward {name} {layout}",
                partial(CONV_RELU_BACKWARD.run, y, y, x, weight, *geometry, [True] * 3),
                min(conv_backward(threads, x, weight, geometry), max(paged[1:])),
            )
            _, image = images(x, weight, geometry)
            fused = conv(threads, x, weight, geometry) + max(6 * MIB, image) + threads * image
            yield (
                f"conv_relu_max_pool {name} {layout}",
                partial(CONV_RELU_MAX_POOL.run, *call, *pool, False),
                fused + max_pool(threads, y, 3),
            )
            yield (
                f"conv_relu_lrn_max_pool {name} {layout}",
                partial(CONV_RELU_LRN_MAX_POOL.run, *call, 5, 0.02, 0.75, 1.0, 1, *pool, False),
                fused + lrn_max_pool(threads, y, 5, 3),
            )


def planned(*call: Any) -> int:
    """Bytes of scratch that explain shows for a convolution, the last argument its direction."""
    text = _cpu_conv.plan(*call)
    return int(1e6 * max(float(size) + 0.005 for size in re.findall(r"scratch ([\d.]+) MB", text)))


def tensors_of(results: Any) -> Iterator[Tensor]:
    if isinstance(results, Tensor):
        yield results
    else:
        for each in results:
            yield from tensors_of(each)


def held(heap: Any, call: Callable[[], Any]) -> int:
    """Bytes that a call holds at most, besides what it returns, in a thread that has kept none from earlier calls."""
    call()  # plans, packed weights
    most = 0

    def work() -> None:
        nonlocal most
        torch.ones(100_000).exp_()  # starts this thread's team
        time.sleep(0.02)  # the thread before lets its own memory go
        before = heap.heap_restart()
        results = call()
        most = heap.heap_peak() - before
        most -= sum(tensor.untyped_storage().nbytes() for tensor in tensors_of(results))

    context = contextvars.copy_context()  # a new thread would forget the forced backend
    thread = threading.Thread(target=context.run, args=(work,))
    thread.start()
    thread.join()
    return most


def main() -> None:
    """Under the counting heap: prints every call's bytes, held and allowed."""
    heap = ctypes.CDLL(os.environ["LD_PRELOAD"])
    heap.heap_restart.restype = heap.heap_peak.restype = ctypes.c_long
    found = []
    with use_backend("cpu"):
        for threads in (1, 3):
            torch.set_num_threads(threads)
            for name, call, allowed in calls(threads):
                found.append((f"{name}, {threads} threads", held(heap, call), allowed))
    print(json.dumps(found))


@pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc to build the counting heap with")
@pytest.mark.skipif(sys.platform != "linux", reason="the counting heap is glibc's")
def test_calls_hold_what_their_docstrings_say(tmp_path: Path) -> None:
    source, heap = ROOT / "tests/support/native/heap.c", tmp_path / "heap.so"
    subprocess.run(["gcc", "-O2", "-fPIC", "-shared", source, "-o", heap], check=True)
    code = "from tests import test_scratch; test_scratch.main()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "LD_PRELOAD": str(heap)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout)
    assert len(found) > 300
    beyond = [line for line in found if line[1] > line[2] + OTHERS]
    assert not beyond, "\n".join(map(str, beyond))
    # The counting heap counts: what is planned is there to be seen.
    assert max(bytes for name, bytes, _ in found if "conv_relu_backward" in name) > 10 * MIB


def test_convolutions_of_any_size_plan_what_their_docstrings_say() -> None:
    draw, threads = random.Random(2012), torch.get_num_threads()
    try:
        for _ in range(400):
            torch.set_num_threads(draw.choice((1, 2, 4, 8)))
            groups, kernel = draw.choice((1, 1, 2, 4)), draw.choice((1, 2, 3, 3, 5, 7, 11))
            channels, filters = (
                draw.choice(of) for of in ((1, 3, 16, 64, 192), (1, 8, 64, 96, 384))
            )
            sides = [draw.randint(kernel, 300) * draw.choice((1, 1, 1, 20)) for _ in range(2)]
            batch, stride = draw.choice((1, 2, 8, 128)), draw.choice((1, 1, 2, 4))
            padding = draw.choice((0, kernel // 2, kernel))
            x = torch.empty(batch, groups * channels, *sides, device="meta")
            weight = torch.empty(groups * filters, channels, kernel, kernel, device="meta")
            geometry: Any = ((stride,) * 2, (padding,) * 2, (1, 1), groups)
            for direction in range(3):
                formula = conv_backward if direction == 2 else conv
                allowed = formula(torch.get_num_threads(), x, weight, geometry)
                assert planned(x, weight, None, *geometry, direction) <= allowed
    finally:
        torch.set_num_threads(threads)
