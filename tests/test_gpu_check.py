"""`make gpu-check` where there is no GPU: it says so; and its cases and table, on a clock of the CPU."""

from __future__ import annotations

import pytest
import torch

from benchmarks import gpu_check
from fastalex import costs
from fastalex.ops._operator import REGISTRY


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys, tmp_path):
    assert gpu_check.main(["--json", str(tmp_path / "x.json")]) == 2
    assert "sees no CUDA GPU" in capsys.readouterr().err
    assert not (tmp_path / "x.json").exists()


def test_every_operator_has_a_case_its_cost_model_takes():
    found = gpu_check.calls(torch.float16, "meta")
    others = {"augment"}  # works on photographs, and is no part of a network's step
    assert {op for op, _ in found.values()} == set(REGISTRY) - others
    for op, args in found.values():
        assert getattr(costs, op)(*args).bytes > 0


def test_backends_that_cannot_run_say_why():
    def clock(run, repeats):
        run()
        return 1.0

    outcome = gpu_check.compare("lrn", (torch.ones(1, 8, 3, 3), 5, 1e-4, 0.75, 2.0, 1), clock)
    assert outcome["torch"] == 1.0
    for backend in ("cuda", "triton", "cupy"):
        assert f"backend '{backend}' cannot run this lrn" in outcome[backend]
