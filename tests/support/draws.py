"""What random calls are drawn from: shapes, geometry, memory layouts, dtypes, and how many of them."""

from __future__ import annotations

import os
from typing import Any

import torch
from hypothesis import HealthCheck, assume, settings
from hypothesis import strategies as st
from torch import Tensor

from fastalex._geometry import is_channels_last, pooled_size
from tests.support.cases import (
    DTYPES,
    LAYOUTS,
    MATRIX_LAYOUTS,
    UNUSUAL_LAYOUTS,
    VECTOR_LAYOUTS,
    lay_out,
)

#: Many more: FASTALEX_EXAMPLES=20000.
examples = settings(
    max_examples=int(os.environ.get("FASTALEX_EXAMPLES", "300")),
    deadline=None,
    print_blob=True,
    database=None,
    # The autouse fixtures only set what every example may share.
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

layouts = st.sampled_from(LAYOUTS + UNUSUAL_LAYOUTS)
matrix_layouts = st.sampled_from(MATRIX_LAYOUTS)
vector_layouts = st.sampled_from(VECTOR_LAYOUTS)
dtypes = st.sampled_from(DTYPES)
conv_dtypes = st.sampled_from((torch.float32, torch.bfloat16, torch.float16))
seeds = st.integers(0, 2**31)


def numbers(shape: tuple[int, ...], dtype: torch.dtype, layout: str, seed: int) -> Tensor:
    """Normal values, drawn by hypothesis through their seed alone: shrinking them explains nothing."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, dtype=torch.float64, generator=generator)
    return lay_out(values.to(dtype), layout)


@st.composite
def lrn_arguments(draw: st.DrawFn) -> tuple[int, tuple[int, float, float, float, int]]:
    """Channels, which groups divide, and (size, scale, beta, k, groups) with k + scale * squares away from zero."""
    groups = draw(st.sampled_from((1, 1, 2, 3, 4)))
    channels = groups * draw(st.one_of(st.integers(1, 9), st.integers(10, 70)))
    size = draw(st.one_of(st.just(5), st.integers(1, 12)))
    scale = draw(st.sampled_from((0.0, 2e-5, 0.06, 0.5)))
    beta = draw(st.sampled_from((0.5, 0.75, 1.0, 0.0, 0.6, 2.0)))
    k = draw(st.sampled_from((1.0, 2.0, 0.5)))
    return channels, (size, scale, beta, k, groups)


@st.composite
def pooled_dimension(draw: st.DrawFn, ceil_mode: bool, dilated: bool) -> tuple[int, ...]:
    """(input size, kernel, stride, padding, dilation) with room for a window."""
    kernel = draw(st.one_of(st.just(3), st.integers(1, 7), st.just(17)))
    stride = draw(st.integers(1, 5))
    padding = draw(st.integers(0, kernel // 2))
    dilation = draw(st.integers(1, 3)) if dilated else 1
    size = draw(st.integers(1, 40))
    assume(pooled_size(size, kernel, stride, padding, dilation, ceil_mode) >= 1)
    return size, kernel, stride, padding, dilation


@st.composite
def pools(draw: st.DrawFn, dilated: bool) -> tuple[Any, ...]:
    """((height, width), kernel, stride, padding, dilation, ceil_mode), each pair (height, width)."""
    ceil_mode = draw(st.booleans())
    both = [draw(pooled_dimension(ceil_mode, dilated)) for _ in range(2)]
    return *zip(*both, strict=True), ceil_mode


def assert_laid_out_as(result: Tensor, like: Tensor) -> None:
    if is_channels_last(like):
        assert result.is_contiguous(memory_format=torch.channels_last)
    elif like.is_contiguous():
        assert result.is_contiguous()
