"""The case table: shapes, geometry, layouts and dtypes that every backend is run over."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastalex import ops

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class LRN:
    """Arguments of local_response_norm on an input of ``shape``."""

    shape: tuple[int, ...]
    size: int = 5
    alpha: float = 0.3  # large enough that a wrong window shows in float16
    beta: float = 0.75
    k: float = 2.0
    groups: int = 1
    alpha_mode: str = "mean"

    def arguments(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "shape"}

    def operator_arguments(self) -> tuple[Any, ...]:
        scale = self.alpha / self.size if self.alpha_mode == "mean" else self.alpha
        return self.size, scale, self.beta, self.k, self.groups


@dataclass(frozen=True)
class Pool:
    """Arguments of max_pool2d on an input of ``shape``."""

    shape: tuple[int, ...]
    kernel_size: int | tuple[int, int] = 3
    stride: int | tuple[int, int] | None = 2
    padding: int | tuple[int, int] = 0
    dilation: int | tuple[int, int] = 1
    ceil_mode: bool = False

    def arguments(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "shape"}


@dataclass(frozen=True)
class Conv:
    """Arguments of conv2d_relu on an input of ``shape``."""

    shape: tuple[int, ...]
    outputs: int
    kernel: tuple[int, int] = (3, 3)
    stride: int | tuple[int, int] = 1
    padding: int | tuple[int, int] | str = 0
    dilation: int | tuple[int, int] = 1
    groups: int = 1
    bias: bool = True

    def arguments(self) -> dict[str, Any]:
        names = ("stride", "padding", "dilation", "groups")
        return {name: getattr(self, name) for name in names}

    def parameters(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Random weight [K, C / groups, R, S] and bias [K]."""
        shape = (self.outputs, self.shape[-3] // self.groups, *self.kernel)
        weight = torch.randn(shape, dtype=torch.float64).to(dtype)
        bias = torch.randn(self.outputs, dtype=torch.float64).to(dtype) if self.bias else None
        return weight, bias


@dataclass(frozen=True)
class Linear:
    """A linear_relu of an input [*rows, inputs]."""

    rows: tuple[int, ...]
    inputs: int
    outputs: int
    bias: bool = True

    def tensors(self, dtype: torch.dtype) -> list[Tensor]:
        """Random input, weight and bias."""
        shapes = ((*self.rows, self.inputs), (self.outputs, self.inputs), (self.outputs,))
        made = [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes]
        return made if self.bias else made[:2]


# Channel counts stand around the vector widths (4, 8, 16) and around n; plane sizes around the 512 of a work item.
LRN_CASES = (
    LRN((2, 96, 7, 9)),
    LRN((1, 96, 27, 27), groups=2),
    LRN((2, 17, 5, 3), size=3),
    LRN((3, 5, 4, 4), size=5),
    LRN((2, 3, 4, 5), size=5),  # fewer channels than the window
    LRN((2, 3, 4, 5), size=9),
    LRN((2, 1, 4, 5)),
    LRN((1, 33, 23, 23), size=4),  # even: not symmetric
    LRN((2, 12, 3, 3), size=2, groups=3),
    LRN((2, 12, 3, 3), size=6, groups=4),
    LRN((1, 20, 6, 6), size=1),
    LRN((1, 20, 6, 6), beta=0.5),
    LRN((1, 20, 6, 6), beta=1.0),
    LRN((1, 20, 6, 6), beta=0.6),
    LRN((1, 20, 6, 6), beta=0.75, alpha=1e-4, k=1.0, alpha_mode="sum"),
    LRN((2, 10, 600), size=5),
    LRN((2, 10, 1), size=5),
    LRN((2, 8, 3, 4, 5), size=5),
    LRN((0, 8, 3, 4)),
    LRN((2, 64, 1, 1), size=7),
)

POOL_CASES = (
    Pool((2, 17, 13, 13)),
    Pool((1, 5, 55, 55)),
    Pool((2, 3, 27, 40)),
    Pool((1, 4, 6, 7), ceil_mode=True),
    Pool((1, 4, 8, 8), ceil_mode=True),
    Pool((2, 5, 9, 9), kernel_size=3, stride=1, padding=1),
    Pool((2, 5, 37, 37), kernel_size=3, stride=2, padding=1),
    Pool((2, 5, 37, 35), kernel_size=3, stride=2, padding=1, ceil_mode=True),
    Pool((1, 33, 20, 21), kernel_size=2, stride=None),
    Pool((1, 7, 40, 41), kernel_size=(3, 2), stride=(2, 3), padding=(1, 0)),
    Pool((1, 7, 40, 41), kernel_size=3, stride=1, dilation=2),
    Pool((1, 6, 23, 50), kernel_size=(2, 3), stride=2, padding=(1, 1), dilation=(3, 2)),
    Pool((1, 2, 1, 1), kernel_size=1, stride=1),
    Pool((3, 2, 1, 9), kernel_size=(1, 3), stride=1),
    Pool((1, 2, 19, 19), kernel_size=17, stride=1),  # more than 256 elements: wide offsets
    Pool((1, 3, 40, 40), kernel_size=5, stride=4),
    Pool((0, 3, 9, 9)),
    # Dilated windows that step over the map: they hold padding alone.
    Pool((1, 2, 3, 9), kernel_size=2, stride=1, padding=1, dilation=4),
)

# AlexNet's own layers in small, and everything torch's conv2d takes.
CONV_CASES = (
    Conv((2, 3, 35, 35), 16, kernel=(11, 11), stride=4),
    Conv((1, 16, 13, 13), 32, kernel=(5, 5), padding=2, groups=2),
    Conv((2, 32, 9, 9), 48, padding=1),
    Conv((2, 24, 7, 8), 16, kernel=(1, 1)),
    Conv((2, 5, 9, 8), 7, kernel=(1, 1), stride=2, bias=False),
    Conv((1, 1, 5, 5), 1),
    Conv((3, 1, 1, 1), 3, kernel=(1, 1)),
    Conv((1, 7, 11, 6), 5, kernel=(2, 3), stride=(2, 1), padding=(1, 0)),
    Conv((2, 6, 10, 10), 9, padding=(2, 1), dilation=(2, 1), groups=3),
    Conv((1, 17, 12, 13), 19, dilation=2, bias=False),
    Conv((2, 12, 6, 6), 12, padding=1, groups=12),  # depthwise
    Conv((1, 4, 6, 6), 8, padding=1, groups=4),  # depthwise, two outputs a channel
    Conv((1, 8, 9, 9), 6, padding="same"),
    Conv((1, 8, 9, 7), 6, kernel=(4, 2), padding="same"),  # even: more padding after than before
    Conv((1, 8, 9, 9), 6, padding="valid", stride=2),
    Conv((1, 3, 4, 4), 5, padding=4),  # windows of padding alone
    Conv((1, 3, 3, 3), 33),  # one output pixel
    Conv((0, 3, 9, 9), 4),
    Conv((3, 9, 9), 4, padding=1),
)

# Rows, inputs and outputs stand around the register block, the vector and the 1024 inputs of a pass.
LINEAR_CASES = (
    Linear((1,), 9, 7),
    Linear((4,), 64, 96),
    Linear((5,), 1040, 13),
    Linear((33,), 47, 50, bias=False),
    Linear((130,), 33, 9),  # more rows than a job takes
    Linear((2, 3, 4), 17, 5),
    Linear((), 18, 4),
    Linear((3,), 1, 1),
    Linear((3,), 300, 600),  # more strips and blocks than one, in each gradient
    Linear((0,), 8, 3),
    Linear((2, 0), 8, 3),
    Linear((3,), 0, 4),
)

LAYOUTS = ("contiguous", "channels_last", "channel_slice", "row_slice", "expanded", "transposed")
# Rarer memory, which the random tests draw besides.
UNUSUAL_LAYOUTS = (
    "misaligned",
    "misaligned_channels_last",
    "overlapping",
    "one_channel",
    "swapped",
    "negated",
)
# Of matrices and of vectors.
MATRIX_LAYOUTS = ("contiguous", "row_slice", "expanded", "misaligned", "overlapping", "swapped")
VECTOR_LAYOUTS = ("contiguous", "row_slice", "expanded", "misaligned", "negated")


def lay_out(values: Tensor, layout: str) -> Tensor:
    """The same values in memory laid out otherwise; repeated where memory is."""
    if values.dim() < 2 and layout in ("overlapping", "one_channel", "swapped"):
        layout = "contiguous"
    if layout == "contiguous" or (values.dim() < 4 and layout in ("channels_last", "transposed")):
        return values.contiguous()
    if layout == "channels_last":
        format = torch.channels_last if values.dim() == 4 else torch.channels_last_3d
        return values.contiguous(memory_format=format)
    if layout == "channel_slice":
        wide = lay_out(values.repeat(1, 2, *(1,) * (values.dim() - 2)), "channels_last")
        wide[:, values.shape[1] :] = float("nan")
        return wide[:, : values.shape[1]]
    if layout == "row_slice":
        wide = values.repeat_interleave(2, dim=-1)
        return wide[..., ::2]
    if layout == "expanded":
        return values[:1].expand(values.shape) if values.shape[0] > 1 else values
    if layout.startswith("misaligned"):  # one element past where the allocator begins
        plain = lay_out(
            values, layout.removeprefix("misaligned_").replace("misaligned", "contiguous")
        )
        filler = float("nan") if plain.is_floating_point() else 0
        buffer = plain.new_full((plain.numel() + 1,), filler)[1:]
        return buffer.as_strided(plain.shape, plain.stride(), 1).copy_(plain)
    if layout == "overlapping":  # each row begins on the last element of the one before
        width = max(values.shape[-1] - 1, 1)
        strides = [*values.stride()[:-2], width, 1]
        return values.contiguous().as_strided(values.shape, strides)
    if layout == "one_channel":
        return values[:, :1].expand(values.shape)
    if layout == "swapped":  # channels outermost in memory
        return values.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "negated":  # memory holds the opposite, and torch's lazy minus sign
        return torch._neg_view(-values)
    assert layout == "transposed"
    return values.transpose(-1, -2).contiguous().transpose(-1, -2)


def random_input(shape: tuple[int, ...], dtype: torch.dtype, layout: str = "contiguous") -> Tensor:
    """Normal values rounded to quarters where ties matter less than exact comparisons do."""
    return lay_out(torch.randn(shape, dtype=torch.float64).to(dtype), layout)


def with_specials(values: Tensor) -> Tensor:
    """NaN, infinities, signed zeros and ties sprinkled over the values."""
    flat = values.flatten().clone()
    for start, special in enumerate(
        (float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1.0, 1.0)
    ):
        flat[start::13] = special
    return flat.view(values.shape)


def conv_layer(dtype=torch.float32):
    """A layer large enough for every engine, and an input."""
    layer = ops.Conv2dReLU(16, 32, 3, padding=1).to(dtype)
    return layer, torch.randn(2, 16, 20, 20).to(dtype)
