"""The device half of ptx.cuh, which cannot run here: operand i of each instruction is slot i."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest

from tests.support.cuda_host import KERNELS

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")

PROBE = r"""
#include "ptx.cuh"
using namespace fastalex;
template <class Multiply>
__device__ void probe(const unsigned* in, float* d, Multiply multiply) {
  unsigned a[4] = {in[0], in[1], in[2], in[3]};
  float s[4] = {d[0], d[1], d[2], d[3]};
  multiply(s, a, in[4], in[5]);
  for (int i = 0; i < 4; i++) d[8 + i] = s[i];
}
extern "C" __global__ void probe_f16(const unsigned* in, float* d) {
  probe(in, d, mma_m16n8k16<__half>);
}
extern "C" __global__ void probe_bf16(const unsigned* in, float* d) {
  probe(in, d, mma_m16n8k16<__nv_bfloat16>);
}
extern "C" __global__ void probe_tf32(const unsigned* in, float* d) {
  probe(in, d, mma_m16n8k8_tf32);
}
extern "C" __global__ void probe_rows(unsigned row, unsigned* out) {
  unsigned r[4];
  ldmatrix_x4(r, row);
  for (int i = 0; i < 4; i++) out[8 + i] = r[i];
}
extern "C" __global__ void probe_columns(unsigned row, unsigned* out) {
  unsigned r[4];
  ldmatrix_x4_trans(r, row);
  for (int i = 0; i < 4; i++) out[8 + i] = r[i];
}
extern "C" __global__ void probe_word(unsigned a, unsigned* out) { out[8] = load_shared<unsigned>(a); }
extern "C" __global__ void probe_words(unsigned a, unsigned* out) {
  const uint4 w = load_shared<uint4>(a);
  out[8] = w.x, out[9] = w.y, out[10] = w.z, out[11] = w.w;
}
extern "C" __global__ void probe_copy(unsigned s, const char* g, int n) {
  cp_async<16>(s, g, n);
  cp_async<8>(s + 16, g, n);
  cp_async<4>(s + 32, g, n);
  cp_async_commit();
  cp_async_wait<3>();
}
template <class T, int Columns>
__device__ void probe_group(unsigned long long a, unsigned long long b, float* out) {
  float d[Columns][4];
  for (int i = 0; i < 4 * Columns; i++) d[i / 4][i % 4] = out[i];
  fence_async_proxy();
  wgmma_fence();
  wgmma_m64k16<T>(d, a, b);
  wgmma_commit();
  wgmma_wait<1>(d);
  for (int i = 0; i < 4 * Columns; i++) out[1000 + i] = d[i / 4][i % 4];
}
extern "C" __global__ void probe_group_f16_128(unsigned long long a, unsigned long long b, float* d) {
  probe_group<__half, 16>(a, b, d);
}
extern "C" __global__ void probe_group_f16_192(unsigned long long a, unsigned long long b, float* d) {
  probe_group<__half, 24>(a, b, d);
}
extern "C" __global__ void probe_group_bf16_128(unsigned long long a, unsigned long long b, float* d) {
  probe_group<__nv_bfloat16, 16>(a, b, d);
}
extern "C" __global__ void probe_group_bf16_192(unsigned long long a, unsigned long long b, float* d) {
  probe_group<__nv_bfloat16, 24>(a, b, d);
}
extern "C" __global__ void probe_roots(float* x) {
  x[1] = inverse_root(x[0]);
  x[2] = approximate_root(x[0]);
  x[3] = __uint_as_float(to_tf32(x[0]));
}
"""
MMA = {
    "probe_f16": "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32",
    "probe_bf16": "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32",
    "probe_tf32": "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32",
}


@pytest.fixture(scope="module")
def bodies(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ptx")
    source, target = folder / "probe.cu", folder / "probe.ptx"
    source.write_text(PROBE)
    command = ["nvcc", "-std=c++20", "-ptx", "-arch=sm_90a", f"-I{KERNELS}", source, "-o", target]
    subprocess.run(command, check=True)
    text = target.read_text()
    return {m[1]: m[2] for m in re.finditer(r"\.entry (\w+)\((.*?)\n}", text, re.S)}


def loaded(text):
    """{register: word offset it was loaded from}, through one move."""
    pairs = re.findall(r"ld\.global\S*\s+(%\w+), \[%\w+\+?(\d*)\]", text)
    slots = {register: int(offset or 0) // 4 for register, offset in pairs}
    moves = re.findall(r"mov\.\w+\s+(%\w+), (%\w+);", text)
    return slots | {to: slots[source] for to, source in moves if source in slots}


def stored(text):
    pairs = re.findall(r"st\.global\S*\s+\[%\w+\+?(\d*)\], (%\w+)", text)
    return {register: int(offset or 0) // 4 for offset, register in pairs}


def operands(text, instruction):
    match = re.search(re.escape(instruction) + r"\s*(.*?);", text)
    assert match, instruction
    return [re.findall(r"%\w+", group) for group in re.findall(r"\{(.*?)\}", match[1])]


@pytest.mark.parametrize("name", MMA)
def test_mma(bodies, name):
    d, a, b, c = operands(bodies[name], MMA[name])
    source, target = loaded(bodies[name]), stored(bodies[name])
    assert [source[r] for r in a] == [0, 1, 2, 3]
    assert [source[r] for r in b] == [4, 5]
    assert [source[r] for r in c] == [0, 1, 2, 3]
    assert [target[r] for r in d] == [8, 9, 10, 11]


@pytest.mark.parametrize(("name", "kind"), [("probe_rows", ""), ("probe_columns", ".trans")])
def test_ldmatrix(bodies, name, kind):
    (d,) = operands(bodies[name], f"ldmatrix.sync.aligned.m8n8.x4{kind}.shared.b16")
    assert [stored(bodies[name])[r] for r in d] == [8, 9, 10, 11]


@pytest.mark.parametrize(("name", "kind"), [("probe_word", ""), ("probe_words", ".v4")])
def test_loads_from_shared_addresses(bodies, name, kind):
    match = re.search(rf"ld\.shared{kind}\.b32 (.*?), \[(%\w+)\];", bodies[name])
    words = re.findall(r"%\w+", match[1])
    assert [stored(bodies[name])[r] for r in words] == list(range(8, 8 + len(words)))
    assert re.search(rf"ld\.param\.u32\s+{match[2]}, \[\w+_param_0\];", bodies[name])


@pytest.mark.parametrize("columns", [128, 192])
@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_wgmma(bodies, kind, columns):
    """Sum i is slot i, in and out; then the two descriptors, 1 to add, 1 and 1 for signs, 0 and 0 for K-major."""
    body = bodies[f"probe_group_{kind}_{columns}"]
    instruction = f"wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.{kind}.{kind}"
    match = re.search(re.escape(instruction) + r"\s*\{(.*?)\}, (%\w+), (%\w+), (.*?);", body)
    assert match, instruction
    sums = re.findall(r"%\w+", match[1])
    source, target = loaded(body), stored(body)
    assert [source[r] for r in sums] == list(range(columns // 2))
    assert [target[r] for r in sums] == list(range(1000, 1000 + columns // 2))
    given = dict(re.findall(r"ld\.param\.\w+\s+(%\w+), \[\w+_param_(\d)\];", body))
    assert (given[match[2]], given[match[3]], match[4]) == ("0", "1", "1, 1, 1, 0, 0")
    order = [
        "fence.proxy.async.shared::cta;",
        "wgmma.fence.sync.aligned;",
        instruction,
        "wgmma.commit_group.sync.aligned;",
        "wgmma.wait_group.sync.aligned 1;",
    ]
    assert sorted(order, key=body.index) == order


def test_without_hopper_s_own_instructions_the_wrappers_are_empty(tmp_path):
    """Code for any other GPU is compiled from the same source, and stops where it is started."""
    source, target = tmp_path / "probe.cu", tmp_path / "probe.ptx"
    source.write_text(PROBE)
    command = ["nvcc", "-std=c++20", "-ptx", "-arch=sm_90", f"-I{KERNELS}", source, "-o", target]
    subprocess.run(command, check=True)
    assert "wgmma" not in target.read_text()


def test_copies_and_roots(bodies):
    for pattern in (
        r"cp\.async\.cg\.shared\.global\.L2::128B \[%\w+\], \[%\w+\], 16, %\w+;",
        r"cp\.async\.ca\.shared\.global\.L2::128B \[%\w+\], \[%\w+\], 8, %\w+;",
        r"cp\.async\.ca\.shared\.global\.L2::128B \[%\w+\], \[%\w+\], 4, %\w+;",
        r"cp\.async\.commit_group;",
        r"cp\.async\.wait_group 3;",
    ):
        assert re.search(pattern, bodies["probe_copy"]), pattern
    for instruction in ("rsqrt.approx.f32", "sqrt.approx.f32", "cvt.rna.tf32.f32"):
        assert instruction in bodies["probe_roots"]
