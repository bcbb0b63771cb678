"""The measured choice on a GPU: who serves a call fastest, timed once a shape and remembered on disk.

No engine is bet on: every backend that can serve the call, with each of its configurations, takes turns with stock
torch (cuDNN), on random inputs of the call's own shapes and strides. A result that is further from float64 than stock's
own twice over is not trusted, however fast. The winner is kept in a JSON file, $FASTALEX_CACHE_DIR/tuning.json (by
default in ~/.cache/fastalex), under a key that names the call and all that the answer depends on: device, torch,
compiler, and the package's own source.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
import json
import math
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastalex import _cache

VERSION = 2
_LARGEST = 1 << 16  # of the numbers in a configuration
DEVICES = {"cuda"}  # of the calls that are measured
Timer = Callable[[Callable[[], Any]], float]


@dataclasses.dataclass(frozen=True)
class Choice:
    """The winner: a backend, and the configurations it takes as keyword arguments."""

    backend: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Trial:
    """One candidate's outcome: its time, or why it was not trusted."""

    choice: Choice
    milliseconds: float = math.inf
    refusal: str | None = None


_paused = 0  # not a context variable: a backward pass runs in threads of its own


def enabled() -> bool:
    """Whether a first call is measured: FASTALEX_TUNE=0 leaves that to :func:`fastalex.tune`."""
    asked = os.environ.get("FASTALEX_TUNE", "1")
    if asked not in ("0", "1"):
        raise ValueError(f"FASTALEX_TUNE is '{asked}'; it can be 0 or 1")
    return not _paused and asked == "1"


enabled()  # a wrong value is told at import, as other variables' are, and not by a GPU's first call


@contextlib.contextmanager
def paused() -> Iterator[None]:
    """Inside, no call is measured by itself."""
    global _paused
    _paused += 1
    try:
        yield
    finally:
        _paused -= 1


# --- what is remembered ------------------------------------------------------------------------


def cache_file() -> Path:
    return _cache.folder() / "tuning.json"


def sources() -> list[Path]:
    """What the kernels are made of: Python, CUDA sources, and the libraries built of them."""
    package = Path(__file__).parent
    installed = (package / "kernels").exists()  # else in a checkout, beside the package
    python = [package] if installed else [package, package.parent / "kernels"]
    files = [path for folder in python for path in folder.rglob("*.py")]
    cuda = importlib.import_module("fastalex._cupy").kernel_folder()
    files += [path for path in cuda.rglob("*.*") if path.is_file()]
    return sorted({*files, *package.glob("_cuda*.so")})


@functools.cache
def environment(device: torch.device) -> str:
    """What an answer depends on beside the call: device, torch, compiler, the package's source."""
    digest = hashlib.sha256()
    for path in sources():
        digest.update(path.name.encode() + path.read_bytes())
    real = device.type == "cuda" and torch.cuda.is_available()  # a fake tensor needs no GPU
    name = torch.cuda.get_device_name(device) if real else device.type
    found = importlib.util.find_spec("triton")
    compiler = importlib.import_module("triton").__version__ if found else "none"
    return f"{name}, torch {torch.__version__}, triton {compiler}, source {digest.hexdigest()[:16]}"


def settings(first: Tensor) -> str:
    """Of torch, what changes stock's algorithm: how float32 is multiplied, and determinism."""
    flags = ["deterministic"] * torch.are_deterministic_algorithms_enabled()
    if first.dtype == torch.float32:
        flags.append(importlib.import_module("fastalex.kernels._conv").float32_precision())
        flags.append(torch.get_float32_matmul_precision())
    return " ".join(flags)


def signature(value: Any) -> str:
    if isinstance(value, Tensor):
        shape, stride = list(value.shape), list(value.stride())
        return f"{str(value.dtype).removeprefix('torch.')}{shape}/{stride}"
    if isinstance(value, (tuple, list)):
        return f"[{','.join(map(signature, value))}]"
    return repr(value)


def call_key(op: str, args: Sequence[Any]) -> str:
    """A call's name in the file, e.g. "conv_relu float16[1, 3, ..]/[..] ... on NVIDIA H100, ..."."""
    first: Tensor = args[0]
    told = f" ({settings(first)})" if settings(first) else ""
    return f"{op} {' '.join(map(signature, args))}{told} on {environment(first.device)}"


def _configurations() -> dict[str, Any]:
    configs = importlib.import_module("fastalex.kernels._configs")
    native = importlib.import_module("fastalex._cuda_native")  # which imports this module's users
    kinds = (configs.ConvTile, configs.Launch, native.Instruction)
    return {kind.__name__: kind for kind in kinds}


