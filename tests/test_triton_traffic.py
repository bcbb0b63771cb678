"""Bytes the Triton kernels move, counted in the interpreter: at most 1.05 times the compulsory
ones.
"""

from __future__ import annotations

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip(
        "set TRITON_INTERPRET=1: Triton decides when it is imported", allow_module_level=True
    )
pytest.importorskip("triton")

from fastalex.kernels._configs import ConvTile, Launch
from fastalex.kernels.conv_relu import conv_relu
from fastalex.kernels.conv_relu_backward import conv_relu_backward
from fastalex.kernels.conv_relu_max_pool import conv_relu_max_pool
from fastalex.kernels.lrn import lrn, lrn_backward
from fastalex.kernels.lrn_max_pool import lrn_max_pool, lrn_max_pool_backward
from fastalex.kernels.max_pool import max_pool, max_pool_backward

from tests.support.triton_traffic import counting

MOST = 1.05
NORM, WINDOW = (5, 0.3, 0.75, 2.0, 2), ((3, 3), (2, 2), (0, 0))
MANY_LANES = Launch(
    2048, 4, 16
)  # the grid's union of sectors doesn't depend on how programs share it


def sector_aligned(shape, dtype, last):
    """Random values from a 32-byte boundary on, as an allocator of a GPU places them."""
    order = torch.channels_last if last else torch.contiguous_format
    count = 1
    for n in shape:
        count *= n
    memory = torch.empty(count + 32, dtype=dtype)
    start = -memory.data_ptr() % 32 // memory.element_size()
    dense = torch.empty(shape, memory_format=order)
    return memory.as_strided(shape, dense.stride(), start).copy_(torch.randn(shape))


def moved(traffic, *read, written):
    """Bytes moved over the grid, read and written, over the compulsory ones."""
    need = (
        sum(t.numel() * t.element_size() for t in read),
        sum(t.numel() * t.element_size() for t in written),
    )
    return traffic.by_grid("read") / need[0], traffic.by_grid("written") / need[1]


@pytest.mark.parametrize("last", [True, False], ids=["nhwc", "nchw"])
def test_lrn_reads_and_writes_once(last):
    x = sector_aligned((1, 32, 12, 16), torch.float16, last)
    with counting() as traffic:
        y = lrn(x, *NORM, launch=MANY_LANES)
    assert max(moved(traffic, x, written=[y])) <= MOST
    with counting() as traffic:
        gx = lrn_backward(y, x, *NORM, launch=MANY_LANES)
    assert max(moved(traffic, x, y, written=[gx])) <= MOST


@pytest.mark.parametrize("last", [True, False], ids=["nhwc", "nchw"])
def test_pooling_reads_and_writes_once(last):
    x = sector_aligned((1, 32, 17, 17), torch.float16, last)
    with counting() as traffic:
        y, taps = max_pool(x, *WINDOW, (1, 1), False, True, launch=MANY_LANES)
    assert max(moved(traffic, x, written=[y, taps])) <= MOST
    with counting() as traffic:
        gx = max_pool_backward(y, taps, (17, 17), *WINDOW, (1, 1), launch=MANY_LANES)
    assert max(moved(traffic, y, taps, written=[gx])) <= MOST
    with counting() as traffic:
        y, _ = max_pool(x, *WINDOW, (1, 1), False, False, launch=MANY_LANES)
    assert max(moved(traffic, x, written=[y])) <= MOST


@pytest.mark.parametrize("last", [True, False], ids=["nhwc", "nchw"])
def test_the_fused_pair_writes_no_map_between(last):
    x = sector_aligned((1, 32, 17, 17), torch.float16, last)
    with counting() as traffic:
        y, taps = lrn_max_pool(x, *NORM, *WINDOW, False, True, launch=MANY_LANES)
    assert max(moved(traffic, x, written=[y, taps])) <= MOST
    with counting() as traffic:
        gx = lrn_max_pool_backward(y, x, taps, *NORM, *WINDOW, launch=MANY_LANES)
    assert max(moved(traffic, x, y, taps, written=[gx])) <= MOST


def test_the_fused_pair_rereads_little_from_l2():
    """A lane keeps the row two windows share: a program of many rows reads a sector about once."""
    x = sector_aligned((1, 32, 17, 17), torch.float16, True)
    with counting() as traffic:
        lrn_max_pool(x, *NORM, *WINDOW, False, True, launch=Launch(128, 4, 4))
    assert traffic.by_program("read") <= 1.35 * x.numel() * 2


