"""The recipe against the paper's formulas, and the pipeline against torchvision's transforms and NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("torchvision")

from torchvision.transforms import v2

from fastalex import reference
from fastalex.train import Options, PaperSGD, TrainingError
from fastalex.train.batches import Pipeline, TrainingBatches, make_loader, mixed_seed
from fastalex.train.recipe import make_optimizer, make_schedule, parameter_groups
from fastalex.train.statistics import Statistics, measure, takes_levels
from tests.support import train_tiny

RATES = (0.1, 0.1, 0.01, 0.01, 0.001)  # it changes on the way: there the two rules part


def weights_after(optimizer_class, rates, dtype=torch.float64):
    torch.manual_seed(3)
    weight = nn.Parameter(torch.randn(50, dtype=dtype))
    gradients = torch.randn(len(rates), 50, dtype=dtype)
    optimizer = optimizer_class([weight], lr=rates[0], momentum=0.9, weight_decay=5e-4)
    for rate, gradient in zip(rates, gradients, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        weight.grad = gradient.clone()
        optimizer.step()
        assert torch.equal(weight.grad, gradient)
    return weight.detach(), gradients


def paper_rule(rates, gradients, dtype):
    """Section 5, line by line."""
    torch.manual_seed(3)
    w = torch.randn(50, dtype=dtype)
    v = torch.zeros_like(w)
    for lr, g in zip(rates, gradients, strict=True):
        v = 0.9 * v - 0.0005 * lr * w - lr * g
        w = w + v
    return w


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_update_is_the_papers(dtype):
    weight, gradients = weights_after(PaperSGD, RATES, dtype)
    # Five steps of some six roundings each, on values of at most about five.
    tolerance = 5 * 6 * 5 * torch.finfo(dtype).eps
    torch.testing.assert_close(weight, paper_rule(RATES, gradients, dtype), rtol=0, atol=tolerance)


def test_torchs_rule_is_the_same_until_the_rate_changes():
    constant = (0.1,) * 4
    ours, stock = (weights_after(each, constant)[0] for each in (PaperSGD, torch.optim.SGD))
    torch.testing.assert_close(ours, stock, rtol=1e-13, atol=1e-13)
    ours, stock = (weights_after(each, RATES)[0] for each in (PaperSGD, torch.optim.SGD))
    assert (ours - stock).abs().max() > 1e-3


def test_the_optimizer_takes_a_closure_and_skips_what_has_no_gradient():
    used, unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = PaperSGD([used, unused], lr=0.5, momentum=0.0, weight_decay=0.0)

    def closure():
        loss = used.sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 2
    assert used.tolist() == [0.5, 0.5]
    assert unused.tolist() == [1, 1]
    assert unused not in optimizer.state


@pytest.mark.parametrize("argument", ["lr", "momentum", "weight_decay"])
def test_negative_constants_are_refused(argument):
    with pytest.raises(ValueError, match=f"{argument} is -1; it must not be negative"):
        PaperSGD([nn.Parameter(torch.ones(1))], **{argument: -1})


def test_the_rate_is_divided_by_ten_three_times_and_no_more():
    options = Options(lr=0.01, patience=2)
    schedule = make_schedule(make_optimizer(nn.Linear(2, 2), options), options)
    rates = []
    for _ in range(20):
        schedule.step(1.0)
        rates.append(schedule.get_last_lr()[0])
    assert rates[:3] == [0.01] * 3
    assert rates[3:6] == pytest.approx([1e-3] * 3)
    assert sorted(set(rates), reverse=True) == pytest.approx([1e-2, 1e-3, 1e-4, 1e-5])


def layers() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 3), nn.Linear(3, 2))


def test_layers_have_rates_of_their_own_and_freeze():
    model = layers()
    groups = parameter_groups(model, 0.01, {"2": 10.0}, ["0"])
    assert [(len(group["params"]), group["lr"]) for group in groups] == [(2, 0.01), (2, 0.1)]
    assert [p.requires_grad for p in model.parameters()] == [False] * 2 + [True] * 4


def test_layers_that_do_not_exist_are_named():
    with pytest.raises(TrainingError, match="no layer is called fc8; there are 0, 1, 2"):
        parameter_groups(layers(), 0.01, {"fc8": 10.0}, [])
    with pytest.raises(TrainingError, match="every layer is frozen"):
        parameter_groups(layers(), 0.01, {}, ["0", "1", "2"])


def test_options_explain_themselves():
    assert Options(set=["towers=1", "norm=none", "dropout=0.3"]).model_arguments() == {
        "towers": 1,
        "norm": "none",
        "dropout": 0.3,
    }
    with pytest.raises(TrainingError, match="--set towers: write NAME=VALUE"):
        Options(set=["towers"]).model_arguments()
    with pytest.raises(TrainingError, match="--rate fc8: write LAYER=FACTOR"):
        Options(rate=["fc8"]).rates()


def test_the_papers_weights_get_levels_and_torchs_unit_deviation():
    assert takes_levels(Options(preset="paper"))
    assert not takes_levels(Options(preset="paper", set=["init=torch"]))
    assert not takes_levels(Options(preset="paper", levels=False))


# --- statistics ----------------------------------------------------------------------------------


def test_statistics_are_numpys():
    images = train_tiny.data().train
    found = measure(images, levels=False)
    pixels = images.images.numpy().reshape(-1, 3) / 255
    np.testing.assert_allclose(found.mean, images.images.float().mean(0), rtol=1e-6)
    covariance = np.cov(pixels.T, bias=True)
    vectors = found.eigenvectors.double().numpy()
    rebuilt = vectors @ np.diag(found.eigenvalues.double().numpy()) @ vectors.T
    np.testing.assert_allclose(rebuilt, covariance, atol=1e-6)
    assert found.scale == pytest.approx(1 / (255 * np.sqrt(np.trace(covariance) / 3)))
    assert measure(images, levels=True).scale == 1


def test_the_colour_shift_is_the_formula_of_section_4():
    found = measure(train_tiny.data().train, levels=True)
    draws = torch.randn(5, 3)
    expected = [
        255 * sum(a[i] * found.eigenvalues[i] * found.eigenvectors[:, i] for i in range(3))
        for a in draws
    ]
    torch.testing.assert_close(found.colour_shift(draws), torch.stack(expected))


# --- the pipeline --------------------------------------------------------------------------------


def statistics(side: int, image_mean: bool = True) -> Statistics:
    generator = torch.Generator().manual_seed(5)
    mean = torch.rand(side, side, 3, generator=generator) * 255
    return Statistics(
        mean if image_mean else mean[0, 0], torch.rand(3), torch.rand(3, 3), 1 / 58, 1
    )


def chain(image, corner, mirrored, shift, found, crop):
    """The same from torchvision's transforms, an image at a time."""
    top, left = corner.tolist()
    image = v2.functional.crop(image.permute(2, 0, 1), top, left, crop, crop)
    mean = found.mean.permute(2, 0, 1) if found.mean.dim() == 3 else found.mean[:, None, None]
    if found.mean.dim() == 3:
        mean = v2.functional.crop(mean, top, left, crop, crop)
    if mirrored:
        image, mean = v2.functional.horizontal_flip(image), v2.functional.horizontal_flip(mean)
    image = v2.functional.to_dtype(image, torch.float32, scale=False)
    return ((image + shift[:, None, None]) - mean) * found.scale