def _configuration(kind: Any, fields: Mapping[str, Any]) -> Any:
    """One that was written out; raises where a field is not of its type, or no size that we would write."""
    for field in dataclasses.fields(kind):
        value = fields.get(field.name, field.default)
        if type(value).__name__ != field.type or not 0 <= value <= _LARGEST:
            raise ValueError(f"{kind.__name__} has {field.name} {value!r}")
    return kind(**fields)


def _choice(backend: str, options: Mapping[str, Any]) -> Choice:
    if backend not in ("cuda", "triton", "cupy", "torch"):
        raise ValueError(f"it names a backend {backend!r}")
    kinds = _configurations()
    return Choice(
        backend, {name: _configuration(kinds[kind], of) for name, (kind, of) in options.items()}
    )


def load(path: Path) -> dict[str, Choice]:
    """The file's entries; none, with a warning, where it isn't one of ours or is damaged."""
    try:
        content = json.loads(_cache.read(path))
        if content["version"] != VERSION:
            return {}
        return {key: _choice(*choice) for key, choice in content["entries"].items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        warnings.warn(
            f"{path} is ignored, as it can't be read: {error!r}; delete it to be rid of this",
            stacklevel=2,
        )
        return {}


def save(path: Path, entries: Mapping[str, Choice]) -> None:
    plain = {
        key: (
            choice.backend,
            {
                name: (type(config).__name__, dataclasses.asdict(config))
                for name, config in choice.options.items()
            },
        )
        for key, choice in sorted(entries.items())
    }
    _cache.write(path, json.dumps({"version": VERSION, "entries": plain}, indent=1).encode())


@functools.cache
def _memory_of(path: Path) -> dict[str, Choice]:
    return load(path)


def memory() -> dict[str, Choice]:
    """The file's entries, read once a process."""
    with _recording:
        return _memory_of(cache_file())


#: Threads take turns: what one records, another neither misses nor overwrites.
_recording = threading.RLock()
_recent: dict[tuple[Any, ...], Choice | None] = {}  # by what is quick to hash
_unmeasurable: set[tuple[Any, ...]] = set()


def forget() -> None:
    """Drops what this process remembers; the file stays."""
    _memory_of.cache_clear()
    _recent.clear()
    _unmeasurable.clear()


def _quick_key(op: str, args: Sequence[Any]) -> tuple[Any, ...]:
    parts: list[Any] = [op, settings(args[0])]
    for value in args:
        if isinstance(value, Tensor):
            parts += (value.dtype, value.shape, value.stride(), value.device)
        else:
            parts.append(tuple(value) if isinstance(value, list) else value)
    return tuple(parts)


def recorded(op: str, args: Sequence[Any]) -> Choice | None:
    """The winner of this call, if it was ever measured on this device."""
    if args[0].device.type not in DEVICES:
        return None
    key = _quick_key(op, args)
    if key not in _recent:
        _recent[key] = memory().get(call_key(op, args)) if memory() else None
    return _recent[key]


def options(op: str, backend: str, args: Sequence[Any]) -> Mapping[str, Any]:
    """The configurations that won, where this backend did; else none, and it takes its own first."""
    choice = recorded(op, args)
    return choice.options if choice is not None and choice.backend == backend else {}


def record(op: str, args: Sequence[Any], choice: Choice) -> None:
    """Remembers a winner; where the disk takes nothing, in this process alone."""
    key, path = call_key(op, args), cache_file()
    with _recording:
        memory()[key] = choice
        _recent[_quick_key(op, args)] = choice
        try:
            save(path, {**load(path), **memory()})  # others may have written since it was read
        except OSError as error:
            warnings.warn(f"{path} could not be kept: {error}", stacklevel=2)


# --- how it is measured ------------------------------------------------------------------------


def milliseconds(run: Callable[[], Any]) -> float:
    """The median of a tenth of a second of calls, the device's work awaited."""
    from torch.utils.benchmark import Timer as Stopwatch

    return 1e3 * float(
        Stopwatch("run()", globals={"run": run}).blocked_autorange(min_run_time=0.1).median
    )


def random_arguments(args: Sequence[Any]) -> list[Any]:
    """The call with normal values in place of its own, in memory laid out alike; offsets stay."""

    def renewed(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        reach = 1 + sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True))
        memory = torch.randn(max(reach, 0), generator=generator, device=value.device)
        return memory.to(value.dtype).as_strided(value.shape, value.stride())

    generator = torch.Generator(args[0].device).manual_seed(0)  # the user's own stays untouched
    return [renewed(value) for value in args]


