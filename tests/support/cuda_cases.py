"""Inputs, oracles and bounds for kernels that accumulate in float32, shared by the CUDA tests."""

from __future__ import annotations

import torch
from torch import Tensor

from fastalex.reference.lrn import _denominator_base, _window_sum

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
FORMATS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
UNIT = 2.0**-24  # half an ulp of float32, relative


def draw(
    shape, dtype: torch.dtype, layout: str = "nchw", seed: int = 0, scale: float = 1.0
) -> Tensor:
    """Normal values in the given layout; scale reaches both regimes of a normalization."""
    generator = torch.Generator().manual_seed(seed)
    values = (torch.randn(shape, generator=generator) * scale).to(dtype)
    return values.contiguous(memory_format=FORMATS[layout]) if values.dim() == 4 else values


def assert_within(actual: Tensor, exact: Tensor, bound: Tensor) -> None:
    """|actual - exact| <= bound, element by element; what is not finite must agree."""
    actual = actual.double()
    same = (actual == exact) | (actual.isnan() & exact.isnan())
    wrong = ~(same | ((actual - exact).abs() <= bound))
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(
            f"{int(wrong.sum())} of {wrong.numel()} wrong, first at {at}: {actual[at].item()} "
            f"for {exact[at].item()}, allowed {bound[at].item():.3g}"
        )


def rounding(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """The one rounding to `dtype`: half an ulp, and half a denormal step below the normal range."""
    info = torch.finfo(dtype)
    return exact.abs() * (info.eps / 2) + info.smallest_normal * info.eps / 2


def lrn_bound(exact: Tensor, size: int) -> Tensor:
    """Forward: `size` additions of positive terms, then scale and k (size + 2 roundings, through a
    power below one), the power itself (4.5 ulp are 9 units) and one product."""
    return exact.abs() * (size + 2 + 9 + 1) * UNIT


def lrn_backward_bound(grad, x, size, scale, beta, k, groups) -> Tensor:
    """Backward: a term carries forward's error, s^-1 once more and three products; `size` of them
    are added; all is relative to |g s^-beta| + 2 scale beta |x| (sum of |g x| s^(-beta-1))."""
    x, grad = x.double(), grad.double().abs()
    s = _denominator_base(x, size, scale, k, groups)
    direct = grad * s**-beta
    shared = _window_sum(direct * x.abs() / s, size - 1 - size // 2, size // 2, groups)
    magnitude = direct + 2 * scale * beta * x.abs() * shared
    return magnitude * (2 * (size + 12) + 10 + size + 3) * UNIT


def sum_bound(absolute: Tensor, terms: int) -> Tensor:
    """A float32 sum of exact products in any order: each of `terms` additions rounds once."""
    return absolute * terms * UNIT
