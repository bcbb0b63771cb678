"""Loads the CPU library, and says in one sentence why it is absent where it is."""

from __future__ import annotations

import os
import pathlib

import torch

ISAS = ("avx512", "avx2", "portable")

#: Why the CPU library cannot serve, or None.
error: str | None = None


def _load() -> str | None:
    folder = pathlib.Path(__file__).parent
    libraries = sorted(folder.glob("_cpu*.so"))
    if not libraries:
        return (
            "the CPU library was not built: install a C++20 compiler, then reinstall with "
            "FASTALEX_BUILD=cpu pip install --no-build-isolation . in fastalex's source folder"
        )
    try:
        torch.ops.load_library(libraries[0])
        torch.ops.fastalex_cpu.isa()
    except (OSError, RuntimeError, AttributeError) as failure:
        summary = str(failure).strip().splitlines()[0]
        return (
            f"the CPU library {libraries[0].name} does not load into torch {torch.__version__} "
            f"({summary}): reinstall fastalex beside this torch"
        )
    return None


def _cap_isa() -> None:
    cap = os.environ.get("FASTALEX_CPU_ISA")
    if cap is None:
        return
    if cap not in ISAS:
        raise ValueError(f"FASTALEX_CPU_ISA is '{cap}'; it can be one of {', '.join(ISAS)}")
    # A cap, not a wish: the best the machine has, at or below it.
    allowed = ISAS[ISAS.index(cap) :]
    set_isa(next(isa for isa in available_isas() if isa in allowed))


def isa() -> str:
    """The instruction set whose kernels run now."""
    return str(torch.ops.fastalex_cpu.isa())


def available_isas() -> tuple[str, ...]:
    """The instruction sets this CPU runs, best first."""
    return tuple(torch.ops.fastalex_cpu.available_isas().split(","))


def set_isa(name: str) -> None:
    torch.ops.fastalex_cpu.set_isa(name)


def set_poison(enabled: bool) -> None:
    """Fills every allocation of the CPU library with NaN: tests see what nobody wrote."""
    torch.ops.fastalex_cpu.set_poison(enabled)


error = _load()
if error is None:
    _cap_isa()
