"""What every Triton kernel compiles to, against the ledger in tests/ledger/triton.json; needs no
GPU.
"""

from __future__ import annotations

import os

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip(
        "unset TRITON_INTERPRET: interpreted kernels don't compile", allow_module_level=True
    )

from tests.support import static_ledger, triton_ledger

NAMES = triton_ledger.names()
LEDGER = static_ledger.read(triton_ledger.LEDGER)
QUICK_ARCH = "sm_90"


def selected():
    found = []
    for name, (case, arch) in NAMES.items():
        quick = case.quick and arch == QUICK_ARCH
        marks = [] if quick else pytest.mark.slow
        found.append(pytest.param(case, arch, id=name, marks=marks))
    return found


def test_the_ledger_has_every_kernel_and_configuration():
    assert set(LEDGER) == set(NAMES), (
        "make it anew: python -m tests.support.triton_ledger --missing"
    )


def test_no_recorded_kernel_spills():
    assert not [name for name, facts in LEDGER.items() if facts["spills"]]


def test_half_and_tf32_convolutions_use_matrix_instructions():
    promised = [n for n in LEDGER if "/conv_relu" in n and "/ieee/" not in n]
    assert promised
    assert not [name for name in promised if not LEDGER[name]["mma"]]


def test_channels_last_halves_load_wide_and_asynchronously():
    """conv2 to conv5 and a padded conv1 forward: all pixels and weights but conv1's tail of 11 by
    11 values.
    """
    for name, facts in LEDGER.items():
        if (
            "/conv_relu/conv" in name
            and "/fp16/nhwc/b128" in name
            and "sm_" in name
            and "unpadded" not in name
        ):
            least = "8" if "conv1" in name else "16"
            assert min(facts["async_loads"], key=int) == least, name
            assert sum(facts["async_loads"].values()) > sum(facts["loads"].values()), name


@pytest.mark.parametrize(("case", "arch"), selected())
def test_compiles_as_recorded(case, arch):
    found = triton_ledger.measure(case, arch)
    problems = static_ledger.regressions(LEDGER[f"{arch}/{case.name}"], found)
    assert not problems, "; ".join(problems)


def test_a_regression_is_named():
    before = {
        "spills": 0,
        "occupancy": 0.5,
        "mma": {"HGMMA": 8},
        "loads": {},
        "async_loads": {"16": 24},
        "stores": {"16": 8},
        "instructions": 1000,
        "inner_loops": [200],
    }
    assert static_ledger.regressions(before, before) == []
    worse = {
        "spills": 2,
        "occupancy": 0.25,
        "mma": {},
        "loads": {"2": 24},
        "async_loads": {},
        "stores": {"4": 32},
        "instructions": 1100,
        "inner_loops": [260],
    }
    for key, value in worse.items():
        problems = static_ledger.regressions(before, {**before, key: value})
        assert problems, key
