"""Around the loop: evaluation, ensembles, reports, fine-tuning, the sweep, the ablations, fused against stock."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("torchvision")
pytest.importorskip("rich")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("optuna")

from PIL import Image

import fastalex
from fastalex import models
from fastalex.train import Options, TrainingError, ablate, build, checkpoint, compare, report
from fastalex.train.__main__ import main
from fastalex.train.data import load
from fastalex.train.evaluate import evaluate
from fastalex.train.metrics import average, score
from fastalex.train.runtime import make_deterministic
from fastalex.train.screen import Screen
from fastalex.train.statistics import measure, takes_levels
from fastalex.train.sweep import Sweep, _fall
from tests.support import train_tiny

#: Small enough for seconds, and still every stage of a run.
QUICK = ("--epochs", "1", "--batch", "64", "--labels", "0-2", "--device", "cpu")


@pytest.fixture(autouse=True)
def restore_determinism():
    fill = torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs on three of the digits, of different seeds and networks."""
    folder = tmp_path_factory.mktemp("runs")
    first = ["--out", str(folder / "one"), "--compare", "3", "--tensorboard"]
    assert main([*QUICK, *first]) == 0
    second = ["--out", str(folder / "two"), "--compare", "0", "--seed", "1", "--set", "hidden=16"]
    assert main([*QUICK, *second]) == 0
    return folder


# --- scores --------------------------------------------------------------------------------------


def test_scores_by_hand():
    probabilities = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.3, 0.5], [0.1, 0.8, 0.1]])
    found = score(probabilities, torch.tensor([0, 1, 1]))
    assert found.top1_error == pytest.approx(1 / 3)
    assert found.top5_error == 0
    expected = -torch.tensor([0.6, 0.3, 0.8]).log().mean().item()
    assert found.loss == pytest.approx(expected, rel=1e-6)
    # Six classes: the label with the least probability is not among five.
    ramp = torch.arange(6.0).expand(6, 6) / 15
    assert score(ramp, torch.arange(6)).top5_error == pytest.approx(1 / 6)


def test_ensembles_average_the_softmax(runs):
    found = evaluate([runs / "one", runs / "two"], device="cpu")
    one, two = found.single.values()
    assert torch.equal(
        found.ensemble.probabilities, average([one.probabilities, two.probabilities])
    )
    assert not torch.equal(one.probabilities, two.probabilities)
    torch.testing.assert_close(found.ensemble.probabilities.sum(1), torch.ones(one.images))


def test_ten_views_average_ten_softmaxes(runs):
    from fastalex.train.evaluate import restore

    model, pipeline, options = restore(runs / "one" / "best.pt", torch.device("cpu"))
    data = load(options)
    images = torch.stack([data.test.read(index) for index in range(len(data.test))])
    model.eval()
    with torch.no_grad():
        views = [
            F.softmax(model(pipeline.apply(images, draws)), 1)
            for draws in pipeline.views(images, ten=True)
        ]
    assert len(views) == 10
    found = evaluate([runs / "one"], ten_views=True, device="cpu").ensemble
    torch.testing.assert_close(found.probabilities, torch.stack(views).mean(0))
    assert not torch.equal(found.probabilities, evaluate([runs / "one"]).ensemble.probabilities)


