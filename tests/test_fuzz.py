"""What the fuzzers' corpora hold is right; `make fuzz` looks for more."""

from __future__ import annotations

import shutil
import subprocess
import warnings
from pathlib import Path

import pytest
import torch

from tests.fuzz.fuzz_weights import BEFORE, SUFFIXES, try_file
from tests.support.native_build import program

HERE = Path(__file__).parent / "fuzz"


@pytest.mark.parametrize(
    "path", sorted((HERE / "corpus/weights").iterdir()), ids=lambda path: path.name
)
def test_weights(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, on old pickles
        assert try_file(path.read_bytes()) is not path.name.startswith("refused")


def test_a_file_that_loads_half_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fuzzer's own check works."""
    data = (HERE / "corpus/weights/safetensors").read_bytes()
    monkeypatch.setitem(BEFORE, "conv1.weight", torch.zeros(1))
    with pytest.raises(AssertionError, match=r"conv1\.weight changed"):
        try_file(bytes([SUFFIXES.index(".safetensors")]) + data[1:-4])


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to build with")
def test_convolutions() -> None:
    """Without libFuzzer: the same inputs, sanitizers and comparison, from a main function."""
    built = program(HERE / "fuzz_conv.cpp", "address", "g++", "-DFASTALEX_REPLAY")
    inputs = sorted(map(str, (HERE / "corpus/conv").iterdir()))
    done = subprocess.run([built, *inputs], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-6000:]
    assert done.stdout == f"{len(inputs)} inputs\n"
