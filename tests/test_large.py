"""Tensors past the limits of 32-bit arithmetic, and channel counts at both ends."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastalex import ops

LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
layouts = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)

SIDE = 16_400  # SIDE^2 * 8 > 2^31
ROWS = ((0, 40), (SIDE // 2, SIDE // 2 + 40), (SIDE - 40, SIDE))


def huge(channels: int, layout: torch.memory_format) -> Tensor:
    """[1, channels, SIDE, SIDE] in bfloat16, of a period that is no power of two: wrapped offsets show."""
    tensor = torch.empty((1, channels, SIDE, SIDE), dtype=torch.bfloat16, memory_format=layout)
    generator = torch.Generator().manual_seed(1)
    pattern = torch.randn(channels, 97, SIDE, generator=generator).to(torch.bfloat16)
    for top in range(0, SIDE, 97):
        rows = min(97, SIDE - top)
        tensor[0, :, top : top + rows] = pattern[:, :rows] + top % 7
    return tensor


@pytest.mark.slow
@layouts
def test_more_than_two_to_the_31_elements(layout: torch.memory_format) -> None:
    """Bands of rows of the whole result equal the operator on those rows alone."""
    x = huge(8, layout)
    assert x.numel() > 2**31
    y = ops.local_response_norm(x, 5, 0.3, 0.75, 2.0)
    for top, bottom in ROWS:
        assert torch.equal(
            y[:, :, top:bottom], ops.local_response_norm(x[:, :, top:bottom], 5, 0.3, 0.75, 2.0)
        )
    del y
    for pool in (
        lambda x: ops.max_pool2d(x, 2),
        lambda x: ops.lrn_max_pool2d(x, 5, 0.3, 0.75, 2.0, 2, 2),
    ):
        y = pool(x)
        for top, bottom in ROWS:
            assert torch.equal(y[:, :, top // 2 : bottom // 2], pool(x[:, :, top:bottom]))
        del y
    weight = torch.randn(4, 8, 1, 1).to(torch.bfloat16)
    y = ops.conv2d_relu(x, weight)
    for top, bottom in ROWS:
        expected = F.relu(F.conv2d(x[:, :, top:bottom].double(), weight.double()))
        error = (y[:, :, top:bottom].double() - expected).abs()
        # A sum of eight products in float32, then the rounding to bfloat16 and float32's subnormals.
        magnitude = F.conv2d(x[:, :, top:bottom].double().abs(), weight.double().abs())
        assert (error <= magnitude * 10 * 2**-23 + expected * 2**-8).all()


@pytest.mark.slow
@layouts
def test_gradients_of_more_than_two_to_the_31_elements(layout: torch.memory_format) -> None:
    x = huge(8, layout).requires_grad_()
    (pooled,) = torch.autograd.grad(ops.max_pool2d(x, 2).sum(), x)
    for top, bottom in ROWS:
        band = x[:, :, top:bottom].detach().requires_grad_()
        (expected,) = torch.autograd.grad(ops.max_pool2d(band, 2).sum(), band)
        assert torch.equal(pooled[:, :, top:bottom], expected)


@layouts
@pytest.mark.parametrize("channels", [1, 100_000])
def test_channel_counts_at_both_ends(channels: int, layout: torch.memory_format) -> None:
    x = torch.randn(1, channels, 3, 4).contiguous(memory_format=layout)
    wide = x.double()
    lrn = (5, 0.3, 0.75, 2.0)
    torch.testing.assert_close(
        ops.local_response_norm(x, *lrn).double(),
        F.local_response_norm(wide, *lrn),
        rtol=2e-6,
        atol=0,
    )
    assert torch.equal(ops.max_pool2d(x, 2, 1), F.max_pool2d(x, 2, 1))
    torch.testing.assert_close(
        ops.lrn_max_pool2d(x, *lrn, 2, 1).double(),
        F.max_pool2d(F.local_response_norm(wide, *lrn), 2, 1),
        rtol=2e-6,
        atol=0,
    )
    weight = torch.randn(3, channels, 2, 2) / channels**0.5
    out = ops.conv2d_relu(x, weight).double()
    expected = F.relu(F.conv2d(wide, weight.double()))
    # The sum of 4 * channels products, in blocks: far below one eps a summand.
    magnitude = F.conv2d(wide.abs(), weight.double().abs())
    assert ((out - expected).abs() <= magnitude * (4 * channels + 2) * 2**-24).all()
