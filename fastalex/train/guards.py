"""What reaches a run from outside: signals that ask it to stop, and workers that die."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from typing import Any

from fastalex.train.errors import TrainingError


class StopSignals:
    """While entered, SIGINT and SIGTERM ask for a stop; a second one ends the process at once.

    Args:
        told: called at the first signal.
    """

    def __init__(self, told: Callable[[], None]) -> None:
        self.asked = False
        self._told = told
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        self.asked = False
        with contextlib.suppress(ValueError):  # only the main thread may listen
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _ask(self, number: int, frame: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        self._told()


@contextlib.contextmanager
def explained_workers() -> Iterator[None]:
    """A data worker that dies takes no weights with it."""
    try:
        yield
    except (RuntimeError, ConnectionError, EOFError) as failure:
        # Torch notices by a signal; or else the pipe that a batch was to come through breaks first.
        if isinstance(failure, RuntimeError) and "DataLoader worker" not in str(failure):
            raise
        reason = str(failure).partition("\n")[0] or type(failure).__name__
        raise TrainingError(
            f"a process that prepared batches died: {reason}. Go on with --resume; where memory ran out, "
            "use fewer --workers"
        ) from failure
