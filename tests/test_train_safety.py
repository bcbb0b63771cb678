"""A run that is killed, interrupted or starved loses nothing, and says what happened."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("torchvision")
pytest.importorskip("rich")

from PIL import Image

from fastalex.train import Interrupted, Trainer, TrainingError, checkpoint
from fastalex.train.__main__ import main
from fastalex.train.build import take_weights
from fastalex.train.data import DEFAULTS, load
from fastalex.train.errors import extra
from tests.support import train_tiny

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def restore_determinism():
    fill = torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run that nobody disturbed."""
    run = train_tiny.trainer(tmp_path_factory.mktemp("straight"), save_every=2)
    run.fit()
    return run


def assert_same_run(one: Trainer, other: Trainer) -> None:
    assert_same(one.model.state_dict(), other.model.state_dict())
    assert_same(one.optimizer.state_dict(), other.optimizer.state_dict())
    assert_same(one.schedule.state_dict(), other.schedule.state_dict())
    assert one.progress == other.progress
    for row, same in zip(one.history, other.history, strict=True):
        rates = ("images_per_second", "waited")
        assert {**row, **dict.fromkeys(rates)} == {**same, **dict.fromkeys(rates)}
    best = [checkpoint.load(run.folder / "best.pt")["model"] for run in (one, other)]
    assert_same(*best)


def assert_same(one, other):
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    else:
        assert one == other


def go_on(folder: Path, **changes: object) -> Trainer:
    torch.manual_seed(99)  # a new process starts anywhere
    run = train_tiny.trainer(folder, **{"save_every": 2, **changes})
    run.resume()
    run.fit()
    return run


#: Twenty images in steps of four: five steps an epoch, checkpoints after steps 2 and 4 and at its end.
SLOW_POINTS = ("step:3", "step:9", "step:15", "backward:7", "write:40", "rename:3", "rename:9")
POINTS = [
    *("step:1", "write:4", "renamed:3"),
    *(pytest.param(point, marks=pytest.mark.slow) for point in SLOW_POINTS),
]


@pytest.mark.parametrize("point", POINTS)
def test_killed_runs_go_on_bit_for_bit(straight, tmp_path, point):
    command = [sys.executable, "-m", "tests.support.train_tiny", str(tmp_path), point]
    killed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    for file in tmp_path.glob("*.pt"):
        checkpoint.load(file)  # what is there is whole
    assert_same_run(go_on(tmp_path), straight)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("step", [3, 10])  # in the middle of an epoch, and its last
def test_interrupted_runs_are_saved_and_go_on(straight, tmp_path, monkeypatch, number, step):
    run = train_tiny.trainer(tmp_path, save_every=0)
    original, left = Trainer._step, [step]

    def interrupting(self, batch):
        original(self, batch)
        left[0] -= 1
        if left[0] == 0:
            signal.raise_signal(number)

    monkeypatch.setattr(Trainer, "_step", interrupting)
    handler = signal.getsignal(number)
    with pytest.raises(Interrupted, match=f"saved in .* step {(step - 1) % 5 + 1}; go on with"):
        run.fit()
    assert signal.getsignal(number) is handler
    monkeypatch.undo()
    assert_same_run(go_on(tmp_path, save_every=0), straight)


def test_a_second_interrupt_leaves_at_once(tmp_path, monkeypatch):
    run = train_tiny.trainer(tmp_path)

    def twice(self, batch):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Trainer, "_step", twice)
    with pytest.raises(KeyboardInterrupt):
        run.fit()


def test_a_loss_that_is_not_a_number_ends_the_run_with_the_last_checkpoint_intact(tmp_path):
    run = train_tiny.trainer(tmp_path, save_every=1, epochs=2)
    run.fit()
    before = (tmp_path / "last.pt").read_bytes()
    broken = train_tiny.trainer(tmp_path, save_every=1, epochs=3)
    broken.resume()
    with torch.no_grad():
        broken.model[-1].bias[0] = float("nan")
    with pytest.raises(
        TrainingError, match=r"became nan in epoch 3, step 1.*last.pt is intact.*--lr"
    ):
        broken.fit()
    assert (tmp_path / "last.pt").read_bytes() == before