def test_the_evaluate_command_prints_a_row_each_and_the_ensemble(runs, capsys):
    paths = [str(runs / "one" / "best.pt"), str(runs / "two")]
    assert main(["evaluate", "--checkpoints", *paths, "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == [paths[0], f"{paths[1]}/last.pt", "ensemble"]
    assert main(["evaluate", "--checkpoints", str(runs / "none.pt")]) == 1
    assert "there is no checkpoint" in capsys.readouterr().err


def test_checkpoints_of_other_classes_make_no_ensemble(runs, tmp_path):
    state = checkpoint.load(runs / "one" / "best.pt")
    state["options"]["labels"] = "3-5"
    checkpoint.save({k: v for k, v in state.items() if k != "format"}, tmp_path / "other.pt")
    with pytest.raises(TrainingError, match="knows other classes"):
        evaluate([runs / "one", tmp_path / "other.pt"], device="cpu")


# --- reports -------------------------------------------------------------------------------------


def test_a_run_leaves_its_report(runs):
    folder = runs / "one" / "report"
    page = (folder / "report.md").read_text()
    for name in ("curves", "filters", "confusion", "examples"):
        picture = Image.open(folder / f"{name}.png").convert("L")
        assert min(picture.size) > 100
        assert picture.getextrema()[0] < 100 < picture.getextrema()[1]  # something is drawn
        assert f"![{name}]({name}.png)" in page
    result = json.loads((folder / "report.json").read_text())
    assert result["options"]["labels"] == "0-2"
    assert len(result["history"]) == 1
    assert result["fused_against_stock"]["fused_rate"] > 0
    assert result["fused_against_stock"]["stock_rate"] > 0
    assert f"Test accuracy {1 - result['test']['top1_error']:.2%}" in page
    assert result["environment"]["torch"].startswith(torch.__version__)


def test_tensorboard_logs_are_written(runs):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = reader.EventAccumulator(str(runs / "one" / "tensorboard")).Reload()
    result = json.loads((runs / "one" / "report" / "report.json").read_text())
    for name in ("loss", "train_error", "lr"):
        (event,) = events.Scalars(name)
        assert event.step == 1
        assert event.value == pytest.approx(result["history"][0][name], rel=1e-6)


def test_the_filters_are_those_of_the_first_convolution():
    net = models.alexnet("paper", num_classes=10)
    weight = report.first_filters(net)
    assert torch.equal(weight, net.features.conv1.weight)
    figure = report.filters(weight)
    drawn = [axis for axis in figure.axes if axis.images]
    assert len(drawn) == 96
    shown = torch.tensor(drawn[7].images[0].get_array())
    assert shown.min() == 0
    assert shown.max() == 1
    kernel = weight[7].permute(1, 2, 0)
    torch.testing.assert_close(
        shown.double(), ((kernel - kernel.min()) / (kernel.max() - kernel.min())).double()
    )


# --- fine-tuning ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_fine_tuning_replaces_the_head_and_keeps_frozen_layers(runs, tmp_path):
    before = checkpoint.load(runs / "one" / "best.pt")["model"]
    words = ["finetune", str(runs / "one"), "--labels", "3-9", "--freeze", "features"]
    common = ["--epochs", "1", "--compare", "0", "--device", "cpu", "--out", str(tmp_path / "new")]
    assert main([*words, *common]) == 0
    after = checkpoint.load(tmp_path / "new" / "last.pt")
    assert after["classes"] == [str(label) for label in range(3, 10)]
    kept = [name for name in before if name.startswith("features.")]
    assert kept
    assert all(torch.equal(after["model"][name], before[name]) for name in kept)
    head = [name for name in before if name.startswith("classifier.")]
    assert {after["model"][name].shape[0] for name in head} == {7}
    assert after["options"]["rate"] == ["fc8=10"]
    assert [group["lr"] for group in after["optimizer"]["param_groups"]] == [pytest.approx(0.01)]


def test_a_head_of_the_same_size_is_replaced_where_the_classes_differ(runs, tmp_path):
    options = Options(labels="3-5", start=str(runs / "one" / "best.pt"), device="cpu", seed=5)
    trainer = build.start(options, tmp_path / "new", Screen(quiet=True))
    before = checkpoint.load(runs / "one" / "best.pt")["model"]
    own = trainer.model.state_dict()
    same = {name for name in own if torch.equal(own[name], before[name])}
    assert own["classifier.fc8.weight"].shape == before["classifier.fc8.weight"].shape
    assert "classifier.fc8.weight" not in same
    assert "features.conv1.weight" in same


@pytest.mark.slow
def test_pretrain6_is_pretrained_and_fine_tuned(tmp_path):
    common = [
        "--crop",
        "227",
        "--batch",
        "16",
        "--epochs",
        "1",
        "--compare",
        "0",
        "--set",
        "hidden=64",
    ]
    pre = ["--preset", "pretrain6", "--labels", "0,1", "--out", str(tmp_path / "pre")]
    assert main([*common, *pre]) == 0
    tune = [
        "finetune",
        str(tmp_path / "pre"),
        "--labels",
        "2-4",
        "--rate",
        "fc8=10",
        "--epochs",
        "1",
    ]
    assert main([*tune, "--compare", "0", "--out", str(tmp_path / "new")]) == 0
    weights = [checkpoint.load(tmp_path / each / "last.pt")["model"] for each in ("pre", "new")]
    assert [w["classifier.fc8.weight"].shape[0] for w in weights] == [2, 3]
    assert "features.conv6.weight" in weights[1]


def test_label_sets_are_parsed_and_renumbered():
    assert Options(labels="0-2,7").classes(10) == [0, 1, 2, 7]
    for wrong in ("x", "3-12", ""):
        with pytest.raises(TrainingError, match="write numbers from 0 to 9"):
            Options(labels=wrong).classes(10)
    data = load(train_tiny.options(labels="2,7", crop=32))
    assert data.classes == ["2", "7"]
    assert data.train.labels.unique().tolist() == [0, 1]
    whole = load(train_tiny.options(crop=32))
    sevens = whole.train.images[whole.train.labels == 7]
    first = data.train.labels.tolist().index(1)
    assert torch.equal(data.train.read(first), sevens[0])


# --- fused against stock -------------------------------------------------------------------------


#: What the default precision of convolutions allows: the error of an output, relative by norm (set_conv_precision).
HIGH = 1e-5


def jitter(net: nn.Module) -> None:
    """Each convolution of the stock network errs by as much as the level "high" may, at random."""

    generator = torch.Generator().manual_seed(9)  # dropout draws from torch's own

    def err(layer: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(output.shape, generator=generator)
        return output + noise * (HIGH * output.detach().norm() / noise.norm())

    for layer in net.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(err)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["highest", "high"])
def test_fused_and_stock_losses_agree_within_rounding_for_fifty_steps(precision):
    """Against the stock network in float64: as near as twice the worst of the stock network's own roundings.

    Training amplifies a rounding from step to step, so the bound is not a number of eps. What stock torch itself gives
    for the same numbers in another layout, or for inputs half an eps away, is what "within rounding" can mean. At the
    level "high" a convolution may err by more than rounding, so there a stock network that does so joins them.
    """
    options = train_tiny.options(preset="cifar10", batch=8, lr=0.01, crop=32, seed=3)
    options.set = ["hidden=32", "dropout=0.5"]
    make_deterministic(options)
    data = load(options)
    found = measure(data.train, takes_levels(options))
    pair = compare.twins(options, 10)
    names = ("planes", "nudged", "jittered", "exact")
    networks = {
        "fused": pair["fused"],
        "stock": pair["stock"],
        **{name: compare.twins(options, 10)["stock"] for name in names},
    }
    jitter(networks["jittered"])
    if precision == "highest":
        del networks["jittered"]
    networks["exact"].double()
    eps = torch.finfo(torch.float32).eps
    prepare = {
        "fused": lambda x: x,
        "stock": lambda x: x,
        "planes": lambda x: x.contiguous(),
        "nudged": lambda x: x * (1 + eps / 2 * torch.ones_like(x).bernoulli_().mul(2).sub(1)),
        "jittered": lambda x: x,
        "exact": lambda x: x.double(),
    }
    before = fastalex.get_conv_precision()
    fastalex.set_conv_precision(precision)
    try:
        losses, _ = compare.train_together(networks, data, options, found, 50, prepare)
    finally:
        fastalex.set_conv_precision(before)
    exact = torch.tensor(losses.pop("exact"), dtype=torch.float64)
    errors = {
        name: (torch.tensor(each, dtype=torch.float64) - exact).abs().cummax(0).values
        for name, each in losses.items()
    }
    fused = errors.pop("fused")
    allowed = 2 * torch.stack(list(errors.values())).amax(0) + 4 * eps * exact
    assert exact[-5:].mean() < exact[:5].mean()  # it learns
    assert (fused <= allowed).all(), (fused / allowed).max()


# --- the sweep and the ablations -----------------------------------------------------------------


def test_a_rate_too_high_for_a_fixed_batch_is_not_called_a_broken_network(tmp_path, monkeypatch):
    options = train_tiny.options(preset="cifar10", batch=32, crop=32, labels="0-2", lr=None)
    run = Sweep(options, tmp_path, Screen(quiet=True))
    run.results["rate"] = {"chosen": 0.3}
    monkeypatch.setattr(
        run, "_losses", lambda rate, *rest, **more: [2.0, 0.01 if rate < 0.05 else 2.15]
    )
    run.overfit_small_sample()
    assert run.results["overfit"]["step"] == 1
    assert run.results["overfit"]["lr"] == pytest.approx(0.03)
    monkeypatch.setattr(run, "_losses", lambda *rest, **more: [2.0, float("nan")])
    run.overfit_small_sample()
    assert run.results["overfit"]["step"] is None


@pytest.mark.slow
def test_the_sweep_goes_through_its_steps(tmp_path, monkeypatch):
    options = train_tiny.options(preset="cifar10", batch=32, crop=32, labels="0-2", lr=None)
    run = Sweep(options, tmp_path, Screen(quiet=True))
    results = run.run(trials=2, coarse_epochs=1, fine_epochs=1)
    assert results["initial_loss"]["expected"] == pytest.approx(1.0986, abs=1e-4)
    assert results["initial_loss"]["close"]
    assert results["overfit"]["step"] is not None
    falls = {row["lr"]: row["fall"] for row in results["rate"]["falls"]}
    assert falls[results["rate"]["chosen"]] == min(falls.values()) < -0.02
    centre = results["rate"]["chosen"]
    assert all(centre / 10 <= row["lr"] <= centre * 10 for row in results["coarse"])
    best = min([*results["coarse"], *results["fine"]], key=lambda row: row["loss"])
    assert results["best"] == best
    assert json.loads((tmp_path / "sweep.json").read_text())["best"]["lr"] == best["lr"]
    assert min(Image.open(tmp_path / "sweep.png").size) > 100


def test_falls_of_losses():
    assert _fall([2.0, 1.5, 1.0, 1.0, 0.5]) == -1.5
    assert _fall([2.0, float("nan")]) == float("inf")


def test_a_network_that_cannot_learn_is_told(tmp_path):
    options = train_tiny.options(preset="cifar10", batch=32, crop=32, labels="0-2", lr=None)
    run = Sweep(options, tmp_path, Screen(quiet=True))
    run._losses = lambda rate, steps, *rest, **more: [1.0] * steps
    with pytest.raises(TrainingError, match="no learning rate makes the loss fall"):
        run.find_rate()


def test_thresholds_are_found_between_epochs():
    assert ablate.first_below([0.8, 0.4, 0.1], 0.25) == pytest.approx(2.5)
    assert ablate.first_below([0.2], 0.25) == 1
    assert ablate.first_below([0.8, 0.4], 0.25) is None


def test_every_ablation_changes_one_thing():
    base = Options(preset="cifar10", set=list(ablate.BASE))
    nets = {
        name: build.make_model(Options(preset="cifar10", set=[*ablate.BASE, *changes]), 10)
        for name, (changes, _) in ablate.VARIANTS.items()
    }
    whole = build.make_model(base, 10)
    assert str(nets["all parts"]) == str(whole)
    texts = {str(net) for net in nets.values()}
    assert len(texts) == len(ablate.VARIANTS)
    kinds = {name: {type(m).__name__ for m in net.modules()} for name, net in nets.items()}
    assert "Tanh" in kinds["tanh"]
    assert not {kind for kind in kinds["no LRN"] if "LRN" in kind or "Response" in kind}
    drops = [m.p for m in nets["no dropout"].modules() if isinstance(m, nn.Dropout)]
    assert not any(drops)


@pytest.mark.slow
def test_ablations_are_tabulated_with_their_spread(tmp_path, monkeypatch):
    chosen = {name: ablate.VARIANTS[name] for name in ("all parts", "no LRN")}
    monkeypatch.setattr(ablate, "VARIANTS", chosen)
    options = train_tiny.options(
        preset="cifar10", crop=32, batch=64, epochs=1, labels="0-2", lr=0.01
    )
    rows = ablate.ablate(options, tmp_path, 2, 0.9, Screen(quiet=True))
    for row in rows:
        errors = torch.tensor([run["test_error"] for run in row["runs"]], dtype=torch.float64)
        assert row["test_error"] == pytest.approx(errors.mean().item())
        assert row["test_error_deviation"] == pytest.approx(errors.std().item())
    page = (tmp_path / "ablations.md").read_text()
    assert "| no LRN |" in page
    assert min(Image.open(tmp_path / "ablations.png").size) > 100
