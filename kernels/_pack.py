"""A convolution's weight as the matrix its forward kernel walks, packed only where it isn't one already."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _layout as layout
from ._conv import Conv, packed_products


@triton.jit(do_not_specialize=["length"])
def pack_weights(
    w,
    packed,
    length,
    WS: tl.constexpr,
    CONV: tl.constexpr,
    PITCH: tl.constexpr,
    BODY: tl.constexpr,
    SCHEME: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """packed [O, PITCH] from w [O, C/groups, R, S] by strides WS, in the order SCHEME walks K; zero
    beyond the last.
    """
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    k = at % PITCH
    if SCHEME == "rows":
        RUN: tl.constexpr = CONV.s * CONV.inputs
        REST: tl.constexpr = max(RUN - BODY // CONV.r, 1)
        r = tl.where(k < BODY, k // max(BODY // CONV.r, 1), (k - BODY) // REST)
        j = tl.where(k < BODY, k % max(BODY // CONV.r, 1), BODY // CONV.r + (k - BODY) % REST)
        s = j // CONV.inputs
        c = j % CONV.inputs
    elif SCHEME == "planes":
        c = k // (CONV.r * CONV.s)
        r = k // CONV.s % CONV.r
        s = k % CONV.s
    else:
        r = k // CONV.inputs // CONV.s
        s = k // CONV.inputs % CONV.s
        c = k % CONV.inputs
    ok = (at < length) & (r < CONV.r)
    value = tl.load(
        w + at // PITCH * WS.image + c * WS.channel + r * WS.row + s * WS.column, mask=ok, other=0.0
    )
    tl.store(packed + at, value, mask=at < length)


def weight_matrix(w: Tensor, conv: Conv, scheme: str, bk: int) -> tuple[Tensor, int]:
    """(w as [O, pitch] in the scheme's order, pitch): w itself where it already is, else packed by
    one launch.
    """
    pitch = body = conv.products
    if scheme == "rows":
        body, pitch = packed_products(conv, scheme, bk)
    elif w.is_contiguous(memory_format=layout.memory_format(scheme != "planes")):
        return w, pitch
    packed = torch.empty((w.shape[0], pitch), dtype=w.dtype, device=w.device)
    block = 1024
    pack_weights[(triton.cdiv(packed.numel(), block),)](
        w, packed, packed.numel(), layout.strides(w), conv, pitch, body, scheme, block
    )
    return packed, pitch
