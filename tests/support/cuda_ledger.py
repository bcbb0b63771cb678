"""Static facts about compiled kernels: registers, spills, instruction counts (cuobjdump)."""

from __future__ import annotations

import collections
import json
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

LEDGER = Path(__file__).resolve().parents[1] / "ledger" / "cuda.json"
RESOURCE = re.compile(r"Function (\S+):\s*\n\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Za-z0-9_.]*)")


def tool(name: str) -> str | None:
    """cuobjdump or nvdisasm: from pip's nvidia packages, else from PATH."""
    site = Path(sysconfig.get_paths()["purelib"]) / "nvidia"
    found = [*site.glob(f"cu13/bin/{name}"), *site.glob(f"*/bin/{name}")]
    return str(found[0]) if found else shutil.which(name)


def unavailable() -> str | None:
    missing = [name for name in ("cuobjdump", "nvdisasm") if tool(name) is None]
    packages = " ".join(f"nvidia-cuda-{name}" for name in missing)
    return f"pip install {packages}" if missing else None


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def demangle(names: list[str]) -> dict[str, str]:
    """Mangled names to expressions such as fastalex::lrn_channels_last<__half, 8, 5>."""
    done = subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
    )
    plain = [re.sub(r"^void (.*)\(.*\)$", r"\1", line) for line in done.stdout.splitlines()]
    return dict(zip(names, plain, strict=True))


def resources(binary: Path) -> dict[str, dict[str, int]]:
    """{kernel expression: registers, stack, local} of a cubin, an object or a library."""
    rows = RESOURCE.findall(_run(str(tool("cuobjdump")), "--dump-resource-usage", str(binary)))
    names = demangle([row[0] for row in rows])
    return {
        names[name]: {"registers": int(registers), "stack": int(stack), "local": int(local)}
        for name, registers, stack, _, local in rows
        if names[name].startswith("fastalex::")
    }


#: What the ledger counts: tensor-core products, matrix loads, copies, global accesses.
KINDS = {
    "mma": r"HMMA",
    "ldmatrix": r"LDSM",
    "async_copy": r"LDGSTS",
    "global_wide": r"(LDG|STG)\..*128",
    "global": r"(LDG|STG)",
    "spill": r"(LDL|STL)",
    "barrier": r"BAR",
}


def instructions(binary: Path) -> dict[str, dict[str, int]]:
    """{kernel expression: how often each kind of instruction stands in its code}."""
    counts: dict[str, collections.Counter[str]] = {}
    current = ""
    for line in _run(str(tool("cuobjdump")), "-sass", str(binary)).splitlines():
        if "Function :" in line:
            current = line.split(":")[1].strip()
            counts[current] = collections.Counter()
        elif current and (match := INSTRUCTION.match(line)):
            opcode = match[1]
            counts[current]["all"] += 1
            for kind, pattern in KINDS.items():
                counts[current][kind] += bool(re.match(pattern, opcode))
    names = demangle(list(counts))
    return {
        names[mangled]: dict(counter)
        for mangled, counter in counts.items()
        if names[mangled].startswith("fastalex::")
    }


def facts(binary: Path) -> dict[str, dict[str, int]]:
    used, code = resources(binary), instructions(binary)
    return {name: {**used[name], **code.get(name, {})} for name in sorted(used)}


def load() -> dict:
    return json.loads(LEDGER.read_text())


def save(architecture: str, table: dict[str, dict[str, int]]) -> None:
    """Rewrites one architecture of the ledger, a line a kernel."""
    ledger = load() if LEDGER.exists() else {}
    ledger[architecture] = table
    lines = [
        f'  "{arch}": {{\n'
        + ",\n".join(f"    {json.dumps(k)}: {json.dumps(v)}" for k, v in kernels.items())
        + "\n  }"
        for arch, kernels in sorted(ledger.items())
    ]
    LEDGER.write_text("{\n" + ",\n".join(lines) + "\n}\n")
