"""Padding: the share of the matrix units' work that the docstrings of the convolution kernels state, computed."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("triton")

from fastalex.kernels import _configs as configs
from fastalex.kernels import _waste as waste
from fastalex.kernels._conv import Conv, forward_scheme, geometry
from fastalex.kernels._layout import strides
from fastalex.kernels.conv_relu_backward import aligned_run

from tests.support.triton_cases import DTYPES, LAYERS, layer

NETWORK = [name for name in LAYERS if name.startswith("conv") and name != "conv1-unpadded"]


def chosen(name, batch, dtype, last):
    """(convolution, input, scheme) of a layer."""
    x, weight, _, *rest = layer(name, batch, DTYPES[dtype], last)
    conv = geometry(x.shape[2:], weight, *rest)
    return conv, x, forward_scheme(conv, strides(x), x.element_size())


def of_one_small_map(name, batch):
    return batch == 1 and name in ("conv3", "conv4", "conv5")


@pytest.mark.parametrize(
    ("last", "batch"),
    [*((True, n) for n in (1, 4, 8, 16, 32, 64, 128, 256)), *((False, n) for n in (1, 32, 128))],
    ids=lambda value: {True: "nhwc", False: "nchw"}[value] if isinstance(value, bool) else value,
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NETWORK)
def test_forward_wastes_under_six_percent_on_every_layer(name, dtype, last, batch):
    conv, x, scheme = chosen(name, batch, dtype, last)
    tile = configs.conv_tiles(conv, scheme, batch, x.dtype, "tf32")[0]
    found = waste.forward(conv, scheme, tile, batch)
    if of_one_small_map(name, batch):
        assert 100 * found == pytest.approx(13.6, abs=0.05)
    else:
        assert found < 0.06


A100_L2 = 5120  # bytes a clock, of its whitepaper
A100_MATRIX = {2: 108 * 2048, 4: 108 * 1024}  # FLOPs a clock, by the bytes of a value


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("last", [True, False], ids=["nhwc", "nchw"])
@pytest.mark.parametrize("name", [name for name in NETWORK if of_one_small_map(name, 1)])
def test_tiles_that_pad_a_small_map_less_cost_more(name, last, dtype):
    """Of 169 pixels only 16 at a time waste under 6 %: they copy the weights eleven times, however wide."""
    conv, x, scheme = chosen(name, 1, dtype, last)
    assert [m for m in (16, 32, 64, 128) if waste.padded(169, m) < 1.06 * 169] == [16]
    tile = configs.conv_tiles(conv, scheme, 1, x.dtype, "tf32")[0]
    size = x.element_size()
    more = size * (11 * conv.weights - waste.copied(conv, tile, 1)) / A100_L2
    spared = 2 * conv.weights * (waste.padded(169, tile.m) - 176) / A100_MATRIX[size]
    assert more > 4 * spared > 0
    if (name, dtype, last) == ("conv3", "fp16", True):  # the docstring's figures
        assert (11 * conv.weights * size, waste.copied(conv, tile, 1) * size) == (
            19464192,
            10616832,
        )
        assert (round(more, -2), round(spared, -1)) == (1700, 130)


@pytest.mark.parametrize("split", range(1, 9))
def test_no_part_of_a_split_sum_is_empty(split, monkeypatch):
    conv = chosen("conv3", 1, "fp16", True)[0]
    monkeypatch.setattr(configs, "MOST_PARTS", split)
    tile = configs.with_split(configs.ConvTile(64, 64, 0, 64, 4, 3), conv, "taps", 1)
    steps, parts = conv.products // tile.k, tile.split
    share = -(-steps // parts)
    assert (parts - 1) * share < steps <= parts * share
    assert parts <= split


# per cent at batch 128 in float16, channels_last: forward, input gradient, weight gradient
STATED = {
    "conv1": ("rows", 1.4, 28, 5.8),
    "conv2": ("flat", 1.3, 0, 6.7),
    "conv3": ("taps", 0, 0, 0),
    "conv4": ("taps", 0, 0, 0),
    "conv5": ("taps", 0, 0, 3.7),
}


@pytest.mark.parametrize(("name", "stated"), [("conv1", 41), ("conv4", 38)])
def test_sm_80_wastes_what_its_registers_cost(name, stated):
    conv, x, _ = chosen(name, 128, "fp16", True)
    tile = configs.weight_gradient_tiles(conv, True, 128, x.dtype, "tf32", "sm_80")[0]
    found = waste.weight_gradient(conv, aligned_run(conv, x)[0], tile, 128)
    assert 100 * found == pytest.approx(stated, abs=0.5)


@pytest.mark.parametrize("name", NETWORK)
def test_the_docstrings_state_what_the_tiles_waste(name):
    conv, x, scheme = chosen(name, 128, "fp16", True)
    tiles = (
        configs.conv_tiles(conv, scheme, 128, x.dtype, "tf32")[0],
        configs.input_gradient_tiles(conv, True, 128, x.dtype, "tf32", "sm_90")[0],
        configs.weight_gradient_tiles(conv, True, 128, x.dtype, "tf32", "sm_90")[0],
    )
    found = (
        waste.forward(conv, scheme, tiles[0], 128),
        waste.input_gradient(conv, tiles[1], 128),
        waste.weight_gradient(conv, aligned_run(conv, x)[0], tiles[2], 128),
    )
    assert STATED[name][0] == scheme
    for stated, share in zip(STATED[name][1:], found, strict=True):
        assert 100 * share == pytest.approx(stated, abs=0.5 if stated > 10 else 0.05)


def test_waste_counts_every_padding_by_hand():
    """A 1x1 convolution of 3 pixels, 5 inputs, 7 outputs, in tiles of 4 x 8 x 8; a strided one by phases."""
    conv = Conv(1, 3, 1, 3, 1, 1, 1, 1, 0, 0, 1, 1, 1, 5, 7)
    tile = configs.ConvTile(4, 8, 0, 8, 4, 3)
    assert waste.forward(conv, "flat", tile, 1) == pytest.approx(4 * 8 * 8 / (3 * 5 * 7) - 1)
    assert waste.input_gradient(conv, tile, 1) == pytest.approx(4 * 8 * 8 / (3 * 5 * 7) - 1)
    assert waste.weight_gradient(conv, 0, tile, 1) == pytest.approx(8 * 8 * 4 / (3 * 5 * 7) - 1)
    # 3 taps at stride 2 from 5 pixels: phases of 3 and 2 pixels see 2 taps and 1
    strided = Conv(1, 5, 1, 2, 1, 3, 1, 2, 0, 0, 1, 1, 1, 16, 8)
    assert waste.phase_taps(2, 0, 1, 3) == [2, 1]
    one = configs.ConvTile(1, 16, 0, 8, 4, 3)
    assert waste.input_gradient(strided, one, 1) == pytest.approx(3 * 3 / (2 * 3) - 1)
    # of 8 inputs, 3 blocks of 2 pixels see 2 taps each
    few = replace(strided, inputs=8)
    assert waste.input_gradient(few, one, 1) == pytest.approx(3 * 16 * 2 * 8 / (2 * 3 * 8 * 8) - 1)
