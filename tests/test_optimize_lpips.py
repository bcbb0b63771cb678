"""Optimised LPIPS: the same distance, feature taps and gradients to the images, in both packages that have it."""

from __future__ import annotations

import copy

import pytest
import torch

import fastalex
from benchmarks import bench_zoo
from tests.support import optimized


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("copy_of", ["lpips", "torchmetrics"])
@pytest.mark.parametrize("net", ["alex", "squeeze", pytest.param("vgg", marks=pytest.mark.slow)])
def test_distance_and_gradients_equal_stock(copy_of, net):
    stock = bench_zoo._lpips(copy_of, net).double().eval().requires_grad_(False)
    fast = copy.deepcopy(stock)
    report = fastalex.optimize(fast)
    assert sum("Conv2d" in entry.layers for entry in report.replaced) >= 5
    images = [torch.rand(2, 3, 64, 64, dtype=torch.float64).requires_grad_() for _ in range(2)]
    results = []
    for model in (stock, fast):
        for options in ({}, {"normalize": True}):
            distance = model(*images, **options)
            results.append((distance, *torch.autograd.grad(distance.sum(), images)))
    for expected, actual in zip(results[:2], results[2:], strict=True):
        for a, b in zip(expected, actual, strict=True):
            torch.testing.assert_close(b, a, **optimized.EXACT)
