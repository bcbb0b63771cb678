"""docs/gpu-evidence.md is what its generator writes, and the derivations in it hold."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from tests.support import gpu_evidence
from tests.support import triton_bounds as bounds


def test_the_page_is_up_to_date():
    expected = gpu_evidence.document()
    assert gpu_evidence.DOCUMENT.read_text() == expected, (
        "make it anew: python -m tests.support.gpu_evidence"
    )


@pytest.mark.parametrize("gpu", bounds.GPUS.values(), ids=bounds.GPUS)
def test_pooling_in_the_epilogue_never_pays_where_the_paper_pools_at_once(gpu):
    """Nor in conv2 of the variants; their conv1, bound by its output's bytes, is the exception that the page names."""
    for name in bounds.POOLED:
        apart, together = bounds.fusion(name, gpu)
        assert (together < apart) == name.startswith("conv1"), name


def test_a_tile_of_pooled_outputs_recomputes_its_halo():
    """13 x 13 pixels pooled to 6 x 6: the whole map in 256 pixels, or four tiles of 3 x 4 (63 pixels of 64)."""
    conv = bounds.pooled_conv("conv5 of every preset")
    assert (conv.out_rows, bounds.pooled(conv.out_rows)) == (13, 6)
    assert bounds.recomputed(conv) == (4 * 64 / 169, 64, 3, 4)