@pytest.mark.parametrize("image_mean", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_augmentation_is_the_transform_chain_bit_for_bit(dtype, image_mean):
    images = torch.randint(0, 256, (9, 20, 20, 3), dtype=torch.uint8)
    options = Options(crop=13, mirror=True, amp="bf16" if dtype is torch.bfloat16 else "none")
    found = statistics(20, image_mean)
    pipeline = Pipeline(options, found, 10)
    draws = pipeline.draw(images)
    assert draws[1].any()
    assert not draws[1].all()
    made = pipeline.apply(images, draws)
    expected = torch.stack(
        [chain(*each, found, 13).to(dtype) for each in zip(images, *draws, strict=True)]
    )
    assert made.dtype is dtype
    assert torch.equal(made, expected)
    assert made.is_contiguous(memory_format=torch.channels_last)


def test_ten_views_are_torchvisions_ten_crops():
    images = torch.randint(0, 256, (2, 20, 20, 3), dtype=torch.uint8)
    found = Statistics(torch.zeros(3), torch.zeros(3), torch.eye(3), 1.0, 1)
    pipeline = Pipeline(Options(crop=14, mirror=True), found, 10)
    made = [pipeline.apply(images, draws) for draws in pipeline.views(images, ten=True)]
    expected = v2.functional.ten_crop(images.permute(0, 3, 1, 2), [14, 14])
    ours, theirs = (sorted(view.flatten().tolist() for view in views) for views in (made, expected))
    assert ours == theirs
    (centre,) = (pipeline.apply(images, draws) for draws in pipeline.views(images, ten=False))
    assert torch.equal(
        centre, v2.functional.center_crop(images.permute(0, 3, 1, 2), [14, 14]).float()
    )


def test_crops_reach_every_place():
    images = torch.zeros(4000, 6, 7, 3, dtype=torch.uint8)
    pipeline = Pipeline(Options(crop=4, mirror=True), statistics(7), 10)
    corners, mirrored, _ = pipeline.draw(images)
    places, counts = corners.unique(dim=0, return_counts=True)
    assert places.tolist() == [[top, left] for top in range(3) for left in range(4)]
    # Five standard deviations of a binomial count of 4000 draws with p = 1/12.
    assert (counts - 4000 / 12).abs().max() < 5 * (4000 / 12 * 11 / 12) ** 0.5
    assert abs(mirrored.sum().item() - 2000) < 5 * 1000**0.5


def test_a_crop_outside_the_image_is_refused():
    images = torch.zeros(1, 8, 8, 3, dtype=torch.uint8)
    arguments = (torch.tensor([False]), torch.zeros(1, 3), torch.zeros(3), (5, 5), 1.0, 5)
    for corner in ([4, 0], [0, -1]):
        with pytest.raises(ValueError, match=r"it must lie between \[0, 0\] and \[3, 3\]"):
            reference.augment(images, torch.tensor([corner]), *arguments, torch.float32)


def test_cutout_zeroes_a_square_and_mixup_mixes_images_with_their_labels():
    images, labels = torch.ones(64, 3, 16, 16), torch.arange(64) % 10
    pipeline = Pipeline(Options(crop=16, mirror=False, cutout=6), statistics(16), 10)
    cut, same = pipeline.regularise(images.clone(), labels)
    assert torch.equal(same, labels)
    zeros = (cut == 0)[:, 0]
    assert torch.equal(cut == 0, zeros[:, None].expand(-1, 3, -1, -1))
    sides = [zeros.any(dim).sum(1) for dim in (1, 2)]
    assert torch.equal(zeros.sum((1, 2)), sides[0] * sides[1])
    assert max(side.max().item() for side in sides) == 6
    assert min(side.min().item() for side in sides) >= 3  # the centre lies in the image
    pipeline = Pipeline(Options(crop=16, mirror=False, mixup=1.0), statistics(16), 10)
    ramp = labels.float().view(-1, 1, 1, 1).expand_as(images)
    mixed, soft = pipeline.regularise(ramp.clone(), labels)
    # Labels mix as images do: the mean label under the soft label is the mixed image.
    torch.testing.assert_close(mixed[:, 0, 0, 0], soft @ torch.arange(10.0))


# --- batches -------------------------------------------------------------------------------------


def test_batches_are_a_function_of_seed_epoch_and_step():
    images = train_tiny.data().train
    pipeline = Pipeline(Options(crop=12, mirror=True), statistics(14), 3)
    batches = TrainingBatches(images, pipeline, 4, seed=1)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first, again = batches[2, 1], TrainingBatches(images, pipeline, 4, seed=1)[2, 1]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.labels, again.labels)
    for other in (batches[2, 2], batches[3, 1], TrainingBatches(images, pipeline, 4, seed=2)[2, 1]):
        assert not torch.equal(first.images, other.images)
    for epoch in (0, 1):
        assert sorted(batches.order(epoch).tolist()) == list(range(len(images)))
    assert not torch.equal(batches.order(0), batches.order(1))


