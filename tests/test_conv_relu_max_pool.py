"""Convolution, ReLU, LRN and max-pooling in one pass: bit for bit the operators in turn."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import nn

import fastalex
from fastalex import models, ops
from fastalex.ops.conv_relu_max_pool import CONV_RELU_LRN_MAX_POOL, CONV_RELU_MAX_POOL
from tests.support.backends import BACKENDS, conv_precision, running
from tests.support.cases import random_input

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = ("contiguous", "channels_last", "channel_slice")
# input, (filters, channels, kernel), conv's stride, padding, dilation, groups; the pool; LRN's groups
CASES = {
    "conv1": ((5, 3, 43, 43), (96, 3, 11, 11), (4, 0, 1, 1), {}, 2),
    "conv2": ((6, 32, 13, 13), (64, 16, 5, 5), (1, 2, 1, 2), {}, 2),
    "conv5": ((4, 48, 13, 13), (32, 24, 3, 3), (1, 1, 1, 2), {}, 1),
    "vgg": ((4, 16, 12, 14), (24, 16, 3, 3), (1, 1, 1, 1), {"pool_size": 2}, 3),
    "odd": ((7, 5, 9, 11), (7, 5, 3, 2), ((2, 1), (1, 0), (1, 2), 1), {"pool_padding": 1}, 1),
    "ceil": ((3, 8, 10, 10), (12, 8, 1, 1), (1, 0, 1, 1), {"ceil_mode": True}, 1),
    "one": ((1, 8, 27, 27), (16, 8, 3, 3), (1, 1, 1, 1), {"pool_stride": None}, 1),
    "empty": ((0, 8, 9, 9), (16, 8, 3, 3), (1, 1, 1, 1), {}, 1),
}
LRN = {"size": 5, "alpha": 1e-2, "k": 2.0}


def tensors(case: str, dtype: torch.dtype, layout: str) -> list[torch.Tensor]:
    shape, weight, *_ = CASES[case]
    scale = (weight[1] * weight[2] * weight[3]) ** -0.5
    return [
        random_input(shape, dtype, layout),
        (torch.randn(weight) * scale).to(dtype),
        torch.randn(weight[0]).to(dtype),
    ]


def fused_and_in_turn(case: str, values: list[torch.Tensor], lrn: bool):
    *_, geometry, pool, groups = CASES[case]
    pool = {"pool_size": 3, "pool_stride": 2, **pool}
    window = {name.removeprefix("pool_"): value for name, value in pool.items()}
    window["kernel_size"] = window.pop("size")
    map = ops.conv2d_relu(*values, *geometry)
    if not lrn:
        fused = ops.conv2d_relu_max_pool2d(*values, *geometry, **pool)
        return fused, ops.max_pool2d(map, **window)
    fused = ops.conv2d_relu_lrn_max_pool2d(*values, *geometry, **LRN, lrn_groups=groups, **pool)
    return fused, ops.lrn_max_pool2d(map, **LRN, groups=groups, **window)


def assert_same(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    fused, parts = pair
    assert fused.stride() == parts.stride()
    torch.testing.assert_close(fused, parts, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("lrn", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_the_operators_in_turn(backend, case, dtype, lrn):
    with running(backend):
        for layout in LAYOUTS:
            assert_same(fused_and_in_turn(case, tensors(case, dtype, layout), lrn))


@pytest.mark.parametrize("engine", [1, 2], ids=["direct", "winograd"])
@pytest.mark.parametrize("case", ["conv1", "conv2", "conv5", "vgg"])
def test_every_engine(case, engine):
    torch.ops.fastalex_cpu.force_conv_engine(engine, 0)
    try:
        for lrn in (False, True):
            values = tensors(case, torch.float32, "channels_last")
            assert_same(fused_and_in_turn(case, values, lrn))
    finally:
        torch.ops.fastalex_cpu.force_conv_engine(0, 0)


@pytest.mark.parametrize("precision", ["highest", "high"])
@pytest.mark.parametrize("lrn", [False, True])
@pytest.mark.parametrize("strange", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("case", ["conv1", "conv2", "conv5", "vgg"])
def test_strange_values(case, strange, lrn, precision):
    """One, equal bit for bit; and so many that the engine makes all it has in hand anew, directly.

    That is a block or an image here, a batch there: each within the precision's bound of the truth.
    """
    with conv_precision(precision):
        for layout, spread in product(("contiguous", "channels_last"), (1, 3)):
            values = tensors(case, torch.float32, layout)
            values[0][1, 1, 4, 5] = strange
            if spread > 1:
                values[0][::2, :, ::spread, ::spread] = strange
            fused, parts = fused_and_in_turn(case, values, lrn)
            if spread == 1 or precision == "highest":
                assert_same((fused, parts))
            finite = parts.isfinite()
            assert_same((fused[~finite], parts[~finite]))
            map = ops.conv2d_relu(*values, *CASES[case][2])
            largest = map[map.isfinite()].max()
            assert ((fused - parts)[finite].abs() <= 2 * 5e-5 * largest).all()


@pytest.mark.parametrize("lrn", [False, True])
@pytest.mark.parametrize("case", ["conv1", "conv2", "conv5", "odd", "one"])
def test_threads_do_not_change_a_bit(case, lrn):
    """Whether a worker has an image to itself depends on their number."""
    values = tensors(case, torch.float32, "channels_last")
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            results.append(fused_and_in_turn(case, values, lrn)[0])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_a_map_is_made_in_several_blocks():
    """3.2 MB an image, so that blocks of images are short of the batch, and the last one shorter."""
    x = random_input((5, 4, 160, 160), torch.float32, "contiguous")
    weight, bias = torch.randn(32, 4, 3, 3) / 6, torch.randn(32)
    fused = ops.conv2d_relu_max_pool2d(x, weight, bias, padding=1)
    assert_same((fused, ops.max_pool2d(ops.conv2d_relu(x, weight, bias, padding=1), 3, 2)))


@pytest.mark.parametrize("operator", [CONV_RELU_MAX_POOL, CONV_RELU_LRN_MAX_POOL])
def test_the_dispatcher_gives_the_gradients_of_the_parts(operator):
    """The operator keeps no map: its backward pass makes it again."""
    lrn = operator is CONV_RELU_LRN_MAX_POOL
    values = [t.requires_grad_() for t in tensors("conv5", torch.float32, "channels_last")]
    middle = (5, 1e-2, 0.75, 2.0, 1) if lrn else ()
    pool = ((3, 3), (2, 2), (0, 0), False)
    fused = operator.dispatch(*values, (1, 1), (1, 1), (1, 1), 2, *middle, *pool)
    map = ops.conv2d_relu(*values, padding=1, groups=2)
    parts = ops.lrn_max_pool2d(map, 5, 5e-2, k=2.0) if lrn else ops.max_pool2d(map, 3, 2)
    grad = torch.randn_like(fused)
    ours, theirs = (torch.autograd.grad(y, values, grad) for y in (fused, parts))
    assert torch.equal(fused, parts)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_in_training_the_map_is_kept_and_not_made_twice():
    values = [t.requires_grad_() for t in tensors("conv5", torch.float32, "channels_last")]
    y = ops.conv2d_relu_max_pool2d(*values, padding=1, groups=2)
    assert type(y.grad_fn).__name__ == "fastalex_max_poolBackward"


def test_autocast():
    values = tensors("conv2", torch.float32, "channels_last")
    with torch.autocast("cpu", torch.bfloat16):
        fused, parts = fused_and_in_turn("conv2", values, lrn=True)
    assert fused.dtype == torch.bfloat16
    assert torch.equal(fused, parts)


def test_one_image_without_a_batch():
    x, weight, bias = tensors("one", torch.float32, "contiguous")
    batched = ops.conv2d_relu_max_pool2d(x, weight, bias, padding=1)
    assert torch.equal(ops.conv2d_relu_max_pool2d(x[0], weight, bias, padding=1), batched[0])


def test_wrong_arguments_say_so():
    x, weight, bias = tensors("one", torch.float32, "contiguous")
    with pytest.raises(ValueError, match="pool_padding is 2; it must be at most half of pool_size"):
        ops.conv2d_relu_max_pool2d(x, weight, bias, pool_padding=2)
    with pytest.raises(ValueError, match=r"pool_size .* does not fit input"):
        ops.conv2d_relu_max_pool2d(x, weight, bias, pool_size=30)
    with pytest.raises(ValueError, match="groups is 3; it must divide the 16 channels"):
        ops.conv2d_relu_lrn_max_pool2d(x, weight, bias, size=5, lrn_groups=3)
    with pytest.raises(ValueError, match="takes 8"):
        ops.conv2d_relu_max_pool2d(x[:, :4], weight, bias)


# --- the layer that merges -----------------------------------------------------------------------


def operators_of(module: nn.Module, x: torch.Tensor) -> list[str]:
    """The fastalex operators that a call runs, one after another."""
    seen = []

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "fastalex":
                seen.append(func.name().removeprefix("fastalex::"))
            return func(*args, **(kwargs or {}))

    with Record():
        module(x)
    return seen


def test_alexnet_runs_them_at_inference_alone():
    net = models.alexnet("paper", num_classes=10).eval()
    x = torch.randn(2, 3, 227, 227)
    with torch.no_grad():
        convolutions = [name for name in operators_of(net, x) if name != "linear_relu"]
        merged = net(x)
    lrn, plain = "conv_relu_lrn_max_pool", "conv_relu_max_pool"
    assert convolutions == [lrn, lrn, "conv_relu", "conv_relu", plain]
    assert torch.equal(net(x), merged)
    assert lrn not in operators_of(net, x)


def test_layers_with_hooks_run_by_themselves():
    conv, pool = ops.Conv2dReLU(3, 8, 3), ops.MaxPool2d(2)
    both = ops.FusedSequential(conv, nn.Identity(), pool)
    x, shapes = torch.randn(1, 3, 8, 8), []
    with torch.no_grad():
        merged = both(x)
        assert operators_of(both, x) == ["conv_relu_max_pool"]
        conv.register_forward_hook(lambda module, args, output: shapes.append(output.shape))
        assert torch.equal(both(x), merged)
        assert shapes == [(1, 8, 6, 6)]
    assert both.state_dict().keys() == nn.Sequential(conv, nn.Identity(), pool).state_dict().keys()


def test_what_cannot_merge_does_not():
    x = torch.randn(1, 3, 8, 8)
    cases = (
        (ops.Conv2dReLU(3, 8, 3, padding=1, padding_mode="circular"), ops.MaxPool2d(2)),
        (ops.Conv2dReLU(3, 8, 3), ops.MaxPool2d(2, dilation=2)),
        (ops.Conv2dReLU(3, 8, 3), nn.MaxPool2d(2)),
    )
    with torch.no_grad():
        for layers in cases:
            assert "conv_relu" in operators_of(ops.FusedSequential(*layers), x)
            expected = nn.Sequential(*layers)(x)
            assert torch.equal(ops.FusedSequential(*layers)(x), expected)


def test_explain_shows_the_plan(capsys):
    x, weight, bias = tensors("one", torch.float32, "channels_last")
    fastalex.explain("conv_relu_max_pool", x, weight, bias, padding=1)
    text = capsys.readouterr().out
    assert "conv_relu_max_pool: runs on cpu" in text
    assert "GFLOP" in text


@pytest.mark.parametrize("pool", [{"pool_size": 1}, {"pool_size": 2, "pool_padding": 1}], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_map_of_one_pixel_is_normalised_in_the_order_of_the_operator(dtype, layout, pool):
    """Whose layout nothing tells: sums of five in another order differ in the last bit, in one of a few maps."""
    geometry, lrn = (1, 0, 1, 2), {**LRN, "alpha": 0.3}
    window = {name.removeprefix("pool_"): value for name, value in pool.items()}
    window["kernel_size"] = window.pop("size")
    for _ in range(20):
        x = random_input((3, 36, 5, 5), dtype, layout)
        values = [x, (torch.randn(24, 18, 5, 5) / 20).to(dtype), torch.randn(24).to(dtype)]
        with running("cpu"):
            fused = ops.conv2d_relu_lrn_max_pool2d(*values, *geometry, **lrn, **pool, pool_stride=1)
            map = ops.conv2d_relu(*values, *geometry)
            parts = ops.lrn_max_pool2d(map, **lrn, **window, stride=1)
        assert torch.equal(fused, parts)
