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


@pytest.mark.parametrize("batch", [32, 64, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("last", [True, False], ids=["nhwc", "nchw"])
@pytest.mark.parametrize("name", NETWORK)
def test_forward_wastes_under_six_percent_on_every_layer(name, last, dtype, batch):
    conv, x, scheme = chosen(name, batch, dtype, last)
    tile = configs.conv_tiles(conv, scheme, batch, x.dtype, "tf32")[0]
    assert waste.forward(conv, scheme, tile, batch) < 0.06


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
