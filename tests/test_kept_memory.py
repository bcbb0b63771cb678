"""The memory of large results: kept, handed out again, never to two at once, and given back when asked for."""

from __future__ import annotations

import gc
import io

import pytest
import torch

import fastalex
from fastalex import _native, ops

pytestmark = pytest.mark.skipif(_native.error is not None, reason=str(_native.error))

LARGE = 32 << 20
SHAPE = (1, 64, 400, 400)  # 39 MiB


@pytest.fixture(autouse=True)
def _clean():
    gc.collect()
    fastalex.empty_cache()
    yield
    gc.collect()
    fastalex.empty_cache()


def large(seed: int = 0) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def kept() -> int:
    return int(torch.ops.fastalex_cpu.kept_memory_bytes())


def test_the_next_result_takes_the_memory_of_the_last():
    x = large()
    first = ops.local_response_norm(x, 5)
    address, expected = first.data_ptr(), first.clone()
    del first
    held = kept()
    assert held >= LARGE
    second = ops.local_response_norm(x, 5)
    assert second.data_ptr() == address
    assert address % 64 == 0
    assert kept() == held
    assert torch.equal(second, expected)


def test_results_in_use_share_nothing():
    x, y = large(1), large(2)
    first = ops.local_response_norm(x, 5)
    view = first[:, :1]  # alone keeps the memory
    expected = view.clone()
    del first
    second = ops.local_response_norm(y, 5)
    assert second.data_ptr() != view.data_ptr()
    assert torch.equal(view, expected)
    assert torch.equal(second, ops.local_response_norm(y, 5))


def test_a_much_larger_block_is_not_spent_on_a_small_result():
    big = ops.local_response_norm(torch.randn(2, 64, 400, 400), 5)
    address = big.data_ptr()
    del big
    assert ops.local_response_norm(large(), 5).data_ptr() != address


def test_small_results_are_torchs_own():
    ops.local_response_norm(torch.randn(1, 8, 20, 20), 5)
    assert kept() == 0


def test_empty_cache_gives_idle_memory_back_and_leaves_results_alone():
    x = large()
    idle, used = ops.local_response_norm(x, 5), ops.local_response_norm(x, 5)
    expected = used.clone()
    del idle
    before = kept()
    fastalex.empty_cache()
    assert LARGE <= kept() < before
    assert fastalex.cached_bytes() >= kept()
    assert torch.equal(used, expected)
    del used
    fastalex.empty_cache()
    assert kept() == 0


def test_packed_weights_are_made_anew_after_empty_cache():
    conv = ops.Conv2dReLU(16, 32, 3, padding=1)
    x = torch.randn(1, 16, 9, 9)
    with torch.no_grad():
        expected = conv(x)
        assert torch.ops.fastalex_cpu.packed_bytes() > 0
        fastalex.empty_cache()
        assert torch.ops.fastalex_cpu.packed_bytes() == 0
        assert torch.equal(conv(x), expected)


def test_a_kept_gradient_is_not_overwritten_by_the_next_step():
    weight = torch.randn(4096, 2304, requires_grad=True)  # its gradient takes 36 MiB
    x = torch.randn(4, 2304)
    ops.linear_relu(x, weight).sum().backward()
    first, expected = weight.grad, weight.grad.clone()
    weight.grad = None
    ops.linear_relu(2 * x, weight).sum().backward()
    assert torch.equal(first, expected)
    ops.linear_relu(x, weight).sum().backward()  # accumulates
    assert torch.allclose(weight.grad, 3 * expected)


def test_poison_reaches_memory_that_is_used_again():
    x = large()
    plain = ops.local_response_norm(x, 5)
    expected = plain.clone()
    del plain
    _native.set_poison(True)
    try:
        assert torch.equal(ops.local_response_norm(x, 5), expected)
    finally:
        _native.set_poison(False)


def test_large_results_can_be_saved_shared_and_put_into_numpy():
    result = ops.local_response_norm(large(), 5)
    expected = result.clone()
    file = io.BytesIO()
    torch.save(result, file)
    file.seek(0)
    assert torch.equal(torch.load(file), expected)
    array = result.numpy()
    del result  # the array holds the memory
    other = ops.local_response_norm(large(3), 5)
    assert (array == expected.numpy()).all()
    other_expected = other.clone()
    other.share_memory_()
    assert torch.equal(other, other_expected)


def test_idle_memory_is_bounded():
    limit = torch.ops.fastalex_cpu.kept_memory_limit()
    x = torch.randn(1, 256, 512, 512)  # 256 MiB
    results = [ops.max_pool2d(x, 1) for _ in range(5)]
    addresses = [result.data_ptr() for result in results]
    assert len(set(addresses)) == 5
    assert kept() > limit
    while results:
        results.pop(0)
    assert LARGE <= kept() <= limit
    # The least recently used went; the last is the first to serve again only if it is still there.
    assert ops.max_pool2d(x, 1).data_ptr() in addresses[1:]
