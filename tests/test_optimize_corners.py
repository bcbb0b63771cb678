"""Models that ``fastalex.optimize`` leaves alone, refuses with a reason, or meets wrapped and with unusual inputs."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune

import fastalex
from fastalex import ops
from tests.support.optimized import (
    CHAIN_INPUT,
    EXACT,
    Branches,
    Residual,
    chain,
    equal,
    image,
    pair,
    with_statistics,
)


def test_only_modules():
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, got function"):
        fastalex.optimize(chain)


def test_what_a_graph_would_lose_is_refused_with_a_reason():
    class Counts(Residual):
        calls = 0

        def forward(self, x):
            self.calls = self.calls + 1
            return super().forward(x)

    class Remembers(Residual):
        def __init__(self):
            super().__init__()
            self.seen = []

        def forward(self, x):
            self.seen.append(x)
            return super().forward(x)

    class Noisy(Residual):
        def forward(self, x):
            return super().forward(x) + (torch.rand(()) if self.training else torch.rand(1))

    class Coin(Residual):
        def forward(self, x):
            return super().forward(x) if torch.rand(()) < 0.5 else x

    class NoGrad(Residual):
        def forward(self, x):
            with torch.no_grad():
                x = self.conv1(x)
            return self.relu(x)

    class Looks(Residual):
        def forward(self, x):
            x = self.conv1(x)
            return self.relu(x if isinstance(x, torch.Tensor) else x[0])

    class Variadic(Residual):
        def forward(self, *xs):
            return super().forward(xs[0])

    reasons = {
        Counts: "changes its own 'calls'",
        Remembers: "changes its own 'seen'",
        Noisy: "makes tensors out of nothing",
        Coin: "draws random numbers",
        NoGrad: "switches gradients",
        Looks: "looks at the type",
        Variadic: "any number of arguments",
    }
    for kind, reason in reasons.items():
        model = kind().eval()
        state, rng = dict(vars(model)), torch.get_rng_state()
        report = fastalex.optimize(model)
        assert type(model) is kind, kind
        (entry,) = [e for e in report.kept if e.where == "(model)"]
        assert reason in entry.why, (kind, entry.why)
        assert torch.equal(rng, torch.get_rng_state())
        assert vars(model).keys() == state.keys()
        assert getattr(model, "seen", []) == []
        assert type(model.down).__mro__[1] is nn.Sequential, "what is inside is optimised"


def test_an_untraceable_model_still_gets_its_layers():
    stock, fast = pair(Branches())
    for sign in (1, -1):
        equal(stock, fast, sign * image())
    entries = {entry.where: entry for entry in fastalex.optimize(fast).entries}
    assert "branches on a value" in entries["(model)"].why
    assert entries["pool.(max_pool2d)"].step == "max_pool2d"
    fast.pool.kernel_size = stock.pool.kernel_size = 1
    equal(stock, fast, image())


def test_a_single_layer():
    x = image()
    for layer in (nn.MaxPool2d(3, 2, 1), nn.LocalResponseNorm(3, k=2.0)):
        fast = copy.deepcopy(layer)
        assert len(fastalex.optimize(fast).replaced) == 1
        equal(layer, fast, x)
    assert not fastalex.optimize(nn.ReLU()).replaced


def test_isinstance_on_an_argument_follows_what_is_given():
    class Dense(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.relu = nn.Conv2d(3, 4, 3), nn.ReLU()

        def forward(self, x):
            x = [x] if isinstance(x, torch.Tensor) else x
            return self.relu(self.conv(torch.cat(x)))

    stock, fast = pair(Dense())
    equal(stock, fast, image())
    equal(stock, fast, [image(1), image(2)])


def test_shared_modules():
    relu, conv, bn = nn.ReLU(), nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
    inner = nn.Sequential(conv, bn, relu)
    stock, fast = pair(nn.Sequential(inner, inner, conv, relu, bn, relu, inner))
    equal(stock, fast, image())
    for model in (stock, fast):
        model.train()
        model(image().sin())
    stock.load_state_dict(fast.state_dict())
    for model in (stock, fast):
        model.eval()
    equal(stock, fast, image())


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    "apply",
    [
        lambda m: parametrizations.weight_norm(m[0]),
        lambda m: parametrizations.spectral_norm(m[4]),
        lambda m: nn.utils.weight_norm(m[12]),
        lambda m: prune.random_unstructured(m[0], "weight", 0.5),
    ],
    ids=["weight_norm", "spectral_norm", "old weight_norm", "pruned"],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
def test_parametrizations_take_effect(apply, when):
    stock = chain().double().eval()
    fast = copy.deepcopy(stock)
    if when == "after":
        fastalex.optimize(fast)
        fast(image())
    for model in (stock, fast):
        torch.manual_seed(5)
        apply(model)
    fast.load_state_dict(stock.state_dict())
    if when == "before":
        fastalex.optimize(fast)
    equal(stock, fast, image())


def test_subclasses_of_layers_are_left_alone():
    class Scaled(nn.Conv2d):
        def forward(self, x):
            return 2 * super().forward(x)

    class Negative(nn.ReLU):
        def forward(self, x):
            return -super().forward(x)

    model = nn.Sequential(Scaled(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), Negative())
    stock, fast = pair(model)
    assert [entry.where for entry in fastalex.optimize(fast).replaced] == ["2"]
    equal(stock, fast, image())


def test_fastalex_layers_stay():
    model = nn.Sequential(ops.Conv2dReLU(3, 4, 3), ops.MaxPool2d(2))
    assert not fastalex.optimize(model).replaced


def test_scripted_models_are_refused_and_optimised_ones_are_traced():
    scripted = torch.jit.script(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).double())
    report = fastalex.optimize(scripted)
    assert not report.replaced
    assert "scripted" in str(report)
    scripted(image())
    stock, fast = pair(chain())
    x = image()
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.trace(fast, x)(x), stock(x), **EXACT)


@pytest.mark.filterwarnings("ignore")
def test_quantized_models_are_left_alone():
    model = torch.ao.quantization.quantize_dynamic(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 11 * 19, 5)).eval()
    )
    expected = copy.deepcopy(model)
    x = image().float()
    report = fastalex.optimize(model)
    assert all("Linear" not in entry.layers for entry in report.replaced)
    torch.testing.assert_close(model(x), expected(x), atol=1e-2, rtol=0)


def test_lazy_modules():
    torch.manual_seed(1)
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.ReLU(), nn.MaxPool2d(2)).double()
    report = fastalex.optimize(model)
    assert [entry.layers for entry in report.replaced] == ["ReLU + MaxPool2d"]
    x = image()
    out = model(x)
    torch.testing.assert_close(out, F.max_pool2d(F.relu(model[0](x)), 2), **EXACT)
    assert "Conv2d + ReLU" in str(fastalex.optimize(model))
    torch.testing.assert_close(model(x), out, **EXACT)


def test_wrappers():
    stock = with_statistics(chain().double().eval())
    inside = copy.deepcopy(stock)
    wrapped = nn.DataParallel(inside)
    report = fastalex.optimize(wrapped)
    assert len(report.replaced) == 6
    assert type(wrapped) is nn.DataParallel
    equal(stock, wrapped, image())
    replica = inside._replicate_for_data_parallel()
    assert type(replica) is type(inside)


def test_distributed_data_parallel(tmp_path):
    stock = with_statistics(chain().double())
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        for before in (True, False):
            model, expected = copy.deepcopy(stock), copy.deepcopy(stock)
            if before:
                fastalex.optimize(model)
            wrapped = nn.parallel.DistributedDataParallel(model)
            if not before:
                fastalex.optimize(wrapped)
            x = image()
            wrapped(x).sum().backward()
            expected(x).sum().backward()
            for a, b in zip(model.parameters(), expected.parameters(), strict=True):
                torch.testing.assert_close(a.grad, b.grad, **EXACT)
    finally:
        torch.distributed.destroy_process_group()


def test_meta_device():
    with torch.device("meta"):
        model = chain().eval()
    fastalex.optimize(model)
    out = model(torch.empty(CHAIN_INPUT, device="meta"))
    assert out.shape == (2, 4)
    assert out.is_meta


def test_unusual_inputs():
    stock, fast = pair(nn.Sequential(*chain()[:4]))
    for x in (
        image()[0],  # no batch
        image(0),
        image().to(memory_format=torch.channels_last),
        image().expand(2, 3, 13, 21)[:, :, ::2],
        image().mT.contiguous().mT,
    ):
        equal(stock, fast, x)
    with pytest.raises((RuntimeError, ValueError), match="channels"):
        fast(torch.randn(1, 4, 13, 13, dtype=torch.float64))
    complex_model = nn.Sequential(nn.Conv2d(3, 4, 3, dtype=torch.complex128), nn.Identity())
    stock, fast = copy.deepcopy(complex_model), complex_model
    fastalex.optimize(fast)
    equal(stock, fast, image().to(torch.complex128))


def test_output_layout_does_not_surprise():
    _, fast = pair(nn.Sequential(*chain()[:11]))
    x = image()
    assert fast(x).is_contiguous()
    last = x.to(memory_format=torch.channels_last)
    assert fast(last).is_contiguous(memory_format=torch.channels_last)
    x = x.float()
    assert fast.float()(x).is_contiguous()


def test_functional_call_and_vmap():
    stock, fast = pair(chain())
    params = {k: v * 1.5 for k, v in stock.named_parameters()}
    x = image()
    expected = torch.func.functional_call(stock, params, (x,))
    torch.testing.assert_close(torch.func.functional_call(fast, params, (x,)), expected, **EXACT)
    torch.testing.assert_close(
        torch.func.vmap(lambda one: fast(one[None]))(x)[:, 0], stock(x), **EXACT
    )

    def loss(model, params):
        return torch.func.functional_call(model, params, (x,)).square().sum()

    one = torch.func.grad(lambda p: loss(fast, p))(params)
    two = torch.func.grad(lambda p: loss(stock, p))(params)
    for key, value in two.items():
        torch.testing.assert_close(one[key], value, **EXACT)


def test_inference_mode():
    stock, fast = pair(Residual())
    with torch.inference_mode():
        equal(stock, fast, torch.randn(2, 8, 6, 6, dtype=torch.float64))
        inside = copy.deepcopy(stock).double()
        fastalex.optimize(inside)
        x = torch.randn(2, 8, 6, 6, dtype=torch.float64)
        equal(stock, inside, x)
        for model in (stock, inside):
            model.conv1.weight.mul_(2)
        equal(stock, inside, x)
