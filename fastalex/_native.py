"""Loads the CPU library, and says in one sentence why it is absent where it is."""

from __future__ import annotations

import os
import pathlib
import struct

import torch

ISAS = ("avx512", "avx2", "portable")

#: Why the CPU library cannot serve, or None.
error: str | None = None


def load(stem: str, title: str, absent: str) -> str | None:
    """Loads ``fastalex/<stem>.*so``, which registers ``torch.ops.fastalex<stem>``.

    Returns why it cannot, or None. ``absent`` says how to build what was not.
    """
    libraries = sorted(pathlib.Path(__file__).parent.glob(f"{stem}.*so"))
    if not libraries:
        return (
            f"the {title} was not built: {absent} "
            "pip install --no-build-isolation . in fastalex's source folder"
        )
    if _is_cut_short(libraries[0]):
        return (
            f"the {title} {libraries[0].name} does not load into torch: its file is incomplete; "
            "reinstall fastalex"
        )
    try:
        torch.ops.load_library(libraries[0])
        assert getattr(torch.ops, f"fastalex{stem}").lrn
    except (OSError, RuntimeError, AttributeError) as failure:
        # torch wraps the loader's own words, which name the symbol or the file.
        summary = str(failure.__cause__ or failure).strip().splitlines()[0]
        return (
            f"the {title} {libraries[0].name} does not load into torch {torch.__version__} "
            f"({summary}): reinstall fastalex beside this torch"
        )
    return None


def _is_cut_short(library: pathlib.Path) -> bool:
    """Whether an ELF file ends before its section table: mapping such a file kills the process."""
    with library.open("rb") as file:
        header = file.read(64)
    if len(header) < 64 or not header.startswith(b"\x7fELF\x02\x01"):
        return False  # the loader itself refuses what is no library at all
    table: int = struct.unpack_from("<Q", header, 40)[0]
    entry_size: int
    entries: int
    entry_size, entries = struct.unpack_from("<HH", header, 58)
    return library.stat().st_size < table + entry_size * entries


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


def set_conv_precision(level: int) -> None:
    """0 highest, 1 high, 2 medium: see fastalex.set_conv_precision."""
    torch.ops.fastalex_cpu.set_conv_precision(level)


def set_poison(enabled: bool) -> None:
    """Fills every allocation of the CPU library with NaN: tests see what nobody wrote."""
    torch.ops.fastalex_cpu.set_poison(enabled)


error = load(
    "_cpu",
    "CPU library",
    "install a C++20 compiler, then reinstall: FASTALEX_BUILD=cpu",
)
if error is None:
    _cap_isa()
