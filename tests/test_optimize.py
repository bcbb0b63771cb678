"""``fastalex.optimize``: the same answers, the same module to everybody who looks, and the way back."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastalex
from fastalex import models
from tests.support.optimized import EXACT, MODELS, Functional, Residual, chain, equal, image, pair


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_outputs_gradients_and_statistics_equal_stock(name, training):
    build, shape = MODELS[name]
    stock, fast = pair(build(), training)
    for grad in (False, True):
        x = torch.randn(3, *shape, dtype=torch.float64)
        inputs = [x.clone().requires_grad_(grad) for _ in range(2)]
        with torch.set_grad_enabled(grad):
            results = [model(input) for model, input in zip((stock, fast), inputs, strict=True)]
        torch.testing.assert_close(*results, **EXACT)
        assert results[0].stride() == results[1].stride()
    seed = torch.randn_like(results[0])
    for result in results:
        result.backward(seed)
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad, **EXACT)
    for (key, a), (_, b) in zip(stock.named_parameters(), fast.named_parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, **EXACT, msg=lambda m, key=key: f"{key}: {m}")
    for a, b in zip(stock.buffers(), fast.buffers(), strict=True):
        torch.testing.assert_close(a, b, **EXACT)


def test_what_became_of_each_layer():
    report = fastalex.optimize(chain().eval())
    assert {(entry.layers, entry.step) for entry in report.entries} == {
        ("Conv2d + ReLU + LocalResponseNorm + MaxPool2d", "convolution_max_pool"),
        ("Conv2d + BatchNorm2d + ReLU", "convolution"),
        ("MaxPool2d", "max_pool"),
        ("LocalResponseNorm", "lrn"),
        ("ReLU + MaxPool2d", "relu_max_pool"),
        ("Linear + ReLU", "linear"),
        ("Linear", None),
    }
    text = str(report)
    assert "replaced 6" in text
    assert "kept 1: 1 Linear" in text


@pytest.mark.parametrize("lrn", [False, True])
@pytest.mark.parametrize(
    ("conv", "pool"),
    [
        ({}, {}),
        (
            {"stride": 2, "padding": 1, "groups": 3, "bias": False},
            {"padding": 1, "ceil_mode": True},
        ),
        ({"padding": "same"}, {"stride": 1}),
        ({"padding": 1, "padding_mode": "reflect"}, {}),  # the last three run in turn
        ({}, {"dilation": 2}),
        ({}, {"return_indices": True}),
    ],
    ids=str,
)
def test_a_convolution_and_its_pool_are_one_step(conv, pool, lrn):
    layers = [nn.Conv2d(3, 6, 3, **conv), nn.ReLU(), nn.LocalResponseNorm(3, alpha=0.1)]
    pooling = nn.MaxPool2d(3, **{"stride": 2, **pool})
    stock, fast = pair(nn.Sequential(*layers[: 3 if lrn else 2], pooling))
    (entry,) = fastalex.optimize(fast).entries
    assert entry.step == "convolution_max_pool"
    seen: list[torch.Tensor] = []
    for x in (image(), image()[0]):
        if lrn and x.dim() == 3:
            continue
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                expected, actual = stock(x), fast(x)
            torch.testing.assert_close(actual, expected, **EXACT)
    fast[1].register_forward_hook(lambda module, inputs, output: seen.append(output.clone()))
    x = image()
    torch.testing.assert_close(fast(x), stock(x), **EXACT)
    torch.testing.assert_close(seen, [stock[:2](x)], **EXACT)


def test_functions_and_residuals_are_found():
    steps = {(e.layers, e.step) for e in fastalex.optimize(Functional()).replaced}
    assert steps == {
        ("Conv2d + relu", "convolution"),
        ("local_response_norm", "local_response_norm"),
        ("max_pool2d", "max_pool2d"),
        ("conv2d + relu", "conv2d_relu"),
        ("Linear + relu", "linear"),
    }
    steps = {(e.layers, e.step) for e in fastalex.optimize(Residual()).replaced}
    assert ("Conv2d + BatchNorm2d + iadd + ReLU", "convolution_add") in steps


def test_everybody_finds_the_model_they_knew():
    stock, fast = pair(chain())
    assert repr(fast) == repr(stock)
    assert list(fast.state_dict()) == list(stock.state_dict())
    assert [name for name, _ in fast.named_modules()] == [n for n, _ in stock.named_modules()]
    assert isinstance(fast, nn.Sequential)
    model = chain()
    parameters = [id(p) for p in model.parameters()]
    modules = [id(m) for m in model.modules()]
    fastalex.optimize(model)
    assert [id(p) for p in model.parameters()] == parameters
    assert [id(m) for m in model.modules()] == modules


def test_restore_undoes_it_exactly():
    model = Residual().eval()
    before = {name: (type(m), dict(vars(m))) for name, m in model.named_modules()}
    report = fastalex.optimize(model)
    assert type(model) is not Residual
    model(torch.randn(1, 8, 5, 5))
    report.restore()
    for name, module in model.named_modules():
        kind, attributes = before[name]
        assert type(module) is kind
        assert vars(module).keys() == attributes.keys()
        assert all(vars(module)[key] is value for key, value in attributes.items())


def test_an_example_measures_and_keeps_what_is_faster(monkeypatch):
    stock, fast = pair(nn.Sequential(chain()[:4], nn.Sequential(*chain()[4:11])))
    x = image()
    report = fastalex.optimize(fast, x)
    times = [(entry.stock_ms, entry.step_ms) for entry in report.entries]
    assert all(a > 0 and b > 0 for a, b in times)
    assert "stock ms" in str(report)
    equal(stock, fast, x)
    from fastalex._optimize import measure

    for ours, kept in ((2.0, False), (0.5, True)):
        monkeypatch.setattr(measure, "_medians", lambda *args, ours=ours: (1.0, ours))
        report = fastalex.optimize(fast, (x,))
        assert bool(report.replaced) is kept
        assert (type(fast[0]) is not nn.Sequential) is kept
        equal(stock, fast, x)
        assert all(not module._forward_pre_hooks for module in fast.modules())


def test_optimizing_twice_is_optimizing_once():
    stock, fast = pair(chain())
    report = fastalex.optimize(fast)
    assert type(fast).__mro__[1] is nn.Sequential
    equal(stock, fast, image())
    report.restore()
    assert type(fast) is nn.Sequential


@pytest.mark.parametrize("preset", ["paper", "caffenet"])
def test_fastalexs_own_stock_networks_are_optimised(preset):
    """Normalisation inside each tower included, which torch.nn has no layer for."""
    torch.manual_seed(3)
    net = models.alexnet(preset, fused=False, hidden=32).eval()
    x = torch.randn(2, 3, 227, 227)
    with torch.no_grad():
        expected = net(x)
        report = fastalex.optimize(net)
        layers = {entry.layers for entry in report.replaced}
        towers = "Conv2d + ReLU + TowerLocalResponseNorm + MaxPool2d"
        assert (towers if preset == "paper" else "LocalResponseNorm") in layers
        assert (net(x) - expected).norm() < 1e-4 * expected.norm()
