"""Memory of a training step: what is saved for the backward pass, and the peak above the start."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

import fastalex
from benchmarks.timing import Call
from fastalex import _native

MIB = 2**20


def saved_mib(call: Call, parameters: Iterable[Tensor]) -> float:
    """What autograd keeps for the backward pass: each storage once, parameters not at all."""
    known = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return sum(saved.values()) / MIB


def peak_mib(call: Call, device: torch.device) -> float:
    """The most that is held at once during ``call``, above what was held before.

    On the CPU that is what torch's allocator held at most, and all the memory of large results that fastalex took,
    idle or not: it keeps it, so the two maxima add up.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return (torch.cuda.max_memory_allocated(device) - before) / MIB
    fastalex.empty_cache()
    kept = _kept_bytes()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        call()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return (peak + _kept_bytes() - kept) / MIB


def _kept_bytes() -> int:
    return 0 if _native.error else int(torch.ops.fastalex_cpu.kept_memory_bytes())
