"""Writes the ledger of what every Triton kernel compiles to: cd tests && python -m
support.triton_ledger.

The ledger, tests/ledger/triton.json, is reviewed in diffs and checked by
tests/test_triton_ledger.py. Entries of cases that are gone are dropped.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from tests.support import static_ledger, triton_aot, triton_cases

LEDGER = Path(__file__).parent.parent / "ledger" / "triton.json"


def measure(case: triton_cases.Case, arch: str) -> dict:
    """Facts of the case's kernel on one architecture."""
    with triton_aot.compiling(arch, only=case.kernel) as launched:
        case.call()
    (compiled,) = launched
    return triton_aot.facts(arch, compiled)


def names() -> dict[str, tuple[triton_cases.Case, str]]:
    """Every entry: all cases of every architecture."""
    return {
        f"{arch}/{case.name}": (case, arch)
        for arch in triton_aot.TARGETS
        for case in triton_cases.cases(arch)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="make anew the entries whose name holds this")
    parser.add_argument("--missing", action="store_true", help="make only entries the ledger lacks")
    parser.add_argument("--seconds", type=float, default=1e9, help="stop after this long")
    options = parser.parse_args()
    wanted = names()
    before = static_ledger.read(LEDGER) if LEDGER.exists() else {}
    ledger = {name: facts for name, facts in before.items() if name in wanted}
    end = time.monotonic() + options.seconds
    for name, (case, arch) in wanted.items():
        if (
            options.only in name
            and not (options.missing and name in ledger)
            and time.monotonic() < end
        ):
            ledger[name] = measure(case, arch)
            print(
                name,
                ledger[name]["registers"],
                "registers",
                ledger[name]["spills"],
                "spills",
                flush=True,
            )
    static_ledger.write(LEDGER, ledger)
    print(f"{len(ledger)} of {len(wanted)} entries")


if __name__ == "__main__":
    main()