def test_weights_that_are_not_numbers_are_never_saved(tmp_path, monkeypatch):
    """A loss may be finite, and the step after it not."""
    train_tiny.trainer(tmp_path, save_every=1, epochs=1).fit()
    before = (tmp_path / "last.pt").read_bytes()
    run = train_tiny.trainer(tmp_path, save_every=1, epochs=2)
    run.resume()
    original = run.optimizer.step

    def overflow():
        original()
        with torch.no_grad():
            run.model[0].weight[0] = float("inf")

    monkeypatch.setattr(run.optimizer, "step", overflow)
    with pytest.raises(
        TrainingError, match=r"0.weight is no longer finite in epoch 2, step 1.*last.pt is intact"
    ):
        run.fit()
    assert (tmp_path / "last.pt").read_bytes() == before


def test_a_run_that_had_ended_says_so(tmp_path, monkeypatch):
    run = train_tiny.trainer(tmp_path, epochs=1)
    said = []
    monkeypatch.setattr(run.screen, "say", said.append)
    run.fit()
    assert not any("had ended" in line for line in said)
    again = train_tiny.trainer(tmp_path, epochs=1)
    again.resume()
    monkeypatch.setattr(again.screen, "say", said.append)
    again.fit()
    assert said[-1] == "the run had ended after epoch 1: nothing is trained"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_loses_nothing(tmp_path):
    run = train_tiny.trainer(tmp_path, epochs=1)
    run.fit()
    before = (tmp_path / "last.pt").read_bytes()
    (tmp_path / "last.pt.partial").symlink_to("/dev/full")
    more = train_tiny.trainer(tmp_path, epochs=2, save_every=1)
    more.resume()
    with pytest.raises(
        TrainingError, match=r"No space left on device.*before it is intact; make room"
    ):
        more.fit()
    assert (tmp_path / "last.pt").read_bytes() == before
    assert not (tmp_path / "last.pt.partial").exists()


