"""Memory the CPU backend keeps between calls: packed weights, and the memory of large results."""

from __future__ import annotations

import torch

from fastalex import _native


def cached_bytes() -> int:
    """Bytes that the CPU backend holds beyond the tensors in use, plus those of large tensors in use.

    These are weights packed for convolutions (at most 1 GiB, gone with the weight they were made from), and the
    memory of results of 32 MiB and more, which is kept for the next result of its size when torch lets go of it (at
    most 1 GiB of idle memory): the system's fresh pages cost more than most operators. 0 without the CPU library.
    """
    if _native.error is not None:
        return 0
    library = torch.ops.fastalex_cpu
    return int(library.packed_bytes()) + int(library.kept_memory_bytes())


def empty_cache() -> None:
    """Gives packed weights and idle memory of large results back to the system; the next calls make them anew.

    The twin of :func:`torch.cuda.empty_cache` for the CPU backend. Tensors in use stay as they are.
    """
    if _native.error is not None:
        return
    torch.ops.fastalex_cpu.release_all_packed()
    torch.ops.fastalex_cpu.release_kept_memory()
