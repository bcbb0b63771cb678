"""What the Triton backend launches, beside what stock torch does: counted without a GPU."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from fastalex.kernels._layout import WIDE_FROM
from fastalex.kernels.conv_relu import conv_relu, refuse_conv_relu
from fastalex.kernels.conv_relu_backward import conv_relu_backward
from fastalex.kernels.lrn import lrn, lrn_backward
from fastalex.kernels.lrn_max_pool import lrn_max_pool, lrn_max_pool_backward
from fastalex.kernels.max_pool import max_pool

import fastalex
from tests.support.triton_launches import recording

ONE, NONE, ALL = (1, 1), (0, 0), (True, True, True)


class CountOps(TorchDispatchMode):
    """Counts ATen calls that are no views and no allocations: on a GPU each is at least one kernel."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        returns = func._schema.returns
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        allocates = func.name().startswith(("aten::empty", "aten::new_empty", "aten::detach"))
        self.count += not (is_view or allocates)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def on_any_device(monkeypatch):
    """The backend takes tensors of any device, and Triton itself doesn't interpret."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")


def features(**changes):
    return fastalex.models.alexnet("paper", **changes).features.to(torch.bfloat16)


def image(batch, device="cpu"):
    x = torch.zeros(batch, 3, 227, 227, dtype=torch.bfloat16, device=device)
    return x.contiguous(memory_format=torch.channels_last)


def test_the_network_launches_eight_kernels_forward(on_any_device):
    """Eight operators, a kernel each; at batch 1, convolutions split over K add a sum each."""
    model = features()
    with recording() as launched, fastalex.use_backend("triton"), torch.no_grad():
        model(image(32))
    assert Counter(each.kernel for each in launched) == {
        "pack_weights": 5,  # from the contiguous weights of a new model
        "conv_relu_forward": 5,
        "pool_forward": 3,
    }
    model.to(memory_format=torch.channels_last)
    with recording() as launched, fastalex.use_backend("triton"), torch.no_grad():
        model(image(1))
    assert Counter(each.kernel for each in launched) == {
        "pack_weights": 1,  # conv1's rows, in the order it walks them
        "conv_relu_forward": 5,
        "finish_parts": 3,  # conv2 has programs enough
        "pool_forward": 3,
    }
    stock_model, x = features(fused=False).to("meta"), image(32, "meta")
    with CountOps() as stock, torch.no_grad():
        stock_model(x)
    assert stock.count == 27


def test_the_network_launches_few_kernels_backward(on_any_device):
    model = features().to(memory_format=torch.channels_last)
    with recording() as launched, fastalex.use_backend("triton"):
        y = model(image(32))
        forward = len(launched)
        y.backward(torch.ones_like(y))
    # No mask_gradient: pools and convolutions mask the gradients that they make.
    assert Counter(each.kernel for each in launched[forward:]) == {
        "pool_backward": 3,
        "conv_input_gradient": 4,  # images want no gradient
        "conv_weight_gradient": 5,
        "sum_parts": 5,
    }
    stock_model = features(fused=False).to("meta")
    y = stock_model(image(32, "meta"))
    grad = torch.ones_like(y)
    with CountOps() as stock:
        y.backward(grad)
    assert stock.count == 44


def far(*shape):
    """A view of memory too large for 32-bit offsets, and one just small enough."""
    strides = torch.empty(shape, device="meta", memory_format=torch.channels_last).stride()
    reach = sum((n - 1) * s for n, s in zip(shape[1:], strides[1:], strict=True))
    for step in (WIDE_FROM - 1 - reach, WIDE_FROM - reach - 2):
        memory = torch.empty(step + reach + 1, device="meta", dtype=torch.float16)
        yield memory.as_strided(shape, (step, *strides[1:]))


def test_offsets_are_64_bit_where_a_tensor_needs_them_and_only_there(on_any_device):
    norm, window = (5, 0.3, 0.75, 2.0, 1), ((3, 3), (2, 2), NONE)
    pooled = torch.empty(2, 8, 4, 4, device="meta", dtype=torch.float16)
    pooled = pooled.contiguous(memory_format=torch.channels_last)
    taps = torch.empty_like(pooled, dtype=torch.uint8)
    w = torch.empty(8, 8, 3, 3, device="meta", dtype=torch.float16)
    y = torch.empty(2, 8, 9, 9, device="meta", dtype=torch.float16)
    y = y.contiguous(memory_format=torch.channels_last)
    calls = {
        "lrn_forward": lambda x: lrn(x, *norm),
        "lrn_input_gradient": lambda x: lrn_backward(x, x, *norm),
        "pool_forward": lambda x: (
            max_pool(x, *window, ONE, False, True),
            lrn_max_pool(x, *norm, *window, False, False),
        ),
        "pool_backward": lambda x: lrn_max_pool_backward(pooled, x, taps, *norm, *window),
        "conv_relu_forward": lambda x: conv_relu(x, w, None, ONE, ONE, ONE, 1),
        "conv_input_gradient": lambda x: conv_relu_backward(
            x, x, y, w, ONE, ONE, ONE, 1, ALL, grad_is_masked=True
        ),
        "conv_weight_gradient": lambda x: conv_relu_backward(y, y, x, w, ONE, ONE, ONE, 1, ALL),
    }
    for kernel, call in calls.items():
        for x, wide in zip(far(2, 8, 9, 9), (True, False), strict=True):
            with recording() as launched:
                call(x)
            found = [each.arguments["WIDE"] for each in launched if each.kernel == kernel]
            assert found
            assert set(found) == {wide}, kernel
    huge = torch.empty(2**29, 4, 1, 1, device="meta")
    assert "2^31" in refuse_conv_relu(
        torch.empty(1, 4, 1, 1, device="meta"), huge, None, ONE, NONE, ONE, 1
    )


@pytest.mark.parametrize(("batch", "expected"), [(1, [1, 1, 6, 6, 5]), (128, [1] * 5)])
def test_small_batches_split_their_products_by_shape_alone(on_any_device, batch, expected):
    with recording() as launched, fastalex.use_backend("triton"), torch.no_grad():
        features().to("meta", memory_format=torch.channels_last)(image(batch, "meta"))
    splits = [e.arguments["SPLIT"] for e in launched if e.kernel == "conv_relu_forward"]
    assert splits == expected
