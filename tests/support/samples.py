"""One small call of every operator, with its public function, its stock twin and its layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastalex import ops


@dataclass(frozen=True)
class Sample:
    """``function(*tensors, **arguments)`` runs ``name``; so does its operator on ``positional``."""

    name: str
    function: Callable[..., Any]
    stock: Callable[..., Any]
    layer: Callable[[], nn.Module]
    stock_layer: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...]
    arguments: dict[str, Any]
    positional: tuple[Any, ...]
    saves_offsets: bool = False

    def tensors(
        self, dtype: torch.dtype, layout: str = "contiguous", **kwargs: Any
    ) -> list[Tensor]:
        """Values far apart, so that neither a tie nor ReLU's kink lies within gradcheck's step."""
        made = [distinct(shape, dtype) for shape in self.shapes]
        if layout == "channels_last":
            made[0] = made[0].contiguous(memory_format=torch.channels_last)
        return [tensor.to(**kwargs) if kwargs else tensor for tensor in made]

    def call(self, *tensors: Tensor) -> Any:
        return self.function(*tensors, **self.arguments)

    def call_stock(self, *tensors: Tensor) -> Any:
        return self.stock(*tensors, **self.arguments)


def distinct(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A shuffled grid over [-2, 2] without zero."""
    count = torch.Size(shape).numel()
    steps = torch.randperm(count, dtype=torch.float64) + 0.5
    return ((steps / count - 0.5) * 4).view(shape).to(dtype)


def stock_lrn_max_pool(
    x: Tensor, size: int, alpha: float, beta: float, k: float, kernel_size: int, stride: int
) -> Tensor:
    return F.max_pool2d(F.local_response_norm(x, size, alpha, beta, k), kernel_size, stride)


def stock_conv_relu(*tensors: Tensor, **arguments: Any) -> Tensor:
    return F.relu(F.conv2d(*tensors, **arguments))


def stock_conv_relu_max_pool(
    *tensors: Tensor, padding: int, groups: int, pool_size: int, pool_stride: int
) -> Tensor:
    map = F.relu(F.conv2d(*tensors, padding=padding, groups=groups))
    return F.max_pool2d(map, pool_size, pool_stride)


def stock_conv_relu_lrn_max_pool(
    *tensors: Tensor, padding: int, groups: int, pool_size: int, pool_stride: int, **lrn: Any
) -> Tensor:
    map = F.relu(F.conv2d(*tensors, padding=padding, groups=groups))
    return stock_lrn_max_pool(map, **lrn, kernel_size=pool_size, stride=pool_stride)


def stock_linear_relu(*tensors: Tensor) -> Tensor:
    return F.relu(F.linear(*tensors))


_LRN = {"size": 3, "alpha": 0.3, "beta": 0.75, "k": 2.0}
_SCALE = 0.3 / 3

SAMPLES = {
    sample.name: sample
    for sample in (
        Sample(
            "lrn",
            ops.local_response_norm,
            F.local_response_norm,
            lambda: ops.LocalResponseNorm(**_LRN),
            lambda: nn.LocalResponseNorm(**_LRN),
            ((2, 5, 3, 4),),
            _LRN,
            (3, _SCALE, 0.75, 2.0, 1),
        ),
        Sample(
            "max_pool",
            ops.max_pool2d,
            F.max_pool2d,
            lambda: ops.MaxPool2d(3, 2, 1),
            lambda: nn.MaxPool2d(3, 2, 1),
            ((2, 3, 5, 6),),
            {"kernel_size": 3, "stride": 2, "padding": 1},
            ((3, 3), (2, 2), (1, 1), (1, 1), False, True),
            saves_offsets=True,
        ),
        Sample(
            "lrn_max_pool",
            ops.lrn_max_pool2d,
            stock_lrn_max_pool,
            lambda: ops.LRNMaxPool2d(**_LRN, kernel_size=3, stride=2),
            lambda: nn.Sequential(nn.LocalResponseNorm(**_LRN), nn.MaxPool2d(3, 2)),
            ((2, 4, 5, 6),),
            {**_LRN, "kernel_size": 3, "stride": 2},
            (3, _SCALE, 0.75, 2.0, 1, (3, 3), (2, 2), (0, 0), False, True),
            saves_offsets=True,
        ),
        Sample(
            "conv_relu",
            ops.conv2d_relu,
            stock_conv_relu,
            lambda: ops.Conv2dReLU(18, 2, (2, 3), padding=1, groups=2),
            lambda: nn.Sequential(nn.Conv2d(18, 2, (2, 3), padding=1, groups=2), nn.ReLU()),
            ((2, 18, 2, 3), (2, 9, 2, 3), (2,)),
            {"padding": 1, "groups": 2},
            ((1, 1), (1, 1), (1, 1), 2),
        ),
        Sample(
            "conv_relu_max_pool",
            ops.conv2d_relu_max_pool2d,
            stock_conv_relu_max_pool,
            lambda: ops.FusedSequential(
                ops.Conv2dReLU(18, 2, (2, 3), padding=1, groups=2), ops.MaxPool2d(2, 1)
            ),
            lambda: nn.Sequential(
                nn.Conv2d(18, 2, (2, 3), padding=1, groups=2), nn.ReLU(), nn.MaxPool2d(2, 1)
            ),
            ((2, 18, 2, 3), (2, 9, 2, 3), (2,)),
            {"padding": 1, "groups": 2, "pool_size": 2, "pool_stride": 1},
            ((1, 1), (1, 1), (1, 1), 2, (2, 2), (1, 1), (0, 0), False),
        ),
        Sample(
            "conv_relu_lrn_max_pool",
            ops.conv2d_relu_lrn_max_pool2d,
            stock_conv_relu_lrn_max_pool,
            lambda: ops.FusedSequential(
                ops.Conv2dReLU(18, 2, (2, 3), padding=1, groups=2),
                ops.LRNMaxPool2d(**_LRN, kernel_size=2, stride=1),
            ),
            lambda: nn.Sequential(
                nn.Conv2d(18, 2, (2, 3), padding=1, groups=2),
                nn.ReLU(),
                nn.LocalResponseNorm(**_LRN),
                nn.MaxPool2d(2, 1),
            ),
            ((2, 18, 2, 3), (2, 9, 2, 3), (2,)),
            {"padding": 1, "groups": 2, **_LRN, "pool_size": 2, "pool_stride": 1},
            (
                *((1, 1), (1, 1), (1, 1), 2, 3, _SCALE, 0.75, 2.0, 1),
                *((2, 2), (1, 1), (0, 0), False),
            ),
        ),
        Sample(
            "linear_relu",
            ops.linear_relu,
            stock_linear_relu,
            lambda: ops.LinearReLU(4, 6),
            lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU()),
            ((2, 3, 3, 4), (6, 4), (6,)),
            {},
            (True,),
        ),
    )
}
FORWARD = sorted(SAMPLES)
#: In one pass at inference; their gradients are those of the operators they are made of.
COMPOSED = ["conv_relu_lrn_max_pool", "conv_relu_max_pool"]


def strides(tensor: torch.Tensor) -> list[int]:
    """Strides that mean something: those of dims with more than one element."""
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    return [stride for size, stride in pairs if size > 1 and tensor.numel()]
