"""The convolution that normalises and rectifies a concatenation as it reads, as in a dense layer, against float64."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastalex
from fastalex.ops import _cpu_conv
from tests.support import optimized
from tests.support.backends import BACKENDS, running
from tests.test_conv_engine import assert_direct, assert_winograd
from tests.test_conv_residual import ENGINES, LAYOUTS, forced

#: channels of the inputs, sides, filters, kernel, stride, padding, groups.
CASES = {
    "pointwise, merged rows": ((32, 64, 16), (11, 7), 64, 1, 1, 0, 1),
    "pointwise, tails": ((5, 3, 17, 1), (9, 8), 53, 1, 1, 0, 1),
    "pointwise, strided": ((20, 12), (9, 8), 32, 1, 2, 0, 1),
    "pointwise, several passes": ((300, 290), (5, 6), 40, 1, 1, 0, 1),
    "3x3, tails": ((19, 7), (12, 17), 35, 3, 1, 1, 1),
    "3x3, strided, groups across inputs": ((10, 6), (13, 15), 40, 3, 2, 1, 4),
    "5x5, strided, one input": ((8,), (20, 19), 32, 5, 2, 2, 1),
}


def arguments(case: str, dtype: torch.dtype, layouts: tuple[str, ...]) -> tuple:
    channels, sides, filters, kernel, stride, padding, groups = CASES[case]
    inputs = [
        torch.randn(3, c, *sides).to(dtype).contiguous(memory_format=LAYOUTS[layouts[i % 2]])
        for i, c in enumerate(channels)
    ]
    total = sum(channels)
    terms = total // groups * kernel * kernel
    weight = (torch.randn(filters, total // groups, kernel, kernel) * terms**-0.5).to(dtype)
    affine = torch.rand(total) * 2 - 0.5, torch.randn(total)
    geometry = ((stride, stride), (padding, padding), (1, 1), groups)
    return inputs, affine, weight, torch.randn(filters).to(dtype), geometry


def convolved(x, gain, shift, rectify, weight, bias, geometry):
    """The definition: the zeros of the padding come after the normalisation."""
    x = torch.addcmul(shift.reshape(-1, 1, 1), x, gain.reshape(-1, 1, 1))
    return F.conv2d(x.relu() if rectify else x, weight, bias, *geometry)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("case", CASES)
def test_equals_the_operators_in_turn(backend, dtype, engine, case):
    for layouts in (("nhwc", "nhwc"), ("nchw", "nchw"), ("nhwc", "nchw")):
        inputs, (gain, shift), weight, bias, geometry = arguments(case, dtype, layouts)
        x = torch.cat(inputs, 1)
        wide = [t.double() for t in (x, gain, shift, weight, bias)]
        # The bound of the normalised input, whose own rounding is one term more.
        size = [t.abs() for t in wide]
        magnitude = convolved(*size[:3], False, *size[3:], geometry)
        with running(backend), forced(engine):
            chosen = _cpu_conv.plan(x, weight, bias, *geometry)
            for before, after in ((True, False), (False, True)):
                out = _cpu_conv.normalized_inference(
                    inputs, gain, shift, before, weight, None, bias, *geometry, after
                )
                assert out.is_contiguous(memory_format=LAYOUTS[layouts[0]])
                expected = convolved(*wide[:3], before, *wide[3:], geometry)
                expected = expected.relu() if after else expected
                if "winograd" not in chosen:
                    assert_direct(out, expected, magnitude, weight[0].numel() + 2)
                elif dtype is torch.float32:
                    assert_winograd(out, expected)
                else:
                    rounding = torch.finfo(dtype).eps / 2
                    assert (out.double() - expected).norm() <= (1e-5 + rounding) * expected.norm()


@pytest.mark.parametrize("few", [True, False])
@pytest.mark.parametrize("case", ["3x3, tails", "pointwise, tails", "5x5, strided, one input"])
def test_nan_and_infinities_stay_where_they_belong(case, few):
    inputs, (gain, shift), weight, bias, geometry = arguments(case, torch.float32, ("nhwc",) * 2)
    for at in range(1 if few else 8):
        inputs[0][0, 2, 3, at] = float("nan")
        inputs[-1][1, 0, at, at] = float("inf")
    for engine in ENGINES:
        with forced(engine):
            out = _cpu_conv.normalized_inference(
                inputs, gain, shift, True, weight, None, bias, *geometry, False
            )
        expected = convolved(torch.cat(inputs, 1), gain, shift, True, weight, bias, geometry)
        assert torch.equal(out.isnan(), expected.isnan())
        assert torch.equal(out.isinf(), expected.isinf())
        finite = expected.isfinite()
        assert (out - expected)[finite].norm() <= 2e-5 * expected[finite].norm()


def test_what_does_not_fit_is_refused():
    inputs, affine, weight, bias, geometry = arguments(
        "pointwise, tails", torch.float32, ("nhwc",) * 2
    )

    def run(inputs, gain, shift, weight):
        _cpu_conv.normalized_inference(
            inputs, gain, shift, True, weight, None, bias, *geometry, True
        )

    first, *others = inputs
    for wrong in ([], [first.double(), *others], [first[:1], *others], [first[0], *others]):
        with pytest.raises(RuntimeError, match=r"one input or more|differ in channels alone"):
            run(wrong, *affine, weight)
    for wrong in (affine[0][:-1], affine[0].double(), affine[0][::1].expand(2, -1)):
        with pytest.raises(RuntimeError, match="one float32 for each input channel"):
            run(inputs, wrong, affine[1], weight)
    with pytest.raises(RuntimeError, match="input has 8 channels"):
        run(inputs[:2], *affine, weight)
    with pytest.raises(RuntimeError, match="in the inputs' dtype"):
        run(inputs, *affine, weight.bfloat16())


def test_an_empty_batch():
    inputs, affine, weight, bias, geometry = arguments("3x3, tails", torch.float32, ("nhwc",) * 2)
    empty = [input[:0] for input in inputs]
    out = _cpu_conv.normalized_inference(empty, *affine, True, weight, None, bias, *geometry, True)
    assert out.shape == (0, 35, 12, 17)


# --- in optimised models ---------------------------------------------------------------------------


class Dense(nn.Module):
    """A dense layer and what follows a block of them."""

    def __init__(self, concatenate=lambda inputs: torch.cat(inputs, 1)) -> None:
        super().__init__()
        self.concatenate = concatenate
        self.norm1, self.relu1 = nn.BatchNorm2d(12), nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(12, 16, 1, bias=False)
        self.norm2, self.relu2 = nn.BatchNorm2d(16), nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(16, 4, 3, padding=1)

    def forward(self, x, y):
        z = self.concatenate([x, y])
        return self.conv2(self.relu2(self.norm2(self.conv1(self.relu1(self.norm1(z))))))


FORMS = {
    "cat": Dense,
    "cat, dim=1": lambda: Dense(lambda inputs: torch.cat(inputs, dim=1)),
    "no cat": lambda: Dense(lambda inputs: inputs[0].repeat(1, 2, 1, 1)),
    "cat of rows": lambda: Dense(lambda inputs: torch.cat(inputs, 2).repeat(1, 2, 1, 1)),
}


def dense(form: str = "cat") -> tuple[nn.Module, nn.Module, list[torch.Tensor]]:
    stock = optimized.with_statistics(FORMS[form]().eval())
    fast = copy.deepcopy(stock)
    report = fastalex.optimize(fast)
    assert report.replaced[0].step == "normalized_convolution"
    return stock, fast, [torch.randn(2, 6, 9, 9) for _ in range(2)]


def calls(monkeypatch) -> list[tuple]:
    seen: list[tuple] = []
    run = _cpu_conv.normalized_inference
    monkeypatch.setattr(
        _cpu_conv, "normalized_inference", lambda *args: seen.append(args) or run(*args)
    )
    return seen


@pytest.mark.parametrize("form", FORMS)
def test_a_dense_layer_reads_once(monkeypatch, form):
    seen = calls(monkeypatch)
    stock, fast, inputs = dense(form)
    kept = [input.clone() for input in inputs]
    with torch.no_grad():
        actual, expected = fast(*inputs), stock(*inputs)
    assert [len(args[0]) for args in seen] == [2 if form in ("cat", "cat, dim=1") else 1]
    # Two convolutions, each within the precision "high".
    assert (actual - expected).norm() <= 2e-5 * expected.norm()
    assert all(map(torch.equal, inputs, kept))


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.train(),
        lambda m: m.norm1.train(),
        lambda m: m.norm2.train(),
        lambda m: m.double(),
        lambda m: m.bfloat16(),
        lambda m: m.norm1.register_forward_hook(lambda *_: None),
        lambda m: m.relu1.register_forward_hook(lambda *_: None),
        lambda m: setattr(m, "relu1", nn.LeakyReLU(0.1)),
        lambda m: setattr(m, "norm1", nn.BatchNorm2d(12, track_running_stats=False)),
        lambda m: setattr(m, "conv1", nn.Conv2d(12, 16, 1)),
        lambda m: nn.utils.parametrizations.weight_norm(m.conv1),
    ],
)  # fmt: skip
def test_what_changed_runs_as_stock(change):
    stock, fast, inputs = dense()
    for model in (stock, fast):
        torch.manual_seed(1)
        change(model)
    inputs = [input.to(stock.conv2.weight.dtype) for input in inputs]
    with torch.no_grad():
        expected, actual = stock(*inputs), fast(*inputs)
    # Each of the two convolutions and normalisations rounds its map.
    exact = expected.dtype is torch.float64
    tolerance = 1e-12 if exact else max(2e-5, 8 * torch.finfo(expected.dtype).eps)
    assert (actual - expected).norm() <= tolerance * expected.norm()
    for a, b in zip(stock.buffers(), fast.buffers(), strict=True):
        torch.testing.assert_close(a, b)


def test_changed_statistics_take_effect():
    stock, fast, inputs = dense()
    with torch.no_grad():
        fast(*inputs)
        for model in (stock, fast):
            model.norm1.running_mean += 1
            model.norm1.weight.data[0] = -2
            model.norm2.running_var *= 3
        actual, expected = fast(*inputs), stock(*inputs)
    assert (actual - expected).norm() <= 2e-5 * expected.norm()


def test_gradients_go_the_way_they_went():
    stock, fast, inputs = dense()
    stock, fast = stock.double(), fast.double()
    for model in (stock, fast):
        model.zero_grad()
    inputs = [input.double().requires_grad_() for input in inputs]
    results = []
    for model in (stock, fast):
        wanted = (*inputs, *model.parameters())
        results.append(torch.autograd.grad(model(*inputs).square().sum(), wanted))
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, **optimized.EXACT)
