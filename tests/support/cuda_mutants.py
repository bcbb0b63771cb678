"""Bugs to plant in csrc/cuda, one at a time, and the gate that must notice each: tests/test_cuda_mutants.py."""

# ruff: noqa: E501 (patterns are lines of the kernels)
from __future__ import annotations

from typing import NamedTuple


class Mutant(NamedTuple):
    name: str
    file: str
    old: str
    new: str
    gate: str = "values"  # or address, or trace: a variant of the host runtime and its tests

    @property
    def units(self) -> tuple[str, ...]:
        """The sources to compile anew: enough for one dtype to be wrong."""
        return ("conv_float",) if "tf32" in self.name else UNITS[self.file]


CONV, COPY, MATH = "conv_relu.cuh", "conv_copy.cuh", "conv_math.cuh"
TILE, GRAD, PARTS = "conv_tile.cuh", "conv_weight_grad.cuh", "conv_parts.cuh"
HOPPER = "conv_wgmma.cuh"
LRN, WINDOW, BACK = "lrn.cuh", "lrn_window.cuh", "lrn_backward.cuh"
POOL, POOLING, FUSED = "max_pool.cuh", "pool_window.cuh", "lrn_max_pool.cuh"

UNITS = {
    **dict.fromkeys((CONV, COPY, MATH, TILE), ("conv_half",)),
    HOPPER: ("conv_wgmma",),
    **dict.fromkeys((GRAD, PARTS), ("conv_relu",)),
    "conv_plan.h": ("conv_half", "conv_relu"),
    **dict.fromkeys((LRN, WINDOW, BACK), ("lrn",)),
    **dict.fromkeys((POOL, POOLING), ("max_pool",)),
    FUSED: ("lrn_max_pool",),
}

LOOP_WAIT = "    cp_async_wait<kLead - 1>();\n    __syncthreads();  // the next stage"
FIRST_WAIT = "  cp_async_wait<kLead - 1>();\n  __syncthreads();  // the first stage"

