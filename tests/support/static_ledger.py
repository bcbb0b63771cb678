"""What the machine code of a compiled kernel shows without a GPU, and how a ledger of such facts is
compared.

    facts = cubin_facts(cubin_bytes, threads=256)     NVIDIA, any compiler
    {name: facts} = library_facts(path)                every kernel of nvcc's object or library
    facts = amd_facts(assembly_text, threads=256)     AMD, from Triton's `amdgcn` stage
    problems = regressions(recorded, found)            [] or one sentence a regression

A ledger is a JSON object {case name: facts}; `write` sorts it so that its diffs can be reviewed.
"""

from __future__ import annotations

import collections
import functools
import glob
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

# per SM: warps, blocks, bytes of shared memory
SM_LIMITS = {
    80: (64, 32, 164 << 10),
    86: (48, 16, 100 << 10),
    89: (48, 24, 100 << 10),
    90: (64, 32, 228 << 10),
    100: (64, 32, 228 << 10),
    120: (48, 24, 100 << 10),
}
RESERVED_SHARED = 1024  # the driver's own, a block, from sm_80 on
MMA = re.compile(r"(HMMA|IMMA|DMMA|HGMMA|QGMMA|UTC\w*MMA)\b")
COUNT_SLACK = 0.05  # a compiler's schedule may move counts this much


def tool(name: str) -> str:
    """Path of a CUDA binary utility."""
    try:
        import triton

        bundled = glob.glob(
            os.path.join(os.path.dirname(triton.__file__), "backends/nvidia/bin", name)
        )
    except ImportError:
        bundled = []
    found = (bundled or [shutil.which(name) or f"/usr/local/cuda/bin/{name}"])[0]
    if not os.path.exists(found):
        raise FileNotFoundError(f"{name} is not there: install triton or the CUDA toolkit")
    return found


def unavailable() -> str | None:
    """Why machine code cannot be read here, or None."""
    try:
        for name in ("cuobjdump", "nvdisasm"):
            tool(name)
    except FileNotFoundError as missing:
        return str(missing)
    return None


def run_tool(name: str, *arguments: str) -> str:
    return subprocess.run(
        [tool(name), *arguments], capture_output=True, text=True, check=True
    ).stdout


RESOURCE = re.compile(r"Function (\S+):\s*\n\s*REG:(\d+) STACK:(\d+) SHARED:(\d+)")


def resources(binary: bytes) -> dict[str, dict[str, int]]:
    """{kernel as C++ writes it: registers, stack, shared} of a cubin, an object or a library."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        rows = RESOURCE.findall(run_tool("cuobjdump", "--dump-resource-usage", file.name))
    return {
        expression(name): {"registers": int(r), "stack": int(stack), "shared": int(shared)}
        for name, r, stack, shared in rows
    }


@functools.cache
def expression(mangled: str) -> str:
    """Such as lrn_channels_last<__half, 8, 5>."""
    plain = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout
    return re.sub(r"^void (.*)\(.*\)$", r"\1", plain.strip()).replace("fastalex::", "")


def library_facts(library: Path, shared: Mapping[str, int]) -> dict[str, dict]:
    """{kernel: facts} of every kernel in a library of nvcc's; ``shared`` is what a launch of each asks for."""
    with tempfile.TemporaryDirectory() as folder:
        command = [tool("cuobjdump"), "-xelf", "all", str(library.resolve())]
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
        found = {}
        for path in sorted(Path(folder).glob("*.cubin")):
            machine = Machine(path)
            for mangled in machine.code:
                name = expression(mangled)
                threads = launch_bound(machine.layout, mangled)
                found[name] = machine.facts(mangled, threads, shared.get(name))
    return found


def launch_bound(layout: str, mangled: str) -> int:
    """The most threads a block may have: __launch_bounds__."""
    section = layout.partition(f"\n.nv.info.{mangled}\n")[
        2
    ]  # not its line in the table of sections
    found = re.search(r"EIATTR_MAX_THREADS.*?\n.*?Value:\s*(0x[0-9a-f]+) ", section, re.S)
    return int(found[1], 16) if found else 1024


