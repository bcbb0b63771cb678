"""Checkpoints: whole or not there at all, whatever kills the process while it writes one."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch

from fastalex.train.errors import TrainingError, cannot_write

FORMAT = 1
LAST, BEST = "last.pt", "best.pt"


def save(state: dict[str, Any], path: Path) -> None:
    """Writes beside ``path``, flushes to the disk, then renames: a reader finds the old file or the new one.

    Raises:
        TrainingError: where it cannot be written; what stood at ``path`` stays.
    """
    write_atomically(path, lambda file: torch.save({"format": FORMAT, **state}, file))


def save_json(value: Any, path: Path) -> None:
    text = json.dumps(value, indent=2).encode() + b"\n"
    write_atomically(path, lambda file: file.write(text))


def write_atomically(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    partial = path.with_name(path.name + ".partial")
    try:
        with _Watched(partial) as file:
            try:
                write(file)
            except RuntimeError:
                if file.failure is not None:  # torch.save hides the reason it could not write
                    raise file.failure from None
                raise
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as failure:
        partial.unlink(missing_ok=True)
        raise cannot_write(path, failure) from failure


class _Watched:
    """A file that remembers the error of a write."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self.failure: OSError | None = None
        self.flush, self.fileno = self._file.flush, self._file.fileno

    def write(self, data: Any) -> int:
        try:
            return self._file.write(data)
        except OSError as failure:
            self.failure = failure
            raise

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._file.close()
        except OSError as failure:  # closing writes what was left
            if self.failure is None:
                raise failure


def load(path: Path | str, device: str | torch.device = "cpu") -> dict[str, Any]:
    """A checkpoint.

    Raises:
        TrainingError: where there is none, or the file is no checkpoint of this format.
    """
    try:
        state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError as failure:
        raise TrainingError(f"there is no checkpoint {path}") from failure
    except Exception as failure:  # torch.load has a different error for every way a file is broken
        raise TrainingError(
            f"{path} is not a checkpoint: {str(failure).splitlines()[0]}"
        ) from failure
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise TrainingError(f"{path} is not a checkpoint of fastalex.train, format {FORMAT}")
    return state


def random_state() -> dict[str, Any]:
    """The generators a step may draw from."""
    state: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([each.cpu() for each in state["cuda"]])


def seed_everything(seed: int) -> None:
    random.seed(seed)
    torch.manual_seed(seed)
