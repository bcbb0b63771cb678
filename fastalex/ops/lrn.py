"""Local response normalization across channels: ``local_response_norm`` and the layer ``LocalResponseNorm``."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastalex import reference
from fastalex._geometry import empty_in_layout
from fastalex.backends import no_refusal
from fastalex.ops import _cpu, _cuda, _torch, _triton
from fastalex.ops._arguments import lrn_scale, require_floating
from fastalex.ops._operator import Operator

_ARGUMENTS = "int size, float scale, float beta, float k, int groups"


def _like_input(input: Tensor, *arguments: Any) -> Tensor:
    return empty_in_layout(input, input.shape)


def _like_second(grad: Tensor, input: Tensor, *arguments: Any) -> Tensor:
    return empty_in_layout(input, input.shape)


LRN = Operator(f"lrn(Tensor input, {_ARGUMENTS}) -> Tensor", _like_input)
LRN_BACKWARD = Operator(
    f"lrn_backward(Tensor grad, Tensor input, {_ARGUMENTS}) -> Tensor", _like_second
)

_native_lrn = _cpu.native("lrn")
_native_lrn_backward = _cpu.native("lrn_backward")


def _cpu_lrn(input: Tensor, *arguments: Any) -> Tensor:
    return _native_lrn(input, _cpu.numbers(*arguments))  # type: ignore[no-any-return]


def _cpu_lrn_backward(grad: Tensor, input: Tensor, *arguments: Any) -> Tensor:
    return _native_lrn_backward(grad, input, _cpu.numbers(*arguments))  # type: ignore[no-any-return]


LRN.kernels.add("torch", _torch.in_layout(reference.lrn, 0), no_refusal)
LRN_BACKWARD.kernels.add("torch", _torch.in_layout(reference.lrn_backward, 1), no_refusal)
LRN.kernels.add("cpu", _cpu_lrn, _cpu.refuse)
LRN_BACKWARD.kernels.add("cpu", _cpu_lrn_backward, _cpu.refuse)
LRN.kernels.add("triton", **_triton.kernel("lrn", "lrn"))
LRN_BACKWARD.kernels.add("triton", **_triton.kernel("lrn", "lrn_backward"))
_cuda.add_to(LRN, LRN_BACKWARD)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])
    ctx.arguments = inputs[1:]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (input,) = ctx.saved_tensors
    return LRN_BACKWARD(grad, input, *ctx.arguments), *(None,) * len(ctx.arguments)


LRN.register_autograd(_backward, _save)
LRN.register_vmap([0])
LRN_BACKWARD.differentiate_reference(reference.lrn_backward, tensors=[0, 1])
LRN_BACKWARD.register_vmap([0, 1])


def local_response_norm(
    input: Tensor,
    size: int,
    alpha: float = 1e-4,
    beta: float = 0.75,
    k: float = 1.0,
    *,
    groups: int = 1,
    alpha_mode: str = "mean",
) -> Tensor:
    r"""Local response normalization across channels; stands in for :func:`torch.nn.functional.local_response_norm`.

    .. math:: y_c = x_c \Bigl(k + s \sum_{j} x_j^2\Bigr)^{-\beta}

    over the ``size`` channels j in [c - size // 2, c + (size - 1) // 2] that lie in c's group; s is alpha / size in
    mode ``"mean"`` (torch, Caffe, cuDNN, cuda-convnet2) and alpha in mode ``"sum"`` (section 3.3 of the AlexNet
    paper as printed). float16 and bfloat16 accumulate in float32. Saves ``input`` alone for the backward pass.

    Args:
        input: [N, C, ...], float32, float64, bfloat16 or float16; contiguous and channels_last are both served
            in place, and the result has the same layout.
        size: channels in a window, any positive number.
        alpha: weight of the squares.
        beta: exponent; 0.75, 0.5 and 1 have fast paths on the CPU.
        k: added to the weighted sum.
        groups: channels are normalised inside each of ``groups`` equal groups (the towers of the two-GPU net).
        alpha_mode: ``"mean"`` or ``"sum"``.

    Returns:
        A tensor of ``input``'s shape, dtype and layout.

    Raises:
        TypeError: for an input that is not floating point.
        ValueError: for fewer than three dimensions, a non-positive size, groups that don't divide the channels, or
            an unknown alpha_mode.

    Scratch on a CPU, forward or backward: at most 512 (3 size + 4) + 4 (C + 2 size) numbers a thread, in float64 for
    float64 and in float32 else. An input that is neither contiguous nor channels_last is copied once, and so is a
    gradient that differs from its input in that.
    """
    name = "local_response_norm"
    require_floating(input, name)
    scale = lrn_scale(input.shape, size, alpha, beta, k, groups, alpha_mode, name)
    return LRN(input, size, scale, beta, k, groups)  # type: ignore[no-any-return]


class LocalResponseNorm(nn.LocalResponseNorm):
    """:class:`torch.nn.LocalResponseNorm` on :func:`local_response_norm`, with ``groups`` and ``alpha_mode``."""

    def __init__(
        self,
        size: int,
        alpha: float = 1e-4,
        beta: float = 0.75,
        k: float = 1.0,
        *,
        groups: int = 1,
        alpha_mode: str = "mean",
    ) -> None:
        super().__init__(size, alpha, beta, k)
        self.groups = groups
        self.alpha_mode = alpha_mode

    def forward(self, input: Tensor) -> Tensor:
        return local_response_norm(
            input,
            self.size,
            self.alpha,
            self.beta,
            self.k,
            groups=self.groups,
            alpha_mode=self.alpha_mode,
        )

    def extra_repr(self) -> str:
        text: str = nn.LocalResponseNorm.extra_repr(self)
        if self.groups != 1:
            text += f", groups={self.groups}"
        if self.alpha_mode != "mean":
            text += f", alpha_mode={self.alpha_mode!r}"
        return text
