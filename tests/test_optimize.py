"""``fastalex.optimize``: the same answers, the same module to everybody who looks, and the way back."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune

import fastalex
from fastalex import models, ops
from tests.support import optimized

# In float64 the operators run on torch's own kernels, so that what differs is the order of a few sums.
EXACT = optimized.EXACT


class Functional(nn.Module):
    """Everything as functions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.weight = nn.Parameter(torch.randn(8, 8, 3, 3) / 8)
        self.fc = nn.Linear(8 * 5 * 5, 10)

    def forward(self, x, scale: float = 1.0):
        x = torch.relu(self.conv(x * scale))
        x = F.local_response_norm(x, 5, alpha=0.1)
        x = F.max_pool2d(x, 3, 2)
        x = F.relu(F.conv2d(x, self.weight, padding=1))
        return F.relu(self.fc(x.view(x.size(0), -1)))


class Residual(nn.Module):
    """A residual block whose shortcut is computed between the convolution and the addition."""

    def __init__(self, inplace: bool = True) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace)
        self.down = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))

    def forward(self, x):
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        identity = self.down(x)
        out += identity
        return self.relu(out)


class Branches(nn.Module):
    """Branches on a value, which no trace can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.body = chain()[:8]
        self.pool = nn.MaxPool2d(2)

    def forward(self, x):
        x = self.body(x)
        return self.pool(x) if x.sum() > 0 else self.pool(-x)


def chain() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.ReLU(inplace=True),
        nn.LocalResponseNorm(5, alpha=0.1),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(8, 8, 3, padding=1, groups=2, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.LocalResponseNorm(3, alpha=0.1),
        nn.ReLU(),
        nn.MaxPool2d(2, return_indices=False),
        nn.Flatten(),
        nn.Linear(8 * 2, 16),
        nn.ReLU(),
        nn.Linear(16, 4),
    )


def image(batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, 13, 21, dtype=torch.float64)


CHAIN_INPUT = (2, 3, 13, 21)


def pair(model: nn.Module, training: bool = False) -> tuple[nn.Module, nn.Module]:
    """Stock and optimised, same weights, float64, with statistics that are worth folding."""
    model = optimized.with_statistics(model.double()).train(training)
    other = copy.deepcopy(model)
    fastalex.optimize(other)
    return model, other


def equal(stock: nn.Module, fast: nn.Module, *inputs, **kwargs) -> None:
    torch.testing.assert_close(fast(*inputs, **kwargs), stock(*inputs, **kwargs), **EXACT)


MODELS = {
    "chain": (chain, (3, 13, 21)),
    "functional": (Functional, (3, 13, 13)),
    "residual": (Residual, (8, 6, 7)),
    "residual, not in place": (lambda: Residual(False), (8, 6, 7)),
    "branches": (lambda: nn.Sequential(Branches().body, nn.MaxPool2d(1)), (3, 13, 21)),
}


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


# --- hooks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [True, False], ids=["hooked before", "hooked after"])
def test_feature_taps_see_the_stock_tensors(before):
    stock, fast = optimized.with_statistics(chain().double().eval()), None
    fast = copy.deepcopy(stock)
    if not before:
        fastalex.optimize(fast)
    seen: dict[int, dict[str, tuple]] = {0: {}, 1: {}}
    for which, model in enumerate((stock, fast)):
        for name, module in model.named_modules():
            module.register_forward_hook(
                lambda m, args, out, name=name, which=which: seen[which].update(
                    {name: (args[0].clone(), out.clone())}
                )
            )
    if before:
        fastalex.optimize(fast)
    x = image()
    equal(stock, fast, x)
    assert seen[0].keys() == seen[1].keys() == dict(stock.named_modules()).keys()
    for name, tensors in seen[0].items():
        # A ReLU in place has changed its input and its producer's output by the time both are compared.
        for expected, actual in zip(tensors, seen[1][name], strict=True):
            torch.testing.assert_close(actual, expected, **EXACT)
            assert actual.stride() == expected.stride() or not before


@pytest.mark.parametrize("kind", ["forward_pre", "backward", "backward_pre", "global"])
def test_other_hooks_run_as_on_stock(kind):
    stock, fast = pair(chain(), training=True)
    calls: dict[int, list[str]] = {0: [], 1: []}
    handles = []
    for which, model in enumerate((stock, fast)):
        for name, module in model.named_children():
            note = lambda *args, name=name, which=which: calls[which].append(name)  # noqa: E731
            if kind == "forward_pre":
                module.register_forward_pre_hook(note)
            elif kind == "backward" and not isinstance(module, nn.ReLU):
                module.register_full_backward_hook(note)
            elif kind == "backward_pre" and not isinstance(module, nn.ReLU):
                module.register_full_backward_pre_hook(note)
    if kind == "global":
        which = {id(m): w for w, model in enumerate((stock, fast)) for m in model.modules()}
        handles.append(
            nn.modules.module.register_module_forward_hook(
                lambda m, *args: calls[which[id(m)]].append(type(m).__name__)
            )
        )
    if kind.startswith("backward"):  # hooks on a backward pass don't go with layers in place
        for model in (stock, fast):
            for module in model.modules():
                if isinstance(module, nn.ReLU):
                    module.inplace = False
    try:
        x = image()
        for model in (stock, fast):
            model(x).sum().backward()
    finally:
        for handle in handles:
            handle.remove()
    assert calls[0] == calls[1]
    assert calls[0]


# --- a model that changes after it was optimised -------------------------------------------------


def test_a_replaced_layer_is_the_one_that_runs():
    stock, fast = pair(chain())
    for model in (stock, fast):
        torch.manual_seed(1)
        model[14] = nn.Linear(16, 7).double()
        model[1] = nn.Tanh()
        model[3] = nn.AvgPool2d(3, 2)
    equal(stock, fast, image())


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.append(nn.Softmax(dim=1)),
        lambda m: m.insert(0, nn.Tanh()),
        lambda m: m.__delitem__(2),
        lambda m: setattr(m, "forward", lambda x: x),
    ],
    ids=["append", "insert", "delete", "forward"],
)
def test_structural_changes_take_effect(change):
    stock, fast = pair(chain())
    for model in (stock, fast):
        change(model)
    equal(stock, fast, image())


def test_slices_and_layers_are_stock():
    stock, fast = pair(chain())
    assert type(fast[:3]) is nn.Sequential
    equal(stock[:3], fast[:3], image())
    equal(stock[0], fast[0], image())


def test_a_changed_attribute_takes_effect():
    class Switch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.relu, self.twice = nn.Conv2d(3, 4, 3), nn.ReLU(), False
            self.extra: nn.Module | None = None

        def forward(self, x):
            x = self.relu(self.conv(x))
            if self.extra is not None:
                x = self.extra(x)
            return x * 2 if self.twice else x

    for change in (
        lambda m: setattr(m, "twice", True),
        lambda m: setattr(m, "extra", nn.Tanh()),
        lambda m: setattr(m, "relu", nn.Tanh()),
    ):
        stock, fast = pair(Switch())
        for model in (stock, fast):
            change(model)
        equal(stock, fast, image())
    stock, fast = pair(Switch())
    fast.twice = False
    assert type(fast) is not Switch, "the same value changes nothing"


def test_arguments_with_defaults():
    stock, fast = pair(Functional())
    x = image()[:, :, :13, :13]
    equal(stock, fast, x)
    equal(stock, fast, x, 2.0)
    equal(stock, fast, x, scale=3.0)


# --- folded normalisation is never stale ---------------------------------------------------------


def bump_version(model):
    with torch.no_grad():
        model.bn1.running_var.mul_(2)
        model.conv1.weight.add_(0.1)


def load(model):
    torch.manual_seed(7)
    model.load_state_dict(
        {k: torch.rand_like(v.double()).to(v) for k, v in model.state_dict().items()}
    )


def train_and_return(model):
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.manual_seed(8)
    for _ in range(2):
        x = torch.randn(4, 8, 5, 5, dtype=torch.float64).to(model.conv1.weight)
        model(x).square().mean().backward()
        optimizer.step()
    model.eval()


def write_data(model):
    model.conv1.weight.data.mul_(1.5)
    model.bn1.weight.data.fill_(0.7)
    model.bn1.running_mean.data[3] = 4.0
    model.bn2.bias.data = model.bn2.bias.data + 1


def write_one_element(model):
    model.conv1.weight.data[1, 2, 0, 1] = 5.0


def swap_parameters(model):
    model.conv1.weight = nn.Parameter(torch.ones_like(model.conv1.weight))
    model.bn1.running_mean = torch.ones_like(model.bn1.running_mean)
    model.bn2.eps = 0.5


def freeze_and_unfreeze(model):
    model.bn1.train()
    model(torch.ones(2, 8, 5, 5).to(model.conv1.weight))
    model.bn1.eval()


@pytest.mark.parametrize(
    "change",
    [
        bump_version,
        load,
        train_and_return,
        write_data,
        write_one_element,
        swap_parameters,
        freeze_and_unfreeze,
    ],
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_folded_weights_follow_every_change(change, grad, dtype):
    stock, fast = (model.to(dtype) for model in pair(Residual()))
    x = torch.randn(2, 8, 6, 6, dtype=dtype)
    # Three convolutions of 72 terms of order one, or one rounding of bfloat16 each, on values up to 50.
    close = {torch.float64: EXACT, torch.float32: {"rtol": 1e-4, "atol": 1e-3}}.get(
        dtype, {"rtol": 0.05, "atol": 1.0}
    )

    def check():
        torch.testing.assert_close(fast(x), stock(x), **close)

    with torch.set_grad_enabled(grad):
        check()
        for model in (stock, fast):
            with torch.enable_grad():
                change(model)
        check()


@torch.no_grad()
def test_the_engine_folds_and_adds_as_float64_does():
    """conv2d(x, w g) + b, with and without ReLU, groups, strides, either layout; the gain by output channel."""
    for groups, stride, kernel, relu in ((1, 1, 3, True), (2, 2, 3, False), (4, 1, 1, False)):
        conv = nn.Conv2d(16, 24, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
        norm = nn.BatchNorm2d(24)
        model = optimized.with_statistics(
            nn.Sequential(conv, norm, nn.ReLU() if relu else nn.Identity()).eval()
        )
        fast = copy.deepcopy(model)
        fastalex.optimize(fast)
        x = torch.randn(3, 16, 14, 15)
        for format in (torch.contiguous_format, torch.channels_last):
            out = fast(x.contiguous(memory_format=format))
            expected = copy.deepcopy(model).double()(x.double())
            error = (out.double() - expected).norm() / expected.norm()
            assert error <= 1e-5, "set_conv_precision promises it"
            x[0, 0, 5, 5] = torch.nan  # stays where it is
            assert torch.equal(fast(x).isnan(), model(x).isnan())
            x[0, 0, 5, 5] = 0.0


@torch.no_grad()
def test_copies_and_pickles_are_optimised_and_independent():
    stock, fast = pair(Residual())
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64)
    fast(x)
    file = io.BytesIO()
    torch.save(fast, file)
    file.seek(0)
    copies = [
        copy.deepcopy(fast),
        pickle.loads(pickle.dumps(fast)),
        torch.load(file, weights_only=False),
    ]
    for other in copies:
        assert type(other).__mro__[1] is Residual
        equal(stock, other, x)
        other.conv1.weight.mul_(2)
        other.bn1.running_mean.add_(1)
        expected = copy.deepcopy(stock)
        expected.load_state_dict(other.state_dict())
        equal(expected, other, x)
        equal(stock, fast, x)


# --- what must not be touched, or is refused -----------------------------------------------------


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
    assert "symbolically traced" in entries["(model)"].why
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
    stock = optimized.with_statistics(chain().double().eval())
    inside = copy.deepcopy(stock)
    wrapped = nn.DataParallel(inside)
    report = fastalex.optimize(wrapped)
    assert len(report.replaced) == 6
    assert type(wrapped) is nn.DataParallel
    equal(stock, wrapped, image())
    replica = inside._replicate_for_data_parallel()
    assert type(replica) is type(inside)


def test_distributed_data_parallel(tmp_path):
    stock = optimized.with_statistics(chain().double())
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
