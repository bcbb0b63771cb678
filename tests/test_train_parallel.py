"""``python -m fastalex.train --parallel``: processes train to the weights that one process trains to."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from fastalex.train import checkpoint
from tests.support.packaging import ROOT, run

#: Two epochs on digits with everything that is random inside the network switched off.
SETTINGS = (
    *("--preset", "cifar10", "--set", "towers=2", "--set", "hidden=32", "--set", "dropout=0"),
    *("--crop", "32", "--epochs", "2", "--batch", "120", "--workers", "0", "--lr", "0.01"),
    *("--compare", "0", "--no-mirror", "--colour", "0", "--device", "cpu", "--stop", "0"),
)


def train(folder: Path, *words: str, processes: int = 1, code: int = 0) -> dict[str, Any]:
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [*start, "-m", "fastalex.train", *words, "--out", str(folder)]
    result = run(command, ROOT, OMP_NUM_THREADS="1")
    assert result.code == code, result.text
    if code:
        return {"text": result.text}
    return {**checkpoint.load(folder / checkpoint.LAST), "text": result.text}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return train(tmp_path_factory.mktemp("alone") / "run", *SETTINGS)


@pytest.mark.parametrize(
    "split",
    [
        "towers",
        pytest.param("data", marks=pytest.mark.slow),
        pytest.param("hybrid", marks=pytest.mark.slow),
    ],
)
def test_two_processes_train_as_one(split: str, alone: dict[str, Any], tmp_path: Path) -> None:
    """The same order and images: losses agree to what float32 sums in another order become over two epochs."""
    spread = train(tmp_path / "run", *SETTINGS, "--parallel", split, processes=2)
    assert f"{split}: each of 2 processes receives" in spread["text"]
    assert spread["model"].keys() == alone["model"].keys()
    for ours, single in zip(spread["history"], alone["history"], strict=True):
        assert ours["loss"] == pytest.approx(single["loss"], rel=2e-3)
        assert ours["train_loss"] == pytest.approx(single["train_loss"], rel=2e-3)
    for name, weight in alone["model"].items():
        # Rounding flips single ReLUs and winners; in 28 steps that moves no layer by a hundredth of itself.
        assert (spread["model"][name] - weight).norm() < 1e-2 * weight.norm(), name
    assert spread["progress"]["seen"] == alone["progress"]["seen"] == 0


def test_a_run_goes_on_with_another_split(alone: dict[str, Any], tmp_path: Path) -> None:
    """One epoch as two towers, the next in a single process."""
    folder = tmp_path / "run"
    train(folder, *SETTINGS, "--epochs", "1", "--parallel", "towers", processes=2)
    result = run(
        [
            *(sys.executable, "-m", "fastalex.train", "--resume", str(folder), "--epochs", "2"),
            *("--parallel", "none", "--compare", "0"),
        ],
        ROOT,
        OMP_NUM_THREADS="1",
    )
    assert result.code == 0, result.text
    state = checkpoint.load(folder / checkpoint.LAST)
    assert state["history"][1]["loss"] == pytest.approx(alone["history"][1]["loss"], rel=2e-3)


def test_parallel_without_torchrun_says_how_to_start(tmp_path: Path) -> None:
    text = train(tmp_path / "run", *SETTINGS, "--parallel", "towers", code=1)["text"]
    assert "start with torchrun --nproc-per-node 2" in text
