"""Where a run computes, and that it repeats."""

from __future__ import annotations

import os

import torch

from fastalex.train import checkpoint
from fastalex.train.errors import TrainingError
from fastalex.train.options import Options


def choose_device(name: str) -> torch.device:
    """``auto``: a GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(name)
    except RuntimeError as failure:
        raise TrainingError(f"--device {name}: {str(failure).splitlines()[0]}") from failure


def make_deterministic(options: Options) -> None:
    """Seeds everything, and allows only algorithms that repeat."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # torch's own LRN has no deterministic gradient on CUDA: the stock network may only be warned about.
    torch.use_deterministic_algorithms(options.deterministic, warn_only=options.stock)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    checkpoint.seed_everything(options.seed)
