"""Traces on the host runtime: sectors a request, shared-memory wavefronts, bytes, per line."""

from __future__ import annotations

import subprocess
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.cuda_host import HostCuda

#: Headers whose lines are plumbing: an access belongs to the kernel line that called them.
PLUMBING = {"pack.cuh", "ptx.cuh", "host_ptx.h", "host_cuda.h"}


@dataclass
class Line:
    """One source line and memory; units are 32-byte sectors, or wavefronts of shared memory."""

    requests: int = 0
    threads: int = 0
    bytes: int = 0
    units: int = 0
    ideal: int = 0


@dataclass
class Trace:
    touched_bytes: int = 0
    lines: dict[tuple[str, str, str], Line] = field(default_factory=dict)  # place, memory, kind

    def of(self, memory: str) -> dict[str, Line]:
        return {
            f"{place} {kind}": line
            for (place, where, kind), line in self.lines.items()
            if where == memory
        }


def _places(library: Path, addresses: list[str]) -> dict[str, str]:
    """The kernel line behind each program counter: the innermost frame that is not plumbing."""
    done = subprocess.run(
        ["addr2line", "-i", "-a", "-e", str(library)],
        input="\n".join(hex(int(a) - 1) for a in addresses),
        capture_output=True,
        text=True,
        check=True,
    )
    places: dict[str, str] = {}
    frames: list[str] = []
    blocks = done.stdout.split("0x")[1:]
    for address, block in zip(addresses, blocks, strict=True):
        frames = [line.split(" ")[0].rsplit("/", 1)[-1] for line in block.splitlines()[1:]]
        kernel = [f for f in frames if f.split(":")[0] not in PLUMBING]
        places[address] = (kernel or frames)[0]
    return places


def trace(host: HostCuda, call: Callable[[], object]) -> Trace:
    """Runs `call` on a library of the trace variant."""
    host.lib.host_cuda_trace_begin()
    call()
    first, *rows = host.lib.host_cuda_trace_end().decode().splitlines()
    result = Trace(touched_bytes=32 * int(first.split()[1]))
    places = _places(host.path, sorted({row.split()[0] for row in rows}))
    lines: dict[tuple[str, str, str], Line] = defaultdict(Line)
    for row in rows:
        address, memory, kind, *numbers = row.split()
        line = lines[places[address], memory, kind]
        for name, number in zip(
            ("requests", "threads", "bytes", "units", "ideal"), numbers, strict=True
        ):
            setattr(line, name, getattr(line, name) + int(number))
    result.lines = dict(lines)
    return result