def test_a_first_layers_mask_moves_one_map_more_than_the_gradient():
    """Read are g, y and x once; a pass would read g and y, write dz, and read that. What it writes are the parts."""
    x = sector_aligned((1, 64, 8, 8), torch.float16, True)
    weight = sector_aligned((64, 64, 1, 1), torch.float16, True)
    g, y = (sector_aligned((1, 64, 8, 8), torch.float16, True) for _ in range(2))
    one = (1, 1)
    tile = ConvTile(32, 64, 0, 64, 4, 3)
    arguments = (x, weight, one, (0, 0), one, 1)
    with counting() as traffic:
        gw, gb = conv_relu_backward(g, y, *arguments, (False, True, True), weight_tile=tile)[1:]
    assert traffic.by_program("read") == 2 * (g.numel() + y.numel() + x.numel())
    assert traffic.by_program("written") == 2 * (gw.numel() + gb.numel())
    with counting() as traffic:
        conv_relu_backward(g, y, *arguments, (True, True, True), weight_tile=tile)
    assert traffic.by_grid("written") == 2 * (2 * g.numel() + gw.numel() + gb.numel())  # dz and gx


@pytest.mark.parametrize("last", [True, False], ids=["nhwc", "nchw"])
def test_a_mask_where_the_gradient_is_made_costs_at_most_a_read(last):
    """Of the map that was pooled, and none where LRN reads it anyway; a convolution reads its own input once more."""
    x = sector_aligned((1, 32, 17, 17), torch.float16, last).relu_()
    y, taps = max_pool(x, *WINDOW, (1, 1), False, True, launch=MANY_LANES)
    with counting() as traffic:
        gx = max_pool_backward(y, taps, (17, 17), *WINDOW, (1, 1), rectified=x, launch=MANY_LANES)
    assert max(moved(traffic, x, y, taps, written=[gx])) <= MOST
    with counting() as traffic:
        gx = lrn_max_pool_backward(y, x, taps, *NORM, *WINDOW, rectified=x, launch=MANY_LANES)
    assert max(moved(traffic, x, y, taps, written=[gx])) <= MOST
    if last:
        one, tile = (1, 1), ConvTile(64, 64, 0, 64, 4, 3)
        x, g = (sector_aligned((1, 64, 8, 8), torch.float16, True) for _ in range(2))
        weight = sector_aligned((64, 64, 1, 1), torch.float16, True)
        with counting() as traffic:
            conv_relu_backward(
                *(g, g, x, weight, one, (0, 0), one, 1, (True, False, False)),
                grad_is_masked=True,
                rectified_input=True,
                input_tile=tile,
            )
        assert traffic.by_program("read") == 2 * (g.numel() + x.numel() + weight.numel())
        assert traffic.by_program("written") == 2 * x.numel()


def test_a_convolution_with_its_pool_writes_no_map():
    """Over the grid, x and w are read and y written once, though patches share pixels."""
    x = sector_aligned((2, 64, 33, 33), torch.float16, True)
    weight = sector_aligned((64, 64, 1, 1), torch.float16, True)
    one, none = (1, 1), (0, 0)
    with counting() as traffic:
        y = conv_relu_max_pool(
            *(x, weight, None, one, none, one, 1, (3, 3), (2, 2), none, False),
            tile=ConvTile(256, 64, 0, 32, 8, 3),
        )
    assert max(moved(traffic, x, weight, written=[y])) <= MOST


def test_a_convolution_program_moves_what_its_tile_says():
    """K (BM + BN) values: here one program sees every pixel and channel, so overlapping windows
    count once.
    """
    x, weight = (
        sector_aligned((1, 64, 8, 8), torch.float16, True),
        sector_aligned((64, 64, 3, 3), torch.float16, True),
    )
    with counting() as traffic:
        y = conv_relu(
            x, weight, None, (1, 1), (1, 1), (1, 1), 1, tile=ConvTile(64, 64, 0, 64, 4, 3)
        )
    assert traffic.by_program("read") == 2 * (x.numel() + weight.numel())
    assert traffic.by_program("written") == traffic.by_grid("written") == 2 * y.numel()
    with counting() as traffic:
        conv_relu(x, weight, None, (1, 1), (1, 1), (1, 1), 1, tile=ConvTile(64, 32, 0, 64, 4, 3))
    assert traffic.by_program("read") == 2 * (2 * x.numel() + weight.numel())