MUTANTS = [
    Mutant("conv: loop wait missing", CONV, LOOP_WAIT, "    __syncthreads();  // the next stage"),
    Mutant("conv: loop wait one too weak", CONV, LOOP_WAIT, LOOP_WAIT.replace("kLead - 1", "kLead")),
    Mutant("conv: first wait missing", CONV, FIRST_WAIT, "  __syncthreads();  // the first stage"),
    Mutant("conv: loop barrier missing", CONV, LOOP_WAIT, "    cp_async_wait<kLead - 1>();  //"),
    Mutant("conv: first barrier missing", CONV, FIRST_WAIT, "  cp_async_wait<kLead - 1>();  //"),
    Mutant("conv: tables' barrier missing", CONV, "  __syncthreads();  // the tables", "  // the tables"),
    Mutant("conv: last wait missing", CONV, "  cp_async_wait<0>();\n", ""),
    Mutant("conv: output tile's barrier missing", CONV, "  __syncthreads();  // the tile is", "  // the tile is"),
    Mutant("conv: ring's barrier missing", CONV, "  __syncthreads();  // the ring becomes", "  // the ring becomes"),
    Mutant("conv: ring one stage short", CONV, "int read = 0, write = kLead * Tile::StageBytes;", "int read = 0, write = (kLead - 1) * Tile::StageBytes;"),
    Mutant("conv: channel tail stored", CONV, "if (at >= 0 && b.first_column + column < p.channels_out)", "if (at >= 0)"),
    Mutant("conv: pixel tail stored", CONV, "table[row] = at.inside ? element : -1;", "table[row] = element;", "address"),
    Mutant("conv: bias of the wrong group", CONV, "(p.bias) + b.group * p.channels_out", "(p.bias)"),
    Mutant("conv: NaN lost by the activation", CONV, "v < 0.0f ? 0.0f : v", "!(v > 0.0f) ? 0.0f : v"),
    Mutant("conv: A fragment lanes swapped", MATH, "warp_m + lane % 16, step * kStepBytes + lane / 16 * 16", "warp_m + lane / 16 * 8 + lane % 8, step * kStepBytes + lane / 8 % 2 * 16"),
    Mutant("conv: B registers swapped", MATH, "f.b[n / 2][n % 2 * 2], f.b[n / 2][n % 2 * 2 + 1]", "f.b[n / 2][n % 2 * 2 + 1], f.b[n / 2][n % 2 * 2]"),
    Mutant("conv: tf32 not rounded", MATH, "words[i] = to_tf32(value.value[0]);", "words[i] = value.word;"),
    Mutant("conv: swizzle removed (trace)", TILE, "(((row >> 1) & 3) << 4)", "0", "trace"),
    Mutant("conv: depth tail not zeroed", TILE, "Tap tap = {0, kNowhere, 0};", "Tap tap = {0, 0, 0};"),
    Mutant("conv: row edge dropped", COPY, "static_cast<unsigned>(row[i] + tap.row) < static_cast<unsigned>(p.h.in) &&\n          static_cast<unsigned>(column[i] + tap.column)", "row[i] >= 0 &&\n          static_cast<unsigned>(column[i] + tap.column)"),
    Mutant("conv: window's last copy reads a neighbour", COPY, "min(Bytes, (p.window_values - inside) * static_cast<int>(sizeof(T)))", "Bytes"),
    Mutant("conv: weight rows past the end", COPY, "k + depth < p.depth_pitch && i * RowsPerPass < rows_left", "k + depth < p.depth_pitch", "address"),
    Mutant("conv: gather reads outside the image", COPY, "        if (valid) {\n", "        if (row[pixel] >= 0) {\n"),
    Mutant("conv: transposed tap off by one", "conv_plan.h", "(a.kernel - 1 - tap) / a.period + 1", "(a.kernel - tap) / a.period + 1"),
    Mutant("wgmma: proxy fence missing", HOPPER, "    fence_async_proxy();\n", ""),
    Mutant("wgmma: barrier missing", HOPPER, "    __syncthreads();  // this stage", "    // this stage"),
    Mutant("wgmma: copies' wait one too weak", HOPPER, "cp_async_wait<kLead - 1>();", "cp_async_wait<kLead>();"),
    Mutant("wgmma: products' wait one too weak", HOPPER, "finish<1>();", "finish<2>();"),
    Mutant("wgmma: last product not waited for", HOPPER, "  warp.template finish<0>();\n", ""),
    Mutant("wgmma: registers' fence missing", HOPPER, "    wgmma_fence();\n", ""),
    Mutant("wgmma: ring one stage short", HOPPER, "kLead = Tile::Stages - 2", "kLead = Tile::Stages - 1"),
    Mutant("wgmma: distance of eight rows", HOPPER, "kEightRows = 8 * kRowBytes / 16", "kEightRows = 4 * kRowBytes / 16"),
    Mutant("wgmma: second step of depth", HOPPER, "base + a_offset + step * kStepBytes", "base + a_offset"),
    Mutant("wgmma: warpgroups on the same rows", HOPPER, "threadIdx.x / 128 * 64", "threadIdx.x / 256 * 64"),
    Mutant("weight gradient: stage barrier missing", GRAD, "    __syncthreads();  // this stage", "    // this stage"),
    Mutant("weight gradient: wait missing", GRAD, "    cp_async_wait<kLead - 1>();\n", ""),
    Mutant("weight gradient: pixel tail", GRAD, "pixel + row < b.last_pixel && b.first_row", "b.first_row"),
    Mutant("weight gradient: transposed lanes", GRAD, "first + lane % 8 + lane / 16 * 8, pixel_b", "first + lane % 16, pixel_b"),
    Mutant("weight gradient: tap row edge", GRAD, "h >= 0 && h < p.h.in", "h < p.h.in"),
    Mutant("pack: padding not written", PARTS, "  store_values(static_cast<T*>(p.packed) + index, value);", "  if (real) store_values(static_cast<T*>(p.packed) + index, value);"),
    Mutant("mask: zero passes its gradient", PARTS, "if (y[0] <= 0.0f) g[0]", "if (y[0] < 0.0f) g[0]"),
    Mutant("bias sum: barrier missing", PARTS, "    __syncthreads();\n    if (static_cast<int>(threadIdx.x) < half)", "    if (static_cast<int>(threadIdx.x) < half)"),
    Mutant("splits: one left out", PARTS, "split < p.splits; split++", "split < p.splits - (p.splits > 1); split++"),
    Mutant("lrn: window one channel late", WINDOW, "distance >= -before && distance <= after) squares", "distance > -before && distance <= after) squares"),
    Mutant("lrn: window crosses groups", WINDOW, "if (channel >= group.begin && channel < group.end) load_values(pixel +", "if (channel >= 0 && channel < w.channels) load_values(pixel +"),
    Mutant("lrn: running window misses a channel", LRN, "load_in_group(x, p.x_stride.channel, c + kAfter, walk.group, newest);\n      window.push(newest);\n#pragma", "load_in_group(x, p.x_stride.channel, c + kAfter + 1, walk.group, newest);\n      window.push(newest);\n#pragma"),
    Mutant("lrn backward: barrier missing", BACK, "  __syncthreads();\n  if (!inside || thread", "  if (!inside || thread"),
    Mutant("lrn backward: halo written", BACK, "if (!inside || thread < p.halo_low || thread >= kLrnThreads - p.halo_high) return;", "if (!inside) return;"),
    Mutant("lrn backward: window not mirrored", BACK, "before = reach_after<Size>(w),\n            after = reach_before<Size>(w);", "before = reach_before<Size>(w),\n            after = reach_after<Size>(w);"),
    Mutant("pool: last of equal values wins", POOLING, "v[i] > value[i] ||", "v[i] >= value[i] ||"),
    Mutant("pool: NaN does not win", POOLING, " || v[i] != v[i]", ""),
    Mutant("pool: first position in the padding", POOLING, "start >= 0 ? 0 : a.by_dilation", "true ? 0 : a.by_dilation"),
    Mutant("pool: right edge", POOL, "column >= 0 && column < w.size)", "column >= 0)"),
    Mutant("pool backward: last window left out", POOLING, "min(a.by_stride(origin), a.out - 1)", "min(a.by_stride(origin), a.out - 1) - (a.out > 2)"),
    Mutant("fused: first barrier missing", FUSED, "    __syncthreads();\n    rows.pool(tile, oh);", "    rows.pool(tile, oh);"),
    Mutant("fused: second barrier missing", FUSED, "    rows.pool(tile, oh);\n    __syncthreads();", "    rows.pool(tile, oh);"),
    Mutant("fused: one buffer for all channels", FUSED, "buffers + (c & 1) * pixels", "buffers"),
    Mutant("fused: channels-first barrier missing", FUSED, "    __syncthreads();\n    for (int item = threadIdx.x; item < p.tile_h", "    for (int item = threadIdx.x; item < p.tile_h"),
]  # fmt: skip