def test_shards_of_a_batch_are_the_batch():
    images = train_tiny.data().train
    pipeline = Pipeline(Options(crop=12, mirror=True), statistics(14), 3)
    whole = TrainingBatches(images, pipeline, 5, seed=1)
    labels = whole[0, 1].labels
    for rank in (0, 1):
        part = TrainingBatches(images, pipeline, 5, seed=1, shard=(rank, 2))[0, 1]
        assert torch.equal(part.labels, labels[rank::2])


def test_worker_processes_change_nothing():
    images = train_tiny.data().train
    pipeline = Pipeline(Options(crop=12, mirror=True), statistics(14), 3)
    batches = TrainingBatches(images, pipeline, 4, seed=1)
    positions = [(0, step) for step in range(3)]
    here, there = (list(make_loader(batches, workers, positions)) for workers in (0, 2))
    assert len(here) == 3
    for one, other in zip(here, there, strict=True):
        assert torch.equal(one.images, other.images)
        assert one.images.stride() == other.images.stride()
        assert torch.equal(one.labels, other.labels)


def test_mixed_seeds_differ():
    seeds = {mixed_seed(s, e, t) for s in range(20) for e in range(20) for t in range(-1, 20)}
    assert len(seeds) == 20 * 20 * 21
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_every_command_of_the_manual_is_understood():
    import re
    from pathlib import Path

    from fastalex.train.__main__ import COMMANDS, parser

    text = (Path(__file__).parents[1] / "docs" / "training.md").read_text()
    blocks = "".join(re.findall(r"^```sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    found = (
        line.partition("#")[0].partition("-m fastalex.train")[2] for line in blocks.splitlines()
    )
    lines = [words.split() for words in found]
    assert len(lines) >= 10
    for words in lines:
        named = bool(words) and words[0] in COMMANDS
        arguments = parser().parse_args(words if named else ["train", *words])
        assert callable(arguments.run)
