"""What ends a run: each message says what happened, what is safe, and what to do."""

from __future__ import annotations

import errno
import importlib
from pathlib import Path
from typing import Any


class TrainingError(RuntimeError):
    """A run cannot start or go on; the message is meant for its user."""


class Interrupted(Exception):
    """The user or the system asked the run to stop; it has been saved."""


def extra(module: str) -> Any:
    """Imports a module of the ``train`` extra.

    Raises:
        TrainingError: where it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as failure:
        package = module.partition(".")[0]
        raise TrainingError(
            f"{package} cannot be imported ({failure}): pip install 'fastalex[train]'"
        ) from failure


def cannot_write(path: Path, failure: OSError) -> TrainingError:
    """The sentence for a file or folder that could not be written."""
    if failure.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return TrainingError(
            f"{path} could not be written: {failure.strerror}. The checkpoint before it is intact; "
            "make room, then go on with --resume"
        )
    return TrainingError(
        f"{path} could not be written: {failure.strerror}; give a folder you may write to with --out"
    )
