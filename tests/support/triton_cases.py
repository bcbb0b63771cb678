"""Every launch the ledger records: each kernel on the network's shapes, with each configuration
that can be chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from fastalex.kernels import _configs as configs
from fastalex.kernels import conv_relu_max_pool as pooled
from fastalex.kernels._conv import Conv, forward_scheme, geometry
from fastalex.kernels._conv_image_gradient import block_convolution, block_tiles, by_blocks
from fastalex.kernels._layout import strides
from fastalex.kernels.augment import augment
from fastalex.kernels.conv_relu import conv_relu
from fastalex.kernels.conv_relu_backward import conv_relu_backward
from fastalex.kernels.linear_relu import linear_relu, linear_relu_backward
from fastalex.kernels.lrn import lrn, lrn_backward
from fastalex.kernels.lrn_max_pool import lrn_max_pool, lrn_max_pool_backward
from fastalex.kernels.max_pool import max_pool, max_pool_backward
from torch import Tensor

BATCH = 128
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
LRN = (5, 2e-5, 0.75, 2.0, 2)
POOL = ((3, 3), (2, 2), (0, 0))
LAYERS = {  # [C, H, W], row pitch in pixels, O, kernel, stride, padding, groups
    "conv1": ((3, 227, 227), 228, 96, 11, 4, 0, 1),
    "conv1-unpadded": ((3, 227, 227), 227, 96, 11, 4, 0, 1),
    "conv2": ((96, 27, 27), 27, 256, 5, 1, 2, 2),
    "conv3": ((256, 13, 13), 13, 384, 3, 1, 1, 1),
    "conv4": ((384, 13, 13), 13, 384, 3, 1, 1, 2),
    "conv5": ((384, 13, 13), 13, 256, 3, 1, 1, 2),
    "narrow": (
        (32, 13, 13),
        13,
        32,
        3,
        1,
        1,
        2,
    ),  # not of the network: few channels a group take the smallest tiles
}


@dataclass(frozen=True)
class Case:
    """A call whose launches of `kernel` are compiled; quick cases are compiled in every run of the
    tests.
    """

    name: str
    kernel: str
    call: Callable[[], object]
    quick: bool = False


def meta(shape: tuple[int, ...], dtype: torch.dtype, last: bool) -> Tensor:
    layout = torch.channels_last if last else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=layout)


def layer(name: str, batch: int, dtype: torch.dtype, last: bool):
    """(input, weight, bias, stride, padding, dilation, groups) of a layer of the network."""
    (c, h, w), pitch, o, kernel, stride, padding, groups = LAYERS[name]
    x = meta((batch, c, h, pitch), dtype, last)[..., :w]
    weight = meta((o, c // groups, kernel, kernel), dtype, last)
    return x, weight, meta((o,), dtype, False), (stride,) * 2, (padding,) * 2, (1, 1), groups


def describe(config) -> str:
    if isinstance(config, configs.Launch):
        return f"{config.block}x{config.rows}w{config.warps}"
    second = f"+{config.n2}" if config.n2 else ""
    split = f"/{config.split}" if config.split > 1 else ""
    return f"{config.m}x{config.n}{second}x{config.k}w{config.warps}s{config.stages}{split}"


def pointwise_cases(dtype_name: str, last: bool, every: bool) -> Iterator[Case]:
    """LRN, pooling and both, on the first norm's shape."""
    dtype = DTYPES[dtype_name]
    x, pooled = meta((BATCH, 96, 55, 55), dtype, last), meta((BATCH, 96, 27, 27), dtype, last)
    taps = meta((BATCH, 96, 27, 27), torch.uint8, last)
    where = f"{dtype_name}/{'nhwc' if last else 'nchw'}"

    def each(table, key, name: str, kernel: str, call) -> Iterator[Case]:
        for i, launch in enumerate(table[key] if every else table[key][:1]):
            quick = i == 0 and last and dtype_name == "fp16"
            yield Case(
                f"{name}/{where}/{describe(launch)}",
                kernel,
                lambda launch=launch: call(launch),
                quick,
            )

    yield from each(
        configs.LRN, ("forward", last), "lrn", "lrn_forward", lambda t: lrn(x, *LRN, launch=t)
    )
    yield from each(
        configs.LRN,
        ("backward", last),
        "lrn_backward",
        "lrn_input_gradient",
        lambda t: lrn_backward(x, x, *LRN, launch=t),
    )
    for save in (True, False):
        suffix = "/train" if save else "/infer"
        yield from each(
            configs.POOL,
            ("forward", last, False),
            "max_pool" + suffix,
            "pool_forward",
            lambda t, save=save: max_pool(x, *POOL, (1, 1), False, save, launch=t),
        )
        yield from each(
            configs.POOL,
            ("forward", last, True),
            "lrn_max_pool" + suffix,
            "pool_forward",
            lambda t, save=save: lrn_max_pool(x, *LRN, *POOL, False, save, launch=t),
        )
    yield from each(
        configs.POOL,
        ("backward", last, False),
        "max_pool_backward",
        "pool_backward",
        lambda t: max_pool_backward(pooled, taps, (55, 55), *POOL, (1, 1), launch=t),
    )
    yield from each(
        configs.POOL,
        ("backward", last, True),
        "lrn_max_pool_backward",
        "pool_backward",
        lambda t: lrn_max_pool_backward(pooled, x, taps, *LRN, *POOL, launch=t),
    )
    yield from each(
        configs.POOL,
        ("backward", last, False),
        "max_pool_backward/masking",
        "pool_backward",
        lambda t: max_pool_backward(pooled, taps, (55, 55), *POOL, (1, 1), rectified=x, launch=t),
    )
    yield from each(
        configs.POOL,
        ("backward", last, True),
        "lrn_max_pool_backward/masking",
        "pool_backward",
        lambda t: lrn_max_pool_backward(pooled, x, taps, *LRN, *POOL, rectified=x, launch=t),
    )


