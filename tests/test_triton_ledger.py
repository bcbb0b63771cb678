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

from fastalex.kernels import _configs as configs

from tests.support import static_ledger, triton_aot, triton_cases, triton_ledger

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
            and "x16x" not in name  # 16 outputs: fewer bytes of weights than threads
            and "+16x" not in name
        ):
            least = "8" if "conv1" in name else "16"
            assert min(facts["async_loads"], key=int) == least, name
            assert sum(facts["async_loads"].values()) > sum(facts["loads"].values()), name


@pytest.mark.parametrize(("case", "arch"), selected())
def test_compiles_as_recorded(case, arch):
    found = triton_ledger.measure(case, arch)
    problems = static_ledger.regressions(LEDGER[f"{arch}/{case.name}"], found)
    assert not problems, "; ".join(problems)


GOOD = {
    "spills": 0,
    "occupancy": 0.5,
    "mma": {"HGMMA": 40},
    "loads": {"16": 24},
    "async_loads": {"16": 24},
    "stores": {"16": 8},
    "instructions": 1000,
    "inner_loops": [200],
}
BAD = {  # what is planted: what the ledger's test must then say
    "any spill": ({"spills": 2}, "2 spills"),
    "an occupancy step lost": ({"occupancy": 0.375}, "occupancy 0.5 -> 0.375"),
    "no matrix instructions": ({"mma": {}}, "matrix instructions"),
    "5 % more of them": ({"mma": {"HGMMA": 43}}, "matrix instructions"),
    "narrower loads": ({"loads": {"16": 23, "2": 1}}, "narrower loads"),
    "narrower copies": ({"async_loads": {"4": 24}}, "narrower async_loads"),
    "narrower stores": ({"stores": {"4": 8}}, "narrower stores"),
    "synchronous loads": ({"async_loads": {}, "loads": {"16": 48}}, "no longer asynchronous"),
    "5 % more instructions": ({"instructions": 1051}, "instructions 1000 -> 1051"),
    "5 % fewer instructions": ({"instructions": 949}, "instructions 1000 -> 949"),
    "a longer inner loop": ({"inner_loops": [211]}, "inner loops"),
}


@pytest.mark.parametrize("planted", BAD)
def test_a_regression_is_named(planted):
    assert static_ledger.regressions(GOOD, GOOD) == []
    change, words = BAD[planted]
    assert words in "; ".join(static_ledger.regressions(GOOD, {**GOOD, **change}))


def test_a_regression_fails_the_test_of_its_entry(monkeypatch):
    """Through the test itself: the entry of a kernel that compiles as it did, but for one planted fact."""
    name = next(n for n, (case, arch) in NAMES.items() if case.quick and arch == QUICK_ARCH)
    case, arch = NAMES[name]
    monkeypatch.setattr(triton_ledger, "measure", lambda case, arch: LEDGER[name])
    test_compiles_as_recorded(case, arch)
    for fact, worse in (("spills", 1), ("occupancy", 0.0), ("instructions", 10**6)):
        changed = {**LEDGER[name], fact: worse}
        monkeypatch.setattr(triton_ledger, "measure", lambda case, arch, facts=changed: facts)
        with pytest.raises(AssertionError, match=r"spills|occupancy|instructions"):
            test_compiles_as_recorded(case, arch)


def test_amd_assembly_is_read():
    facts = static_ledger.amd_facts(ASSEMBLY, threads=256, shared=32 << 10)
    assert facts["occupancy"] == 0.25  # 32 KB a block of four wavefronts: two blocks
    assert facts["mma"] == {"v_mfma_f32_32x32x8_f16": 1}
    assert (facts["loads"], facts["stores"]) == ({"16": 1, "2": 1}, {"8": 1})
    assert facts["inner_loops"] == [3]
    assert facts["spills"] == 1


ASSEMBLY = """
kernel:
\tglobal_load_dwordx4 v[0:3], v4, s[0:1]
.LBB0_1:
\tv_mfma_f32_32x32x8_f16 a[0:15], v[0:1], v[2:3], a[0:15]
\tbuffer_load_ushort v5, v6, s[0:3], 0 offen
\ts_cbranch_scc1 .LBB0_1
\tglobal_store_dwordx2 v4, v[0:1], s[0:1]
    .agpr_count:     16
    .sgpr_spill_count: 0
    .vgpr_count:     64
    .vgpr_spill_count: 1
"""


def tables():
    """(table, what an entry's name must hold, the table's configurations), for each table of _configs.py."""
    for scheme, tiles in configs.CONV_FORWARD.items():
        yield f"forward {scheme}", ("/conv_relu/", f"/{scheme}/"), tiles
    yield "pooled", ("/conv_relu_max_pool/", "/nhwc/"), configs.CONV_POOL
    for last in (True, False):
        layout = "/nhwc/" if last else "/nchw/"
        yield (
            f"input {layout}",
            ("/conv_relu_backward/input/", layout),
            (configs.CONV_INPUT_GRADIENT[last]),
        )
        yield f"weight {layout}", ("/conv_relu_backward/weight/", layout), None
        yield f"first weight {layout}", ("/conv_relu_backward/first-weight/", layout), None
        for direction in ("forward", "backward"):
            suffix = "/" if direction == "forward" else "_backward/"
            key = f"{direction} {layout}"
            yield f"lrn {key}", ("/lrn" + suffix, layout), configs.LRN[direction, last]
            for normalised, op in ((False, "/max_pool"), (True, "/lrn_max_pool")):
                launches = configs.POOL[direction, last, normalised]
                yield f"pool {key} {normalised}", (op + suffix, layout), launches


@pytest.mark.parametrize("arch", triton_aot.TARGETS)
def test_every_configuration_of_every_table_is_compiled(arch):
    names = [name for name in LEDGER if name.startswith(f"{arch}/")]
    for table, parts, listed in tables():
        entries = [n for n in names if all(part in n for part in parts)]
        if "first" in table and not configs.masks_at_load((False, True), arch):
            continue
        last = "/nhwc/" in parts
        found = listed if listed is not None else configs.weight_gradient_table(last, arch)
        for config in found:
            tile = f"/{triton_cases.describe(config)}"
            assert [n for n in entries if n.endswith(tile) or tile + "/" in n], (table, config)
