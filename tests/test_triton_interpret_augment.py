"""The augment kernel of the Triton backend in Triton's interpreter: the reference bit for bit."""

from __future__ import annotations

import os

import pytest
import torch

from fastalex import reference

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip(
        "set TRITON_INTERPRET=1: Triton decides when it is imported", allow_module_level=True
    )
pytest.importorskip("triton")

from fastalex.kernels.augment import augment

from tests.test_augment import CASES


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES[:-1], ids=str)
def test_every_bit_is_the_references(case, dtype):
    pitch = case.size[1] + case.gap
    arguments = (*case.arguments(), case.size, case.scale, pitch, dtype)
    made, expected = augment(*arguments), reference.augment(*arguments)
    assert torch.equal(made, expected)
    assert made.dtype is dtype
    if made.numel():
        assert made.stride() == expected.stride()


def test_a_corner_outside_is_moved_into_the_image():
    x, corners, *rest = CASES[0].arguments()
    outside = corners.clone()
    outside[0], outside[1] = torch.tensor([-5, -9]), torch.tensor([50, 90])
    inside = outside.clamp(min=0).minimum(torch.tensor([7, 11]))
    common = ((13, 11), 1.0, 11, torch.float32)
    assert torch.equal(augment(x, outside, *rest, *common), augment(x, inside, *rest, *common))
