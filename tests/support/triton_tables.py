"""The shapes that the Triton kernels are run over, in the interpreter and on a GPU: partial tiles on every axis, group
boundaries, padding on each side.
"""

from __future__ import annotations

ONE = (1, 1)

# shape, size, beta, k, groups: each names what only it has
LRN_CASES = [
    ((2, 16, 5, 7), 5, 0.75, 2.0, 2),  # towers of one or two vectors, a partial block
    ((1, 6, 3, 5), 4, 0.5, 1.0, 1),  # an even window; a vector of two channels
    ((1, 3, 4, 4), 9, 0.6, 1.0, 1),  # a window wider than the channels; a vector of one
    ((1, 32, 2, 3), 20, 1.0, 1.0, 2),  # a window of several vectors
    ((2, 5, 3, 3), 1, 0.0, 1.0, 1),
    ((1, 48, 3, 3), 2, 0.75, 0.0, 1),  # k = 0: channels outside the group must not divide by zero
    ((1, 80, 3, 3), 40, 0.75, 2.0, 2),  # too wide to unroll
    ((1, 40, 1, 1), 80, 0.75, 0.0, 1),
]

# shape, kernel, stride, padding, dilation, ceil_mode
POOL_CASES = [
    ((2, 16, 11, 9), (3, 3), (2, 2), (0, 0), ONE, False),  # the network's window: rows are shared
    ((1, 8, 10, 9), (3, 2), (2, 1), (1, 1), ONE, True),
    ((1, 3, 9, 12), (2, 3), (1, 2), (1, 0), (2, 3), False),  # dilated: backward goes pixel by pixel
    ((1, 2, 6, 10), (5, 9), (3, 2), (2, 4), ONE, True),  # taller and wider than is unrolled
    ((1, 4, 7, 7), (3, 3), (3, 3), (1, 1), ONE, True),  # windows that don't overlap
    ((1, 4, 7, 7), (2, 2), (5, 5), (1, 1), ONE, True),  # pixels that no window covers
    ((1, 4, 6, 6), (4, 4), (1, 1), (2, 2), ONE, False),  # three rows shared
]

# shape, LRN arguments, kernel, stride, padding, ceil_mode
FUSED_CASES = [
    ((1, 16, 7, 9), (5, 0.3, 0.75, 2.0, 2), (3, 3), (2, 2), (0, 0), False),
    ((2, 6, 6, 7), (4, 0.3, 0.6, 1.0, 1), (3, 2), (2, 1), (1, 1), True),
    ((1, 3, 8, 9), (9, 0.3, 0.75, 1.0, 1), (2, 2), (3, 3), (0, 1), False),
    ((1, 80, 3, 3), (40, 0.3, 0.75, 1.0, 1), (3, 3), (2, 2), (1, 1), False),
]

# input shape, output channels, kernel, stride, padding, dilation, groups, the scheme of NHWC
# float16
CONV_CASES = [
    (
        (1, 3, 23, 43),
        24,
        (11, 11),
        (4, 4),
        (0, 0),
        ONE,
        1,
        "rows",
    ),  # conv1: a body and a tail, all inside
    (
        (1, 4, 9, 24),
        5,
        (2, 9),
        (4, 2),
        (1, 4),
        (3, 1),
        1,
        "rows",
    ),  # padded; a stride that skips input rows
    (
        (1, 24, 9, 8),
        40,
        (3, 5),
        (1, 1),
        (1, 2),
        ONE,
        2,
        "flat",
    ),  # conv2: towers, K not a multiple of a block
    (
        (2, 5, 9, 8),
        7,
        (3, 3),
        (1, 2),
        (1, 2),
        (2, 1),
        1,
        "flat",
    ),  # channels of no alignment, dilated
    (
        (2, 3, 9, 8),
        3,
        (1, 1),
        (3, 2),
        (0, 0),
        ONE,
        3,
        "flat",
    ),  # depthwise, strided pixels without a tap
    (
        (1, 64, 9, 8),
        24,
        (3, 3),
        (1, 1),
        (1, 1),
        ONE,
        1,
        "taps",
    ),  # conv3: more than one tile of pixels
    ((1, 128, 7, 6), 20, (3, 2), (2, 1), (1, 0), (2, 3), 2, "taps"),
]

# as above: convolutions whose input gradient goes by blocks of pixels
BLOCK_CASES = [
    ((2, 3, 10, 13), 8, (3, 5), (2, 3), (1, 2), ONE, 1, "flat"),  # padded, blocks cut by the edge
    ((1, 8, 7, 9), 64, (1, 2), (2, 2), (0, 0), ONE, 1, "flat"),  # pixels that no window reaches
    ((1, 2, 12, 8), 5, (2, 3), (5, 1), (0, 1), ONE, 1, "flat"),  # whole blocks that none reaches
    ((1, 2, 3, 40), 4, (1, 16), (1, 2), (0, 3), ONE, 1, "flat"),  # walked in kernel rows
]

LINEAR_CASES = [  # rows, inputs, outputs
    ((2, 3), 128, 24),  # "taps"; a partial tile of rows and of outputs
    ((70,), 37, 20),  # "flat", unaligned; more than one tile of rows
]