def _outputs(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


class Judge:
    """Compares results with float64, as strictly as twice stock's own error allows."""

    def __init__(self, op: str, reference: Callable[..., Any], args: Sequence[Any]) -> None:
        self.op, self.args = op, args
        wide = [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
        self.wide = wide
        self.exact = _outputs(reference(*wide))
        self.limits: list[float] = []
        for stock, exact in zip(_outputs(reference(*args)), self.exact, strict=True):
            limit = 0.0
            if exact.is_floating_point() and exact.numel():
                scale = exact.abs().max().item() * torch.finfo(stock.dtype).eps
                limit = 2 * _distance(stock, exact) + scale
            self.limits.append(limit)

    def refusal(self, result: Any) -> str | None:
        """Why the result is not trusted; None where it is."""
        for found, exact, limit in zip(_outputs(result), self.exact, self.limits, strict=True):
            if found.shape != exact.shape:
                return f"its result is {tuple(found.shape)}, not {tuple(exact.shape)}"
            if exact.is_floating_point():
                error = _distance(found, exact)
            else:  # near ties may point elsewhere, but at as large a value
                error, limit = _distance(self._pointed_at(found), self.exact[0]), self.limits[0]
            if not error <= limit:
                return f"its result is off by {error:.3g}, and {limit:.3g} is allowed"
        return None

    def _pointed_at(self, offsets: Tensor) -> Tensor:
        """The values of the pooled map that saved offsets name."""
        from fastalex import reference
        from fastalex.reference.max_pool import offsets_to_indices

        map, dilation = self.wide[0], (1, 1)
        if self.op == "max_pool":
            kernel, stride, padding, dilation = self.args[1:5]
        else:
            map = reference.lrn(map, *self.args[1:6])
            kernel, stride, padding = self.args[6:9]
        size = map.shape[-2:]
        indices = offsets_to_indices(offsets, size, kernel, stride, padding, dilation)
        indices = indices.clamp(0, size[0] * size[1] - 1).flatten(2)
        return map.flatten(2).gather(2, indices).view(offsets.shape)


def _distance(found: Tensor, exact: Tensor) -> float:
    """The largest error; infinite where one is NaN and the other is not."""
    if not found.numel():
        return 0.0
    found = found.double()
    same = (found == exact) | (found.isnan() & exact.isnan())
    return (found - exact).abs().nan_to_num(math.inf).masked_fill_(same, 0).max().item()


def _attempt(
    kernel: Any, args: Sequence[Any], options: Mapping[str, Any], judge: Judge, time: Timer
) -> Trial:
    choice = Choice(kernel.backend, options)

    def run() -> Any:
        return kernel.run(*args, **options)

    try:
        refusal = judge.refusal(run())
        return Trial(choice, refusal=refusal) if refusal else Trial(choice, time(run))
    except Exception as error:  # too many resources, or a tile this GPU's compiler rejects
        return Trial(choice, refusal=f"it doesn't run: {error}")


def _attempts(kernel: Any, args: Sequence[Any], judge: Judge, time: Timer) -> Iterator[Trial]:
    """Each option's configurations in turn, the best so far of the others held."""
    candidates = kernel.candidates(*args) if kernel.candidates else {}
    if not candidates:
        yield _attempt(kernel, args, {}, judge, time)
    held: Mapping[str, Any] = {}
    for option, configs in candidates.items():
        trials = [
            _attempt(kernel, args, {**held, option: config}, judge, time) for config in configs
        ]
        yield from trials
        held = min(trials, key=lambda trial: trial.milliseconds).choice.options


def measure(table: Any, args: Sequence[Any], time: Timer | None = None) -> list[Trial]:
    """Times every backend that can serve the call and stock torch, and records the fastest right one.

    Args:
        table: the operator's :class:`fastalex.backends.KernelTable`.
        args: the operator's arguments, whose values are not used.
        time: gives the milliseconds of a call; by default measured.

    Returns:
        A trial for stock torch, then for each configuration: its time, or why it was not trusted.
    """
    time = time or milliseconds
    fresh = random_arguments(args)
    (stock,) = (kernel for kernel in table.kernels if kernel.backend == "torch")
    judge = Judge(table.op, stock.run, fresh)
    trials = [Trial(Choice("torch"), time(lambda: stock.run(*fresh)))]
    for kernel in table.kernels:
        if kernel is not stock and kernel.refuse(*args) is None:
            trials += _attempts(kernel, fresh, judge, time)
    record(table.op, args, min(trials, key=lambda trial: trial.milliseconds).choice)
    return trials


def settle(table: Any, args: Sequence[Any]) -> None:
    """Measures a call that nobody measured yet, unless a graph is being captured or the user said no."""
    if not enabled() or recorded(table.op, args) is not None:
        return
    if all(kernel.backend in ("cpu", "torch") for kernel in table.kernels):
        return  # nothing to choose from on a GPU
    if args[0].is_cuda and torch.cuda.is_current_stream_capturing():
        return
    key = _quick_key(table.op, args)
    if key in _unmeasurable:
        return
    try:
        measure(table, args)
    except RuntimeError as error:  # no memory left for float64: the call itself must still run
        _unmeasurable.add(key)
        warnings.warn(f"{table.op} was not measured on this GPU: {error}", stacklevel=2)