def forward_cases(
    name: str, dtype_name: str, last: bool, precision: str, batch: int, every: bool
) -> Iterator[Case]:
    arguments = layer(name, batch, DTYPES[dtype_name], last)
    x, weight = arguments[:2]
    conv = geometry(x.shape[2:], weight, *arguments[3:])
    scheme = forward_scheme(conv, strides(x), x.element_size())
    tiles = configs.conv_tiles(conv, scheme, batch, x.dtype, precision)
    if every:  # the first one it would take, then all the others of the table
        rest = [configs.with_split(t, conv, scheme, batch) for t in configs.CONV_FORWARD[scheme]]
        tiles = list(dict.fromkeys([*tiles, *rest]))
    where = f"{name}/{label(dtype_name, precision)}/{'nhwc' if last else 'nchw'}/b{batch}"
    for i, tile in enumerate(tiles if every else tiles[:1]):
        yield Case(
            f"conv_relu/{where}/{scheme}/{describe(tile)}",
            "conv_relu_forward",
            lambda tile=tile: conv_relu(*arguments, tile=tile, precision=precision),
            quick=i == 0 and dtype_name == "fp16" and last and name in ("conv1", "conv3"),
        )


def pooled_cases(dtype_name: str, last: bool, precision: str, every: bool) -> Iterator[Case]:
    """conv1 and the pool after it, as CaffeNet has them, in one kernel."""
    x, weight, bias, *rest = layer("conv1", BATCH, DTYPES[dtype_name], last)
    arguments = (x, weight, bias, *rest, *POOL, False)
    tiles = pooled.tiles(*pooled.geometries(x, weight, *rest, *POOL, False), x, precision)
    if every:
        tiles = list(dict.fromkeys([*tiles, *configs.CONV_POOL]))
    where = f"conv1/{label(dtype_name, precision)}/{'nhwc' if last else 'nchw'}"
    for i, tile in enumerate(tiles if every else tiles[:1]):
        yield Case(
            f"conv_relu_max_pool/{where}/{describe(tile)}",
            "conv_relu_pool_forward",
            lambda tile=tile: pooled.conv_relu_max_pool(*arguments, tile=tile, precision=precision),
            quick=i == 0 and dtype_name == "fp16" and last,
        )


