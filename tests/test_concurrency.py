"""Every operator from many threads, in forked processes, with changing thread counts, and out of memory."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tests.support.packaging import ROOT, run
from tests.support.samples import SAMPLES, Sample, distinct

samples = pytest.mark.parametrize("sample", SAMPLES.values(), ids=SAMPLES)
#: Batches large enough to be divided among threads.
BATCH = 24


@pytest.fixture
def restored_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def tensors_of(sample: Sample, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """The sample's tensors with a batch of BATCH, each asking for a gradient."""
    first, *rest = sample.shapes
    shapes = ((BATCH, *first[1:]), *rest)
    return [distinct(shape, dtype).requires_grad_() for shape in shapes]


def step(sample: Sample, tensors: list[Tensor]) -> list[Tensor]:
    """The output and the gradient of every tensor."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    output = sample.call(*leaves)
    output.square().sum().backward()
    return [output.detach(), *(leaf.grad for leaf in leaves)]


def assert_same(actual: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)


@samples
def test_many_threads_get_what_one_gets(sample: Sample) -> None:
    """Eight Python threads start together, each on tensors of its own; caches and pools are shared."""
    inputs = [tensors_of(sample) for _ in range(8)]
    expected = [step(sample, tensors) for tensors in inputs]
    barrier = threading.Barrier(len(inputs))

    def work(index: int) -> None:
        barrier.wait()
        for _ in range(10):
            assert_same(step(sample, inputs[index]), expected[index])

    with ThreadPoolExecutor(len(inputs)) as pool:
        for future in [pool.submit(work, index) for index in range(len(inputs))]:
            future.result(timeout=120)


@samples
def test_thread_counts_may_change_between_calls(sample: Sample, restored_threads: None) -> None:
    tensors = tensors_of(sample)
    expected = step(sample, tensors)
    for threads in (1, 2, 5, 1, 3):
        torch.set_num_threads(threads)
        assert_same(step(sample, tensors), expected)


class _Computing(Dataset[list[Tensor]]):
    """A data set whose items are results of the operators."""

    def __init__(self, calls: list[Callable[[], list[Tensor]]]) -> None:
        self.calls = calls

    def __len__(self) -> int:
        return len(self.calls)

    def __getitem__(self, index: int) -> list[Tensor]:
        return self.calls[index]()


def data_loader_workers_compute() -> None:
    prepared = [(sample, tensors_of(sample)) for sample in SAMPLES.values()]
    expected = [step(*call) for call in prepared]
    data = _Computing([lambda call=call: step(*call) for call in prepared])  # type: ignore[misc]
    loader = DataLoader(
        data, batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=120
    )
    for actual, wanted in zip(loader, expected, strict=True):
        assert_same(actual, wanted)


def forked_child_computes_with_one_thread() -> None:
    prepared = [(sample, tensors_of(sample)) for sample in SAMPLES.values()]
    expected = [step(*call) for call in prepared]
    child = os.fork()
    if child == 0:
        code = 1
        try:
            torch.set_num_threads(1)
            for call, wanted in zip(prepared, expected, strict=True):
                assert_same(step(*call), wanted)
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize(
    "program", [data_loader_workers_compute, forked_child_computes_with_one_thread]
)
def test_forks_after_use(program: Callable[[], None]) -> None:
    """The parent has used its pools and caches; a process of its own, since autograd's threads forbid a fork."""
    code = f"from tests import test_concurrency as t; t.{program.__name__}()"
    result = run([sys.executable, "-c", code], ROOT)
    assert result.code == 0, result.text


@samples
def test_out_of_memory_is_torchs_error_and_the_next_call_works(sample: Sample) -> None:
    first, *rest = (tensor.detach() for tensor in tensors_of(sample))
    expected = sample.call(first, *rest)
    endless = first[:1].expand(2**44 // first[0].numel(), *first.shape[1:])
    with pytest.raises(RuntimeError, match=r"(?i)memory|storage size"):
        sample.call(endless, *rest)
    assert torch.equal(sample.call(first, *rest), expected)


#: Calls of one operator with its gradients, printing how far the process has grown since it was warm.
_LEAK = """
import os, sys, torch
sys.path.insert(0, {root!r})
from tests.support.samples import SAMPLES
sample = SAMPLES[{name!r}]
torch.set_num_threads(1)

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

def calls(count):
    for index in range(count):
        tensors = [tensor.requires_grad_() for tensor in sample.tensors(torch.float32)]
        sample.call(*tensors).sum().backward()
        with torch.no_grad():
            sample.call(*tensors)

calls({warm})
before = resident()
calls({count})
print(resident() - before)
"""


def growth(name: str, warm: int, count: int) -> int:
    code = _LEAK.format(root=str(ROOT), name=name, warm=warm, count=count)
    result = run([sys.executable, "-c", code], ROOT)
    assert result.code == 0, result.text
    return int(result.text.split()[-1])


def test_memory_stays_flat_over_calls() -> None:
    """A tensor lost a call, at 64 bytes for the smallest, would show as 200 KB."""
    assert growth("lrn", 1000, 3000) < 128 * 1024


@pytest.mark.slow
@samples
def test_memory_stays_flat_over_many_calls(sample: Sample) -> None:
    assert growth(sample.name, 5000, 100_000) < 1024 * 1024
