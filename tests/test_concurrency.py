"""Every operator from many threads, in forked processes, with changing thread counts, and out of memory."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastalex import _tuning
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


_SUBINTERPRETER = """
try:
    import _interpreters as interpreters
except ImportError:
    import _xxsubinterpreters as interpreters
import fastalex
try:
    told = interpreters.run_string(interpreters.create(), "import fastalex")
except interpreters.RunFailedError as error:
    told = error
print(told)
"""


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="named otherwise there")
def test_a_subinterpreter_is_refused() -> None:
    """Where torch would hang, before torch is imported."""
    result = run([sys.executable, "-c", _SUBINTERPRETER], ROOT)
    assert result.code == 0, result.text
    assert "fastalex does not run in a subinterpreter, because torch does not" in result.text


def test_free_threaded_python_takes_no_wheel() -> None:
    """The tag of the wheel is among those that pip installs for Python 3.13, and not among the free-threaded ones."""
    tags = pytest.importorskip("packaging.tags")

    def taken(abi: str) -> bool:
        wanted = tags.cpython_tags((3, 13), abis=[abi], platforms=["linux_x86_64"])
        return any(str(tag) == "cp310-abi3-linux_x86_64" for tag in wanted)

    assert taken("cp313")
    assert not taken("cp313t")


def test_everything_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads call every operator, change thread counts, drop packed weights and write the tuning file together."""
    monkeypatch.setenv("FASTALEX_CACHE_DIR", str(tmp_path))
    _tuning.forget()
    prepared = [(sample, tensors_of(sample)) for sample in SAMPLES.values()]
    expected = [step(*call) for call in prepared]
    barrier, threads = threading.Barrier(6), torch.get_num_threads()

    def compute(index: int) -> None:
        barrier.wait()
        for turn in range(2 * len(prepared)):
            at = (index + turn) % len(prepared)
            assert_same(step(*prepared[at]), expected[at])

    def disturb() -> None:
        barrier.wait()
        for turn in range(20):
            torch.set_num_threads(1 + turn % 3)
            for _, tensors in prepared:
                torch.ops.fastalex_cpu.release_packed(tensors[-1].data_ptr())

    def tune(index: int) -> None:
        barrier.wait()
        for count in range(1, 6):
            _tuning.record("double", (torch.zeros(index, count),), _tuning.Choice("torch"))

    try:
        with ThreadPoolExecutor(6) as pool:
            work = [pool.submit(compute, index) for index in range(3)]
            work += [pool.submit(disturb), pool.submit(tune, 1), pool.submit(tune, 2)]
            for future in work:
                future.result(timeout=240)
    finally:
        torch.set_num_threads(threads)
    _tuning.forget()
    assert len(_tuning.memory()) == 10


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


#: Calls under a limit on the process's memory that their working memory or result is beyond, then one within it.
_SCARCE = """
import resource, torch
from fastalex import ops
x, weight = torch.randn(2, 16, 60, 60), torch.randn(16, 16, 3, 3)
expected = ops.conv2d_relu(x, weight)
wide = torch.empty(1).expand(1, 3, 3, 2**22)
with open("/proc/self/statm") as file:
    used = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**26, resource.RLIM_INFINITY))
calls = {
    "result": lambda: ops.conv2d_relu(torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1), padding=2**13),
    "scratch": lambda: ops.conv2d_relu(wide, torch.ones(1, 3, 3, 3), stride=(1, 2**19)),
}
for name, call in calls.items():
    try:
        call()
        print(name, "fits")
    except (RuntimeError, MemoryError) as error:
        print(name, "|", error)
assert torch.equal(ops.conv2d_relu(x, weight), expected)
print("the next call works")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
def test_working_memory_that_is_not_there_is_an_error_and_the_next_call_works() -> None:
    result = run([sys.executable, "-c", _SCARCE], ROOT, OMP_NUM_THREADS="1")
    assert result.code == 0, result.text
    assert "result | fastalex: not enough memory for a result of" in result.text
    assert "scratch | fastalex: not enough memory for" in result.text
    assert "the next call works" in result.text
