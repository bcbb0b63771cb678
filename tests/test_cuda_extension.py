"""nvcc builds the library with no GPU; it loads, has the schemas, refuses with reasons."""

from __future__ import annotations

import re
import subprocess

import pytest
import torch

import fastalex.ops  # noqa: F401  (registers the operators)
from tests.support import cuda_extension, cuda_ledger, static_ledger

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        cuda_extension.unavailable() is not None, reason=str(cuda_extension.unavailable())
    ),
]
needs_tools = pytest.mark.skipif(
    static_ledger.unavailable() is not None, reason=str(static_ledger.unavailable())
)

LEDGER = static_ledger.read(cuda_ledger.LEDGER)
OPERATORS = ["lrn", "max_pool", "lrn_max_pool", "conv_relu", "linear_relu"]
OPERATORS += [f"{name}_backward" for name in OPERATORS]


@pytest.fixture(scope="module")
def library():
    path = cuda_extension.build()
    torch.ops.load_library(path)
    return path


@pytest.mark.parametrize("name", OPERATORS)
def test_schemas_are_the_operators_own(library, name):
    """A product's has two arguments more: whether float32 is rounded to TF32, and Hopper's instruction used."""
    ours = str(getattr(torch.ops.fastalex_cuda, name).default._schema)
    theirs = str(getattr(torch.ops.fastalex, name).default._schema)
    if name.startswith(("conv", "linear")):
        ours = ours.replace(", bool tf32, bool wgmma)", ")")
    assert ours.removeprefix("fastalex_cuda::") == theirs.removeprefix("fastalex::")


def test_the_library_knows_what_it_was_built_for(library):
    assert torch.ops.fastalex_cuda.architectures() == cuda_extension.ARCHITECTURE


def test_the_library_needs_no_cuda_library(library):
    """Neither torch_cuda nor a CUDA runtime: it loads beside a CPU build of torch, and without a driver."""
    needed = subprocess.run(
        ["readelf", "-d", library], capture_output=True, text=True, check=True
    ).stdout
    names = re.findall(r"NEEDED.*\[(.*?)\]", needed)
    assert {"libtorch_cpu.so", "libc10.so"} <= set(names)
    assert not [name for name in names if "cuda" in name]


def test_the_stream_is_found_where_torch_has_cuda(library):
    """Weak here, and a symbol of libtorch_cuda in torch 2.11 to 2.14."""
    symbols = subprocess.run(
        ["nm", "-D", library], capture_output=True, text=True, check=True
    ).stdout
    assert re.search(r" w aoti_torch_get_current_cuda_stream$", symbols, re.M)


def test_a_cpu_tensor_is_refused_with_a_reason_and_a_mend(library):
    with pytest.raises(RuntimeError, match=r": input is not on a CUDA device: move it with \.cuda"):
        torch.ops.fastalex_cuda.lrn(torch.ones(1, 8, 3, 3), 5, 1e-4, 0.75, 1.0, 1)
    conv = (
        torch.ones(1, 8, 3, 3),
        torch.ones(8, 8, 1, 1),
        None,
        [1, 1],
        [0, 0],
        [1, 1],
        1,
        False,
        False,
    )
    with pytest.raises(RuntimeError, match="not on a CUDA device"):
        torch.ops.fastalex_cuda.conv_relu(*conv)


@needs_tools
def test_every_kernel_compiles_as_recorded(library):
    """Registers, spills, occupancy, access widths, instruction counts: what got worse, or moved by a twentieth."""
    found = cuda_ledger.measure()
    assert found.keys() == LEDGER.keys()
    problems = {
        name: reasons
        for name, facts in found.items()
        if (reasons := static_ledger.regressions(LEDGER[name], facts))
    }
    assert not problems
