"""conv2d_relu under autocast gives conv2d's dtypes and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastalex import ops
from tests.support import bounds
from tests.support.cases import conv_layer


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, torch.float64])
def test_autocast_dtypes_are_conv2ds(dtype, given):
    """Every combination that conv2d takes under autocast gives the dtype it gives."""
    weight, bias, x = torch.randn(8, 4, 3, 3), torch.randn(8), torch.randn(2, 4, 9, 9)
    with torch.autocast("cpu", dtype=dtype):
        if given is torch.float64:  # left alone
            weight, bias = weight.double(), bias.double()
        expected = F.relu(F.conv2d(x.to(given), weight, bias))
        y = ops.conv2d_relu(x.to(given), weight, bias)
    assert y.dtype is expected.dtype
    torch.testing.assert_close(y, expected, rtol=0.02, atol=0.02)


def test_autocast_gradients_reach_float32_parameters():
    layer, x = conv_layer()
    x.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype is torch.bfloat16
    y.sum().backward()
    for tensor in (x, layer.weight, layer.bias):
        assert tensor.grad.dtype is torch.float32
    narrow = [t.detach().bfloat16().double() for t in (x, layer.weight, layer.bias)]
    leaves = [t.requires_grad_() for t in narrow]
    wide = F.relu(F.conv2d(*leaves, padding=1))
    wide.sum().backward()
    # A sum of 800 ones is exact in float32; the masks differ only where the sum rounds to zero.
    same_mask = (y > 0) == (wide > 0)
    assert same_mask.float().mean() > 0.999
    torch.testing.assert_close(
        layer.bias.grad.double(), leaves[2].grad, rtol=bounds.eps(torch.bfloat16), atol=1
    )


def test_autocast_agrees_with_its_own_cast():
    """Under autocast: exactly the call with everything cast by hand."""
    layer, x = conv_layer()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = layer(x)
    by_hand = ops.conv2d_relu(
        x.bfloat16(), layer.weight.bfloat16(), layer.bias.bfloat16(), padding=1
    )
    assert torch.equal(inside, by_hand)
