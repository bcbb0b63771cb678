"""Refuses subinterpreters before torch is imported: it loads in one interpreter of a process, and hangs in others."""

from __future__ import annotations

import importlib
import importlib.util


def refuse_subinterpreters() -> None:
    """Raises ImportError in any interpreter but the process's first."""
    for name in ("_interpreters", "_xxsubinterpreters"):  # of Python 3.13, and of those before
        if importlib.util.find_spec(name) is None:
            continue
        interpreters = importlib.import_module(name)
        if interpreters.get_current() != interpreters.get_main():
            raise ImportError(
                "fastalex does not run in a subinterpreter, because torch does not: import it in the main "
                "interpreter, and use threads or processes"
            )
        return


refuse_subinterpreters()
