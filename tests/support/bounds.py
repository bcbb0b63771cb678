"""Error bounds derived from the arithmetic, never tuned: summands x eps x a small constant."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastalex import reference
from fastalex.reference.lrn import _denominator_base, _window_sum


def eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def compute_eps(dtype: torch.dtype) -> float:
    """The unit of the arithmetic inside: half types accumulate in float32."""
    return eps(torch.float64 if dtype is torch.float64 else torch.float32)


def assert_within(actual: Tensor, expected: Tensor, bound: Tensor) -> None:
    """|actual - expected| <= bound elementwise; NaN and infinities must agree exactly."""
    wide = actual.double()
    same = (wide == expected) | (wide.isnan() & expected.isnan())
    # What overflows the narrow type is infinite there and finite in the oracle.
    limit = torch.finfo(actual.dtype).max
    overflow = wide.isinf() & (expected.abs() > limit * (1 - eps(actual.dtype)))
    wrong = ~(same | overflow | ((wide - expected).abs() <= bound))
    if wrong.any():
        at = tuple(index[0].item() for index in wrong.nonzero(as_tuple=True))
        raise AssertionError(
            f"{int(wrong.sum())} of {wrong.numel()} elements off; first at {at}: "
            f"{wide[at].item()} for {expected[at].item()}, bound {bound[at].item():.3g}"
        )


def rounding(expected: Tensor, dtype: torch.dtype) -> Tensor:
    """Half an ulp of the result, and of the smallest subnormal."""
    return expected.abs() * eps(dtype) / 2 + torch.finfo(dtype).smallest_normal * eps(dtype)


#: AVX-512's estimate of a reciprocal root.
ESTIMATE = 2.0**-14


def estimate_error(beta: float, dtype: torch.dtype, backend: str) -> float:
    """What one estimate costs where a power is made of nothing else."""
    return ESTIMATE if (beta, dtype, backend) == (0.75, torch.bfloat16, "cpu-avx512") else 0.0


def lrn_bound(
    x: Tensor, arguments: tuple[Any, ...], dtype: torch.dtype, backend: str = ""
) -> Tensor:
    """s sums ``size`` positive squares and k: relative error (size + 2) eps; y = x s^-beta adds five roundings.

    An estimate of s^-1/2 enters s^-3/4 one and a half times, and the estimate of its root once. ``backend``: one of
    tests.support.backends.BACKENDS, or any that estimates nothing.
    """
    size, _, beta, _, _ = arguments
    expected = reference.lrn(x, *arguments)
    relative = (abs(beta) * (size + 2) + 5) * compute_eps(dtype)
    relative += 2.5 * estimate_error(beta, dtype, backend)
    return expected.abs() * relative + rounding(expected, dtype)


def lrn_backward_bound(
    g: Tensor,
    x: Tensor,
    arguments: tuple[Any, ...],
    dtype: torch.dtype,
    g_error: float = 0.0,
    backend: str = "",
) -> Tensor:
    """Relative to the sum of the terms' magnitudes: powers of s as above, ``size`` additions, eight roundings.

    1/s is the square of an estimate where s^-beta is made of estimates.
    ``g_error``: the relative error of g itself, where g is a magnitude that sums earlier terms.
    """
    size, scale, beta, k, groups = arguments
    s = _denominator_base(x, size, scale, k, groups)
    direct = g.abs() * s**-beta
    shared = _window_sum((direct * x / s).abs(), size - 1 - size // 2, size // 2, groups)
    magnitude = direct + 2 * abs(scale * beta) * x.abs() * shared
    relative = ((abs(beta) + 1) * (size + 2) + size + 8) * compute_eps(dtype)
    relative += (2.5 + 2) * estimate_error(beta, dtype, backend)
    return magnitude * (relative + g_error)


def sum_bound(magnitude: Tensor, summands: int, expected: Tensor, dtype: torch.dtype) -> Tensor:
    """A sum of products in any order: (summands + 2) eps of the magnitudes' sum, and the final rounding."""
    return magnitude * ((summands + 2) * compute_eps(dtype)) + rounding(expected, dtype)


#: What set_conv_precision promises of a convolution: error of the norm, and of any element, against the largest.
CONV_PRECISION = {"high": (1e-5, 5e-5), "medium": (1e-4, 5e-4)}


def assert_precision(actual: Tensor, expected: Tensor, level: str) -> None:
    """The documented bound of a precision level, plus the rounding of the result to its own dtype."""
    of_norm, of_largest = CONV_PRECISION[level]
    finite = expected.isfinite() & (expected.abs() < torch.finfo(actual.dtype).max)
    wide, right = actual.double()[finite], expected[finite]
    if right.numel() == 0:
        return
    round_off = rounding(right, actual.dtype)
    error = (wide - right).abs()
    assert error.norm() <= of_norm * right.norm() + round_off.norm()
    assert (error <= of_largest * right.abs().max() + round_off).all()
