"""docs/add-an-operator.md is true: its operator is added to a copy of the tree, built, tested, timed and removed."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import tutorial
from tests.support.packaging import copy_of_source, run

PYTHON = shlex.quote(sys.executable)


def git(tree: Path, *arguments: str) -> str:
    command = ["git", "-c", "user.name=reader", "-c", "user.email=reader@localhost", *arguments]
    return subprocess.run(command, cwd=tree, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A clone as a reader has it, with the two packages that an installation puts inside fastalex."""
    copy = copy_of_source(tmp_path / "fastalex")
    git(copy, "init", "-q")
    git(copy, "add", "-A")
    git(copy, "commit", "-q", "-m", "the tree before")
    (copy / "fastalex/kernels").symlink_to(copy / "kernels")
    (copy / "fastalex/cuda").symlink_to(copy / "csrc/cuda")
    (copy / ".git/info/exclude").write_text("fastalex/kernels\nfastalex/cuda\n")
    return copy


def execute(command: str, tree: Path, **environment: str) -> str:
    """A command of the page, with this interpreter; a build in place of one in a new environment."""
    command = command.replace("make build", f"{PYTHON} setup.py -q build_ext --inplace")
    command = re.sub(r"^python\b", lambda _: PYTHON, command)
    result = run(["bash", "-c", command], tree, PYTHONPATH=str(tree), **environment)
    assert result.code == 0, result.text
    return result.text


def test_every_block_is_a_step_or_a_command():
    text = tutorial.PAGE.read_text()
    assert text.count("\n```") == 2 * (len(tutorial.steps()) + len(tutorial.commands()))


def test_the_steps_apply_and_come_off_again(tree):
    """Without a compiler: the operator runs on torch, and nothing of it stays."""
    for step in tutorial.steps():
        step.apply(tree)
    changed = sorted({step.path for step in tutorial.steps() if step.path.endswith(".py")})
    for check in (["check"], ["format", "--check"]):
        result = run([sys.executable, "-m", "ruff", *check, *changed], tree)
        assert result.code == 0, result.text
    code = "import torch, fastalex; print(fastalex.ops.squared_relu(torch.full((1, 1, 1), 3.0)))"
    assert "9." in execute(f"python -c {shlex.quote(code)}", tree)
    *_, removal = tutorial.commands()
    for command in removal:
        execute(command, tree)
    assert git(tree, "status", "--porcelain") == ""


@pytest.mark.slow
def test_the_tutorial_from_its_first_line_to_its_last(tree):
    """Compiles the whole library, in a few minutes; every command as it stands on the page."""
    for step in tutorial.steps():
        step.apply(tree)
    build, removal = tutorial.commands()
    told = [execute(command, tree, FASTALEX_BUILD="cpu") for command in build]
    assert all("passed" in text for text in told[1:-1]), told
    assert "squared_relu/fwd/f32/conv1-b32" in told[-1]
    for command in removal:
        execute(command, tree)
    assert git(tree, "status", "--porcelain") == ""
