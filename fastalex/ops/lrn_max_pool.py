"""LRN and max-pooling in one pass: ``lrn_max_pool2d`` and the layer ``LRNMaxPool2d``."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastalex import reference
from fastalex._geometry import empty_in_layout
from fastalex.backends import no_refusal
from fastalex.ops import _cpu, _cuda, _torch, _triton
from fastalex.ops._arguments import Pair, lrn_scale, require_floating
from fastalex.ops._operator import Operator, gradients_may_follow
from fastalex.ops.lrn import LRN
from fastalex.ops.max_pool import fake_pool, max_pool2d, pool_geometry

_LRN = "int size, float scale, float beta, float k, int groups"
_POOL = "int[2] kernel_size, int[2] stride, int[2] padding"


def _fake(
    input: Tensor,
    size: int,
    scale: float,
    beta: float,
    k: float,
    groups: int,
    kernel_size: Pair,
    stride: Pair,
    padding: Pair,
    ceil_mode: bool,
    save_offsets: bool,
) -> tuple[Tensor, Tensor]:
    return fake_pool(input, (kernel_size, stride, padding, (1, 1)), ceil_mode, save_offsets)


def _fake_backward(grad: Tensor, input: Tensor, *arguments: Any) -> Tensor:
    return empty_in_layout(input, input.shape)


LRN_MAX_POOL = Operator(
    f"lrn_max_pool(Tensor input, {_LRN}, {_POOL}, bool ceil_mode, bool save_offsets) "
    "-> (Tensor, Tensor)",
    _fake,
)
LRN_MAX_POOL_BACKWARD = Operator(
    f"lrn_max_pool_backward(Tensor grad, Tensor input, Tensor offsets, {_LRN}, {_POOL}) -> Tensor",
    _fake_backward,
)

_native_lrn_max_pool = _cpu.native("lrn_max_pool")
_native_lrn_max_pool_inference = _cpu.native("lrn_max_pool_inference")
_native_lrn_max_pool_backward = _cpu.native("lrn_max_pool_backward")


def _cpu_lrn_max_pool(
    input: Tensor,
    size: int,
    scale: float,
    beta: float,
    k: float,
    groups: int,
    kernel_size: Pair,
    stride: Pair,
    padding: Pair,
    ceil_mode: bool,
    save_offsets: bool,
) -> tuple[Tensor, Tensor]:
    numbers = _cpu.numbers(
        size, scale, beta, k, groups, kernel_size, stride, padding, (1, 1), ceil_mode
    )
    if save_offsets:
        return _native_lrn_max_pool(input, numbers)  # type: ignore[no-any-return]
    return _native_lrn_max_pool_inference(input, numbers), _cpu.NOTHING


def _cpu_lrn_max_pool_backward(
    grad: Tensor, input: Tensor, offsets: Tensor, *arguments: Any
) -> Tensor:
    numbers = _cpu.numbers(*arguments, (1, 1))
    return _native_lrn_max_pool_backward(grad, input, offsets, numbers)  # type: ignore[no-any-return]


LRN_MAX_POOL.kernels.add("torch", _torch.in_layout(reference.lrn_max_pool, 0), no_refusal)
LRN_MAX_POOL_BACKWARD.kernels.add(
    "torch", _torch.in_layout(reference.lrn_max_pool_backward, 1), no_refusal
)
LRN_MAX_POOL.kernels.add("cpu", _cpu_lrn_max_pool, _cpu.refuse)
LRN_MAX_POOL_BACKWARD.kernels.add("cpu", _cpu_lrn_max_pool_backward, _cpu.refuse)
LRN_MAX_POOL.kernels.add("triton", **_triton.kernel("lrn_max_pool", "lrn_max_pool"))
LRN_MAX_POOL_BACKWARD.kernels.add(
    "triton", **_triton.kernel("lrn_max_pool", "lrn_max_pool_backward", masks=True)
)
_cuda.add_to(LRN_MAX_POOL, LRN_MAX_POOL_BACKWARD)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    input, *arguments, _, save_offsets = inputs
    ctx.arguments = arguments
    ctx.save_for_backward(input, output[1] if save_offsets else None)


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    input, offsets = ctx.saved_tensors
    if offsets is None:
        raise RuntimeError("lrn_max_pool ran with save_offsets=False, so it has no gradient")
    gradient = LRN_MAX_POOL_BACKWARD(grad, input, offsets, *ctx.arguments)
    return gradient, *(None,) * 10


LRN_MAX_POOL.register_autograd(_backward, _save, beside=True)
LRN_MAX_POOL.register_vmap([0])
LRN_MAX_POOL_BACKWARD.differentiate_reference(reference.lrn_max_pool_backward, tensors=[0, 1])
LRN_MAX_POOL_BACKWARD.register_vmap([0, 1, 2])


def lrn_max_pool2d(
    input: Tensor,
    size: int,
    alpha: float = 1e-4,
    beta: float = 0.75,
    k: float = 1.0,
    kernel_size: int | Pair = 3,
    stride: int | Pair | None = 2,
    padding: int | Pair = 0,
    ceil_mode: bool = False,
    *,
    groups: int = 1,
    alpha_mode: str = "mean",
) -> Tensor:
    """``max_pool2d(local_response_norm(input, ...), ...)`` in one pass over memory.

    Reads the input once and writes the output once: the normalised map, four times the output, never reaches memory.
    Equal bit for bit to the two operators in turn on the same backend. Saves ``input`` and one byte an output for
    the backward pass.

    Args:
        input: [N, C, H, W]. The two stock layers read three dimensions differently, normalisation as [N, C, L] and
            pooling as [C, H, W]; so does this, as the two operators in turn.
        size, alpha, beta, k, groups, alpha_mode: as in :func:`local_response_norm`.
        kernel_size, stride, padding, ceil_mode: as in :func:`max_pool2d`.

    Returns:
        The output [N, C, OH, OW], in the input's dtype and layout.

    Raises:
        TypeError, ValueError: as the two operators.

    Scratch on a CPU, forward or backward: what the two hold but for a plane, and a band of at most
    max(128 Ki, kernel_size C W) numbers a thread, in float64 for float64 and in float32 or narrower else.
    """
    name = "lrn_max_pool2d"
    require_floating(input, name)
    geometry = pool_geometry(input.shape, kernel_size, stride, padding, 1, ceil_mode, name)
    scale = lrn_scale(input.shape, size, alpha, beta, k, groups, alpha_mode, name)
    if input.dim() == 3:
        normalised: Tensor = LRN(input, size, scale, beta, k, groups)
        return max_pool2d(normalised, *geometry, ceil_mode)  # type: ignore[return-value]
    save = gradients_may_follow(input)
    output, _ = LRN_MAX_POOL(input, size, scale, beta, k, groups, *geometry[:3], ceil_mode, save)
    return output  # type: ignore[no-any-return]


class LRNMaxPool2d(nn.Module):
    """:func:`lrn_max_pool2d` as a layer: ``LocalResponseNorm`` followed by ``MaxPool2d``."""

    def __init__(
        self,
        size: int,
        alpha: float = 1e-4,
        beta: float = 0.75,
        k: float = 1.0,
        kernel_size: int | Pair = 3,
        stride: int | Pair | None = 2,
        padding: int | Pair = 0,
        ceil_mode: bool = False,
        *,
        groups: int = 1,
        alpha_mode: str = "mean",
    ) -> None:
        super().__init__()
        self.size = size
        self.alpha = alpha
        self.beta = beta
        self.k = k
        self.kernel_size = kernel_size
        self.stride = kernel_size if stride is None else stride
        self.padding = padding
        self.ceil_mode = ceil_mode
        self.groups = groups
        self.alpha_mode = alpha_mode

    def forward(self, input: Tensor) -> Tensor:
        return lrn_max_pool2d(
            input,
            self.size,
            self.alpha,
            self.beta,
            self.k,
            self.kernel_size,
            self.stride,
            self.padding,
            self.ceil_mode,
            groups=self.groups,
            alpha_mode=self.alpha_mode,
        )

    def extra_repr(self) -> str:
        return (
            f"{self.size}, alpha={self.alpha}, beta={self.beta}, k={self.k}, "
            f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}, "
            f"ceil_mode={self.ceil_mode}, groups={self.groups}, alpha_mode={self.alpha_mode!r}"
        )