def backward_cases(
    arch: str, name: str, dtype_name: str, last: bool, precision: str, every: bool
) -> Iterator[Case]:
    x, weight, _, *rest = layer(name, BATCH, DTYPES[dtype_name], last)
    conv = geometry(x.shape[2:], weight, *rest)
    y = meta((BATCH, weight.shape[0], conv.out_rows, conv.out_columns), x.dtype, last)
    where = f"{name}/{label(dtype_name, precision)}/{'nhwc' if last else 'nchw'}"
    found = {
        "input": gradient_tiles(conv, last, x.dtype, precision, arch, every),
        "weight": configs.weight_gradient_tiles(conv, last, BATCH, x.dtype, precision, arch),
    }
    if every:
        found["weight"] += [
            replace(t, split=configs.weight_gradient_split(t, conv, BATCH))
            for t in configs.weight_gradient_table(last, arch)
        ]
    # the weight gradient of a first layer, and what it could be of another, masks its operand itself
    if configs.masks_at_load((False, True), arch) and name in ("conv1", "conv3"):
        found["first-weight"] = found["weight"]
    # the input gradient of a layer behind another, and what it could be of conv3, masks what it makes
    if last and name in ("conv3", "conv4", "conv5"):
        found["masking-input"] = found["input"]
    for which, listed in found.items():
        tiles = list(dict.fromkeys(listed))
        side = which.removeprefix("first-").removeprefix("masking-")
        wanted = (side == "input", side == "weight", side == "weight")
        for i, tile in enumerate(tiles if every else tiles[:1]):
            yield Case(
                f"conv_relu_backward/{which}/{where}/{describe(tile)}",
                "conv_relu_forward"
                if side == "input" and by_blocks(conv)
                else f"conv_{side}_gradient",
                lambda tile=tile, side=side, which=which, wanted=wanted: conv_relu_backward(
                    y,
                    y,
                    x,
                    weight,
                    *rest,
                    wanted,
                    grad_is_masked=which != "first-weight",
                    rectified_input=which == "masking-input",
                    precision=precision,
                    **{side + "_tile": tile},
                ),
                quick=i == 0 and dtype_name == "fp16" and last and name == "conv3",
            )


def gradient_tiles(
    conv: Conv, last: bool, dtype: torch.dtype, precision: str, arch: str, every: bool
) -> list[configs.ConvTile]:
    """Of the input gradient: those a layer can choose from, and with `every` all others of its table."""
    if by_blocks(conv):
        inner = block_convolution(conv)
        scheme = "flat" if last else "planes"
        found, table = (
            block_tiles(conv, last, BATCH, dtype, precision),
            configs.CONV_FORWARD[scheme],
        )
        rest = [
            configs.with_split(t, inner, scheme, BATCH)
            for t in table
            if configs.fits(t, inner.outputs)
        ]
    else:
        found = configs.input_gradient_tiles(conv, last, BATCH, dtype, precision, arch)
        rest = list(configs.CONV_INPUT_GRADIENT[last])
    return found + rest if every else found


def label(dtype_name: str, precision: str) -> str:
    return precision if dtype_name == "fp32" else dtype_name


def linear_cases(dtype_name: str, rows: int) -> Iterator[Case]:
    """fc6, the largest matrix of the network, forward and backward."""
    dtype = DTYPES[dtype_name]
    x, w = (torch.empty(n, 9216, dtype=dtype, device="meta") for n in (rows, 4096))
    y = torch.empty(rows, 4096, dtype=dtype, device="meta")
    where = f"fc6/{label(dtype_name, 'tf32')}/b{rows}"
    yield Case(
        f"linear_relu/{where}",
        "conv_relu_forward",
        lambda: linear_relu(x, w, w[:, 0].clone(), True, precision="tf32"),
    )
    for which, wanted in (("input", (True, False, False)), ("weight", (False, True, True))):
        yield Case(
            f"linear_relu_backward/{which}/{where}",
            f"conv_{which}_gradient",
            lambda wanted=wanted: linear_relu_backward(y, y, x, w, wanted, precision="tf32"),
        )


