"""The geometry of a convolution, and the choice of how a kernel walks its products."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ._layout import Strides


@dataclass(frozen=True)
class Conv:
    """One convolution's shape but for the batch; compiled in, so that every division is by a
    constant.
    """

    rows: int
    columns: int
    out_rows: int
    out_columns: int
    r: int
    s: int
    sh: int
    sw: int
    ph: int
    pw: int
    dh: int
    dw: int
    groups: int
    inputs: int  # channels of one group
    outputs: int

    @property
    def out_pixels(self) -> int:
        return self.out_rows * self.out_columns

    @property
    def out_channels(self) -> int:
        return self.groups * self.outputs

    @property
    def weights(self) -> int:
        return self.out_channels * self.products

    @property
    def products(self) -> int:
        """Multiply-adds of one output: the length of the K axis."""
        return self.r * self.s * self.inputs

    @property
    def inside(self) -> bool:
        """Whether no tap ever falls outside the image."""
        return (
            self.ph == self.pw == 0
            and (self.out_rows - 1) * self.sh + (self.r - 1) * self.dh < self.rows
            and (self.out_columns - 1) * self.sw + (self.s - 1) * self.dw < self.columns
        )

    @property
    def row_step(self) -> int:
        """Between the kernel rows that reach a given input row."""
        return self.sh // math.gcd(self.sh, self.dh)

    @property
    def column_step(self) -> int:
        return self.sw // math.gcd(self.sw, self.dw)


def geometry(input_size, weight: Tensor, stride, padding, dilation, groups: int) -> Conv:
    o, inputs, r, s = weight.shape
    (h, w), kernel = input_size, (r, s)
    out = [
        (n + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1
        for i, n in enumerate((h, w))
    ]
    return Conv(h, w, *out, r, s, *stride, *padding, *dilation, groups, inputs, o // groups)


def refuse_conv(
    input: Tensor, weight: Tensor, bias, stride, padding, dilation, groups: int
) -> str | None:
    if weight.dim() != 4:
        return f"the weight has {weight.dim()} axes, not 4: give it as [O, C / groups, R, S]"
    if groups < 1 or input.shape[1] != weight.shape[1] * groups or weight.shape[0] % groups:
        channels = input.shape[1]
        return (
            f"{channels} channels and a weight of {tuple(weight.shape)} don't fit {groups} groups"
        )
    if input.dtype != weight.dtype or (bias is not None and bias.dtype != weight.dtype):
        return f"input {input.dtype}, weight {weight.dtype} and bias differ: cast them to one type"
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        return f"a bias of {tuple(bias.shape)} doesn't belong to {weight.shape[0]} output channels"
    if weight.numel() >= 2**31:
        return f"a weight of {weight.numel()} values has offsets beyond 2^31, which it is not read with"
    if min(*stride, *dilation) < 1 or min(padding) < 0:
        return "stride and dilation must be positive, padding not negative"
    conv = geometry(input.shape[2:], weight, stride, padding, dilation, groups)
    if min(conv.out_rows, conv.out_columns) < 1:
        sizes = tuple(input.shape[2:]), tuple(weight.shape[2:])
        return f"a map of {sizes[0]} is smaller than the kernel {sizes[1]}"
    return None


def float32_precision() -> str:
    """How torch is told to multiply float32 in convolutions: "tf32" or "ieee"."""
    settings = (torch.backends.cudnn.conv, torch.backends.cudnn, torch.backends)
    told = next((s.fp32_precision for s in settings if s.fp32_precision != "none"), "ieee")
    return "tf32" if told == "tf32" else "ieee"


def packed_products(conv: Conv, scheme: str, bk: int) -> tuple[int, int]:
    """(products walked in whole blocks of bk, all of them with the padding the last block or the rows' tail takes)."""
    if scheme != "rows":
        return conv.products, -(-conv.products // bk) * bk
    body = conv.r * (conv.s * conv.inputs // bk * bk)
    rest = conv.products - body
    return body, body + (max(1 << (rest - 1).bit_length(), 16) if rest else 0)


def forward_scheme(conv: Conv, s: Strides, itemsize: int) -> str:
    """How the forward kernel walks K; the wasted products of each are in conv_relu.py."""
    if s.channel != 1:
        return "planes"
    run = conv.s * conv.inputs
    if (
        conv.groups == 1
        and conv.dw == 1
        and s.column == conv.inputs
        and conv.inputs <= 4
        and run >= 32
    ):
        return "rows"
    if conv.inputs % (128 // itemsize) == 0:
        return "taps"
    return "flat"