@pytest.fixture
def nobody():
    """A user who may write nowhere in the tests' folders, root's rights put aside."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    yield
    os.seteuid(0)


def test_a_folder_that_cannot_be_made_or_written_is_named(tmp_path, request):
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match=r"file/run cannot be made: Not a directory.*--out"):
        train_tiny.trainer(tmp_path / "file" / "run").fit()
    (tmp_path / "run").mkdir()
    (tmp_path / "run").chmod(0o555)
    for folder in reversed(tmp_path.parents):  # let anybody in, to look
        if folder.stat().st_uid == os.getuid() and len(folder.parts) > 2:
            folder.chmod(folder.stat().st_mode | 0o111)
    tmp_path.chmod(0o555)
    request.getfixturevalue("nobody")
    with pytest.raises(TrainingError, match=r"new cannot be made: Permission denied.*--out"):
        train_tiny.trainer(tmp_path / "new").fit()
    with pytest.raises(
        TrainingError, match=r"options.json could not be written: Permission denied.*--out"
    ):
        train_tiny.trainer(tmp_path / "run").fit()


def test_a_killed_worker_is_explained_and_loses_nothing(straight, tmp_path, monkeypatch):
    run = train_tiny.trainer(tmp_path, workers=1, save_every=2)
    original, seen = Trainer._step, [0]

    def killing(self, batch):
        original(self, batch)
        seen[0] += 1
        if seen[0] == 7:
            for child in torch.multiprocessing.active_children():
                os.kill(child.pid, signal.SIGKILL)

    monkeypatch.setattr(Trainer, "_step", killing)
    with pytest.raises(TrainingError, match=r"prepared batches died: .*Go on with --resume"):
        run.fit()
    monkeypatch.undo()
    assert_same_run(go_on(tmp_path), straight)


def test_files_that_are_no_checkpoints_are_refused(tmp_path):
    with pytest.raises(TrainingError, match="there is no checkpoint"):
        checkpoint.load(tmp_path / "none.pt")
    (tmp_path / "cut.pt").write_bytes(b"PK\x03\x04 and nothing more")
    with pytest.raises(TrainingError, match=r"cut.pt is not a checkpoint"):
        checkpoint.load(tmp_path / "cut.pt")
    torch.save({"weights": torch.ones(2)}, tmp_path / "other.pt")
    with pytest.raises(TrainingError, match=r"not a checkpoint of fastalex.train, format 1"):
        checkpoint.load(tmp_path / "other.pt")


# --- the recipe as the trainer runs it -----------------------------------------------------------


def test_a_run_without_improvement_stops_early(tmp_path):
    run = train_tiny.trainer(tmp_path, lr=0.0, epochs=50, stop=2)
    run.model.eval()  # without a rate and with fixed batch statistics, no epoch is better than the first
    for module in run.model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.0
    run.fit()
    assert len(run.history) == 3
    assert run.progress.best_epoch == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "sgd"},
        {"amp": "bf16"},
        {"clip": 1.0},
        {"mixup": 0.4, "cutout": 3},
        {"colour": 0.0},
    ],
    ids=str,
)
def test_options_train_and_change_the_run(straight, tmp_path, changes):
    run = train_tiny.trainer(tmp_path, save_every=2, lr=0.01, **changes)
    run.fit()
    assert run.history[-1]["loss"] < 1.1
    other = straight.model.state_dict()
    assert any(not torch.equal(run.model.state_dict()[name], other[name]) for name in other)


def test_clipping_bounds_the_gradient(tmp_path, monkeypatch):
    run = train_tiny.trainer(tmp_path, clip=0.01, epochs=1)
    norms = []

    def record(closure=None):
        norms.append(torch.cat([p.grad.flatten() for p in run.model.parameters()]).norm().item())

    monkeypatch.setattr(run.optimizer, "step", record)
    run.fit()
    assert norms
    assert max(norms) <= 0.01 * (1 + 1e-5)


def test_weights_of_other_shapes_are_left(tmp_path):
    donor, taker = train_tiny.net(), train_tiny.net()
    taker[-1] = nn.Linear(8 * 3 * 3, 7)
    fresh = taker[-1].weight.clone()
    assert take_weights(taker, donor.state_dict()) == ["7"]
    assert torch.equal(taker[0].weight, donor[0].weight)
    assert torch.equal(taker[-1].weight, fresh)
    with pytest.raises(TrainingError, match="no weight of the checkpoint fits"):
        take_weights(taker, {"other": torch.ones(1)})


# --- data ----------------------------------------------------------------------------------------


def folder_options(root: Path, **changes: object):
    return train_tiny.options(data="folder", root=str(root), crop=227, **changes)


@pytest.fixture
def image_folder(tmp_path):
    """Two classes of six images in train/ and two in val/, one of them cut short."""
    for part, count in (("train", 6), ("val", 2)):
        for label in ("cat", "dog"):
            folder = tmp_path / "images" / part / label
            folder.mkdir(parents=True)
            for index in range(count):
                values = torch.randint(0, 256, (30, 40, 3), dtype=torch.uint8)
                Image.fromarray(values.numpy()).save(folder / f"{index}.png")
    broken = tmp_path / "images" / "train" / "cat" / "3.png"
    broken.write_bytes(broken.read_bytes()[:400])
    return tmp_path / "images"


def pooled_net() -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 2))


def test_unreadable_images_are_skipped_and_counted(image_folder, tmp_path):
    options = folder_options(image_folder, epochs=2, max_corrupt=0.2, levels=False)
    data = load(options)
    assert data.classes == ["cat", "dog"]
    assert data.train.read(0).shape == (256, 256, 3)
    run = Trainer(pooled_net(), data, options, tmp_path / "run")
    run.fit()
    (report,) = run.progress.unreadable
    assert "cat/3.png" in report
    assert run.statistics.images == 11


def test_too_many_unreadable_images_end_the_run(image_folder, tmp_path):
    options = folder_options(image_folder, epochs=1, max_corrupt=0.01, levels=False)
    run = Trainer(pooled_net(), load(options), options, tmp_path / "run")
    with pytest.raises(TrainingError, match=r"1 of 12 training images cannot be read.*cat/3.png"):
        run.fit()


def test_a_crop_larger_than_the_images_is_refused(tmp_path):
    with pytest.raises(TrainingError, match="--crop is 15; the images are 14 pixels wide"):
        train_tiny.trainer(tmp_path, crop=15).fit()


def test_digits_are_split_for_good():
    pytest.importorskip("sklearn")
    options = train_tiny.options(preset=None, batch=None, crop=None)
    data = load(options)
    assert (options.preset, options.batch) == ("cifar10", DEFAULTS["digits"]["batch"])
    parts = [data.train, data.validation, data.test]
    assert [len(part) for part in parts] == [1257, 180, 360]
    assert data.train.images.shape[1:] == (36, 36, 3)
    assert data.train.images.max() == 255
    for part in parts:
        counts = part.labels.bincount(minlength=10)
        assert counts.max() - counts.min() <= 0.1 * counts.sum() / 10 + 2
    again = load(train_tiny.options(seed=5, crop=32))
    assert torch.equal(data.test.images, again.test.images)


def test_cifar10_is_read_from_its_folder(tmp_path, monkeypatch):
    import pickle

    datasets = pytest.importorskip("torchvision.datasets")
    pytest.importorskip("sklearn")
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    for name, count in (*((f"data_batch_{i}", 1100) for i in range(1, 6)), ("test_batch", 100)):
        pixels = torch.randint(0, 256, (count, 3072), dtype=torch.uint8, generator=generator)
        values = {"data": pixels.numpy(), "labels": [i % 10 for i in range(count)]}
        (folder / name).write_bytes(pickle.dumps(values))
    names = [f"class{i}" for i in range(10)]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    with pytest.raises(TrainingError, match=r"CIFAR-10 is not whole in .* or add --download"):
        load(train_tiny.options(data="cifar10", root=str(tmp_path)))
    for check in ("_check_integrity", "_load_meta"):
        monkeypatch.setattr(datasets.CIFAR10, check, lambda self: True)
    monkeypatch.setattr(datasets.CIFAR10, "classes", names, raising=False)
    data = load(train_tiny.options(data="cifar10", root=str(tmp_path)))
    assert [len(part) for part in (data.train, data.validation, data.test)] == [500, 5000, 100]
    # Rows of a file are planes; what is stored is pixels, four more on each side.
    stored = pickle.loads((folder / "test_batch").read_bytes())["data"][7].reshape(3, 32, 32)
    assert (data.test.read(7)[4:36, 4:36].permute(2, 0, 1).numpy() == stored).all()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "folder"], "folder needs --root"),
        (["--data", "folder", "--root", "/nowhere"], "/nowhere/train is missing"),
        (["--data", "cifar10"], "cifar10 needs --root"),
        (["--data", "cifar10", "--root", "/nowhere"], "CIFAR-10 is not whole in /nowhere"),
        (["--resume", "/nowhere"], "/nowhere holds no run"),
        (["--preset", "none"], "--preset none: no preset 'none'"),
        (["--preset", "paper", "--set", "towers=3"], "--preset paper: towers is 3"),
        (["--preset", "paper", "--set", "tower=3"], "--preset paper: "),
        (["--preset", "paper", "--device", "tpu"], "--device tpu"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_the_command_line_explains_what_it_cannot_do(capsys, tmp_path, words, message):
    where = [] if "--resume" in words else ["--out", str(tmp_path / "run")]
    assert main([*words, *where]) == 1
    assert message in capsys.readouterr().err


def test_missing_extras_are_named():
    with pytest.raises(TrainingError, match=r"pip install 'fastalex\[train\]'"):
        extra("no_such_package.module")
