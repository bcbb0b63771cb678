"""Tolerances of the Triton tests, derived: what float32 sums may lose, and half an ulp of the
result's type.
"""

from __future__ import annotations

import torch
from torch import Tensor

EPS32 = torch.finfo(torch.float32).eps
FUNCTIONS = 8  # ulps of float32 that two roots and a few products may lose together


def assert_within(
    found: Tensor, expected: Tensor, summands: int, magnitude: Tensor | None = None
) -> None:
    """|found - expected| <= summands x eps(float32) x magnitude + half an ulp of found's type.

    magnitude is the sum of the summands' absolute values, by default |expected|. A NaN must be
    where it is expected.
    """
    info = torch.finfo(found.dtype)
    expected = expected.double()
    magnitude = expected.abs() if magnitude is None else magnitude.double()
    bound = (
        summands * EPS32 * magnitude
        + info.eps / 2 * expected.abs()
        + info.smallest_normal * info.eps
    )
    if found.dtype == torch.float32:
        bound = bound + EPS32 * expected.abs()
    wrong_nan = found.isnan() != expected.isnan()
    error = (found.double() - expected).abs() - bound
    assert not wrong_nan.any(), f"{int(wrong_nan.sum())} NaN differ"
    worst = error.nan_to_num(-1.0).max().item() if error.numel() else -1.0
    assert worst <= 0, f"off by {worst:.3g} more than allowed"