def augment_cases() -> Iterator[Case]:
    """Crops of the network's size into rows of 228 pixels: each result's type, minus a colour or an image."""
    images = torch.empty(BATCH, 256, 256, 3, dtype=torch.uint8, device="meta")
    corners = torch.empty(BATCH, 2, dtype=torch.int64, device="meta")
    mirrored = torch.empty(BATCH, dtype=torch.bool, device="meta")
    shift, colour = (torch.empty(*n, 3, device="meta") for n in ((BATCH,), ()))
    for mean, minus in ((colour, "colour"), (torch.empty(256, 256, 3, device="meta"), "image")):
        for dtype_name, dtype in DTYPES.items():
            arguments = (images, corners, mirrored, shift, mean, (227, 227), 1.0, 228, dtype)
            yield Case(
                f"augment/{dtype_name}/{minus}",
                "crops",
                lambda arguments=arguments: augment(*arguments),
                quick=dtype_name == "fp16" and minus == "colour",
            )


# the layers on which every configuration of a table is compiled, for every architecture: of each K scheme, and of each
# table of the gradients
WHOLE_TABLES = (("conv1", True), ("conv2", True), ("conv3", True), ("conv3", False))


def cases(arch: str) -> list[Case]:
    """Of an NVIDIA architecture, every configuration and the first choices of every layer and dtype; of AMD's, the
    former in float16.
    """
    found: list[Case] = []
    for last in (True, False):
        found += pointwise_cases("fp16", last, every=True)
    for name, last in WHOLE_TABLES:
        found += forward_cases(name, "fp16", last, "tf32", BATCH, every=True)
        gradients = name in ("conv1", "conv3")
        found += backward_cases(arch, name, "fp16", last, "tf32", every=gradients)
    found += pooled_cases("fp16", True, "tf32", every=True)
    found += linear_cases("fp16", BATCH)
    found += [*augment_cases(), placing_case()]
    if not arch.startswith("gfx"):
        found += first_choices(arch)
    return list({case.name: case for case in found}.values())


def placing_case() -> Case:
    """What puts the gradient of images in its place, beside the convolution that makes it."""
    x, weight, _, *rest = layer("conv1", BATCH, DTYPES["fp16"], True)
    y = meta((BATCH, 96, 55, 55), x.dtype, True)
    return Case(
        "place_blocks/conv1/fp16/nhwc",
        "place_blocks",
        lambda: conv_relu_backward(y, y, x, weight, *rest, (True, False, False)),
    )


def first_choices(arch: str) -> Iterator[Case]:
    """What each layer would take unmeasured, in each dtype and precision, and at batch 1."""
    for dtype_name in ("bf16", "fp32"):
        yield from pointwise_cases(dtype_name, True, every=False)
        yield from pooled_cases(dtype_name, True, "tf32", every=False)
    yield from pooled_cases("fp16", False, "tf32", every=False)
    yield from pooled_cases("fp32", True, "ieee", every=False)
    for name in LAYERS:
        yield from forward_cases(name, "fp16", True, "tf32", BATCH, every=False)
        yield from backward_cases(arch, name, "fp16", True, "tf32", every=False)
    for dtype_name, rows in (("fp16", 1), ("bf16", BATCH), ("fp32", BATCH)):
        yield from linear_cases(dtype_name, rows)
    for name in ("conv1", "conv3", "conv5"):
        yield from forward_cases(name, "fp16", True, "tf32", 1, every=False)
    for name, dtype_name, precision in (
        ("conv1", "fp32", "tf32"),
        ("conv3", "bf16", "tf32"),
        ("conv3", "fp32", "tf32"),
        ("conv3", "fp32", "ieee"),
    ):
        yield from forward_cases(name, dtype_name, True, precision, BATCH, every=False)
        yield from backward_cases(arch, name, dtype_name, True, precision, every=False)
    yield from forward_cases("conv1-unpadded", "fp16", False, "tf32", BATCH, every=False)
    yield from backward_cases(arch, "conv1-unpadded", "fp16", False, "tf32", every=False)