def cubin_facts(cubin: bytes, threads: int, shared: int | None = None) -> dict:
    """Facts of the one kernel in a cubin; `shared` is what a launch asks for, where the cubin doesn't say."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        machine = Machine(Path(file.name))
    (kernel,) = machine.code
    return machine.facts(kernel, threads, shared)


class Machine:
    """A cubin, taken apart."""

    def __init__(self, cubin: Path) -> None:
        self.usage = run_tool("cuobjdump", "--dump-resource-usage", str(cubin))
        self.layout = run_tool("cuobjdump", "-elf", str(cubin))
        self.arch = int(re.search(r"sm_(\d+)", self.layout)[1])
        self.code = instructions(run_tool("nvdisasm", "-c", str(cubin)))

    def facts(self, kernel: str, threads: int, shared: int | None) -> dict:
        registers, static = map(
            int,
            re.search(
                rf"Function {re.escape(kernel)}:\s*\n\s*REG:(\d+).*?SHARED:(\d+)", self.usage
            ).groups(),
        )
        code = self.code[kernel]
        shared = static if shared is None else shared
        ops = [op for op, _ in code]
        return {
            "registers": registers,
            "spills": sum(op.startswith(("LDL", "STL")) for op in ops),
            "shared": shared,
            "warps": -(-threads // 32),
            "occupancy": occupancy(self.arch, -(-threads // 32), registers, shared),
            "mma": tally(
                re.sub(r"\.(BF16|F16|F32|TF32|SP|gdesc)\b", "", op) for op in ops if MMA.match(op)
            ),
            "loads": widths(ops, "LDG"),
            "async_loads": widths(ops, "LDGSTS"),
            "stores": widths(ops, "STG"),
            "shared_accesses": sum(op.startswith(("LDS", "STS")) for op in ops),
            "shuffles": sum(op.startswith("SHFL") for op in ops),
            "barriers": sum(op.startswith("BAR") for op in ops),
            "instructions": len(ops),
            "inner_loops": [len(body) for body in inner_loops(code)],
        }


def instructions(sass: str) -> dict[str, list[tuple[str, str]]]:
    """{kernel: its code}: (opcode, operands), with ("label", name) where a branch may land."""
    kernels: dict[str, list[tuple[str, str]]] = {}
    code: list[tuple[str, str]] = []
    for line in sass.splitlines():
        if section := re.match(r"\.text\.(\S+):", line.strip()):
            code = kernels.setdefault(section[1], [])
        elif label := re.match(r"\s*(\.L\S+):", line):
            code.append(("label", label[1]))
        elif op := re.search(
            r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Za-z0-9_.]*)\s*(.*?);", line
        ):
            code.append((op[1], op[2]))
    return kernels


def inner_loops(code: list[tuple[str, str]]) -> list[list[tuple[str, str]]]:
    """The bodies of loops that hold no other loop."""
    place = {name: i for i, (op, name) in enumerate(code) if op == "label"}
    loops = []
    for i, (op, operands) in enumerate(code):
        target = re.search(r"\.L\w+", operands) if op.startswith("BRA") else None
        if target and place.get(target[0], i) < i and code[i][1].strip("`()") != "":
            loops.append((place[target[0]], i))
    bodies = [
        [c for c in code[a : b + 1] if c[0] != "label"]
        for a, b in loops
        if not holds_another(a, b, loops)
    ]
    return [
        body for body in bodies if len(body) > 1
    ]  # the trap a kernel ends with branches to itself


def holds_another(begin: int, end: int, loops: list[tuple[int, int]]) -> bool:
    return any((a, b) != (begin, end) and a >= begin and b <= end for a, b in loops)


def tally(names) -> dict[str, int]:
    return dict(sorted(collections.Counter(names).items()))


def widths(ops: list[str], opcode: str) -> dict[str, int]:
    """{bytes a lane: how many instructions}, of global accesses with this opcode."""
    return tally(str(width(op)) for op in ops if op.split(".")[0] == opcode)


def width(op: str) -> int:
    if wide := re.search(r"\.(128|64)\b", op):
        return int(wide[1]) // 8
    return 2 if re.search(r"\.[US]16\b", op) else 1 if re.search(r"\.[US]8\b", op) else 4


def occupancy(arch: int, warps: int, registers: int, shared: int) -> float:
    """Resident warps over possible ones."""
    most_warps, most_blocks, most_shared = SM_LIMITS[arch]
    of_a_warp = max(-(-registers * 32 // 256) * 256, 256)
    by_registers = (16384 // of_a_warp) * 4 // warps  # each quarter of an SM holds 16384
    by_shared = most_shared // (-(-(shared + RESERVED_SHARED) // 128) * 128)
    return round(
        min(most_warps // warps, by_registers, by_shared, most_blocks) * warps / most_warps, 3
    )


def amd_facts(assembly: str, threads: int, shared: int) -> dict:
    def field(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", assembly)[1])

    code = amd_instructions(assembly)
    ops = [op for op, _ in code if op != "label"]
    warps, registers = -(-threads // 64), field("vgpr_count")  # AGPRs are counted in
    return {
        "registers": registers,
        "accumulators": field("agpr_count"),
        "spills": field("vgpr_spill_count") + field("sgpr_spill_count"),
        "shared": shared,
        "warps": warps,
        "occupancy": amd_occupancy(warps, registers, shared),
        "mma": tally(op for op in ops if op.startswith("v_mfma")),
        "loads": amd_widths(ops, "load"),
        "stores": amd_widths(ops, "store"),
        "instructions": len(ops),
        "inner_loops": [len(body) for body in inner_loops(code)],
    }


def amd_instructions(assembly: str) -> list[tuple[str, str]]:
    """As `instructions`, a branch being named BRA."""
    code = []
    for line in assembly.splitlines():
        if label := re.match(r"(\.LBB\w+):", line):
            code.append(("label", label[1]))
        elif op := re.match(r"\s+([a-z][a-z0-9_]+)\s*([^;]*)", line):
            branch = re.match(r"s_c?branch", op[1])
            code.append(("BRA" if branch else op[1], op[2]))
    return code


AMD_WIDTHS = {"x4": 16, "x3": 12, "x2": 8, "dword": 4, "short": 2, "byte": 1}


def amd_widths(ops: list[str], kind: str) -> dict[str, int]:
    """{bytes a lane: how many instructions} of global loads or stores."""
    accesses = [op for op in ops if re.match(rf"(global|buffer|flat)_{kind}_", op)]
    return tally(str(next(n for part, n in AMD_WIDTHS.items() if part in op)) for op in accesses)


def amd_occupancy(warps: int, registers: int, shared: int) -> float:
    """Resident wavefronts over possible ones on gfx942: four SIMDs of 8, 512 registers each, 64 KB a CU."""
    a_simd = min(8, 512 // max(-(-registers // 8) * 8, 8))
    by_shared = (64 << 10) // shared if shared else 32
    return round(min(4 * a_simd // warps, by_shared) * warps / 32, 3)


def regressions(recorded: dict, found: dict) -> list[str]:
    """What got worse, or moved by more than COUNT_SLACK, since the ledger was written."""
    problems = []
    if found["spills"]:
        problems.append(f"{found['spills']} spills")
    if found.get("occupancy", 1) < recorded.get("occupancy", 0):
        problems.append(f"occupancy {recorded['occupancy']} -> {found['occupancy']}")
    if bool(recorded["mma"]) != bool(found["mma"]):
        problems.append(f"matrix instructions {recorded['mma']} -> {found['mma']}")
    for kind in ("loads", "async_loads", "stores"):
        before, after = recorded.get(kind, {}), found.get(kind, {})
        if narrowest(after) < narrowest(before):
            problems.append(f"narrower {kind}: {before} -> {after}")
        if moved(sum(before.values()), sum(after.values())):
            problems.append(f"{kind} {before} -> {after}")
    if recorded.get("async_loads") and not found.get("async_loads"):
        problems.append("loads are no longer asynchronous")
    if moved(sum(recorded["mma"].values()), sum(found["mma"].values())):
        problems.append(f"matrix instructions {recorded['mma']} -> {found['mma']}")
    if moved(recorded["instructions"], found["instructions"]):
        problems.append(f"instructions {recorded['instructions']} -> {found['instructions']}")
    if moved(sum(recorded.get("inner_loops", [])), sum(found.get("inner_loops", []))):
        problems.append(f"inner loops {recorded['inner_loops']} -> {found['inner_loops']}")
    return problems


def narrowest(widths: dict[str, int]) -> int:
    sizes = [int(w) for w in widths if w.isdigit()]
    return min(sizes, default=16)


def moved(before: int, after: int) -> bool:
    return abs(after - before) > max(COUNT_SLACK * before, 1)


def read(path: str | Path) -> dict:
    return json.loads(Path(path).read_text())


def write(path: str | Path, ledger: dict) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    rows = [f"  {json.dumps(name)}: {json.dumps(ledger[name])}" for name in sorted(ledger)]
    Path(path).write_text("{\n" + ",\n".join(rows) + "\n}\n")
