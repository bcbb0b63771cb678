"""Measures the configurations a call can choose from, once, and remembers the fastest right one on
disk.

The memory is a JSON file, $FASTALEX_CACHE_DIR/triton.json (by default in ~/.cache/fastalex). A key
names the call (operator, shapes, strides, types, geometry) and what the answer depends on (device,
Triton, the kernels' own source), so a stale entry is never read. Nothing is measured unless `tune`
is called.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import triton

from ._configs import ConvTile, Launch

VERSION = 1
KINDS = {kind.__name__: kind for kind in (ConvTile, Launch)}
Config = ConvTile | Launch


@dataclasses.dataclass(frozen=True)
class Trial:
    """One configuration's outcome: its time, or why it was not trusted."""

    config: Config
    milliseconds: float | None
    refusal: str | None = None


def cache_file() -> Path:
    folder = os.environ.get("FASTALEX_CACHE_DIR")
    return (Path(folder) if folder else Path.home() / ".cache" / "fastalex") / "triton.json"


@functools.cache
def environment(device: torch.device) -> str:
    """What an answer depends on beside the call: device, compiler, kernels."""
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    cuda = device.type == "cuda" and torch.cuda.is_available()  # a fake tensor needs no GPU
    name = torch.cuda.get_device_name(device) if cuda else device.type
    return f"{name}, triton {triton.__version__}, kernels {digest.hexdigest()[:16]}"


def signature(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return (
            f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}/{list(value.stride())}"
        )
    if isinstance(value, (tuple, list)):
        return f"[{','.join(map(signature, value))}]"
    return repr(value)


def call_key(operator: str, option: str, arguments: Sequence[Any]) -> str:
    """A call's name in the file, e.g. "conv_relu tile float16[1,3,..]/[..] ... on NVIDIA H100,
    triton 3.8.0, ...".
    """
    device = next(a.device for a in arguments if isinstance(a, torch.Tensor))
    return f"{operator} {option} {' '.join(map(signature, arguments))} on {environment(device)}"


def load(path: Path) -> dict[str, Config]:
    """The file's entries; none, with a warning, where it isn't one of ours or is damaged."""
    try:
        content = json.loads(path.read_text())
        if content["version"] != VERSION:
            return {}
        return {key: KINDS[kind](**fields) for key, (kind, fields) in content["entries"].items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        warnings.warn(
            f"{path} is ignored, as it can't be read: {error!r}; delete it to be rid of this",
            stacklevel=2,
        )
        return {}


def save(path: Path, entries: dict[str, Config]) -> None:
    """Replaces the file in one step, so that another process reads the old or the new one and
    nothing between.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    plain = {
        key: (type(config).__name__, dataclasses.asdict(config))
        for key, config in sorted(entries.items())
    }
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "w") as file:
            json.dump({"version": VERSION, "entries": plain}, file, indent=1)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


@functools.cache
def memory() -> dict[str, Config]:
    """The file's entries, read once a process."""
    return load(cache_file())


def remembered(operator: str, option: str, arguments: Sequence[Any]) -> Config | None:
    """The configuration found fastest for this call, if it was ever tuned."""
    entries = memory()
    return entries.get(call_key(operator, option, arguments)) if entries else None


def tune(
    operator: Callable[..., Any],
    option: str,
    arguments: Sequence[Any],
    candidates: Sequence[Config],
    agrees: Callable[[Any], bool],
    stock: Callable[[], Any] | None,
    time: Callable[[Callable[[], Any]], float] = triton.testing.do_bench,
) -> list[Trial]:
    """Runs operator(*arguments, option=candidate) for each candidate, remembers the fastest whose
    result agrees; given the stock call it stands in for, only if it is faster than that. A
    convolution with a record is preferred to cuDNN: give its stock call.

    A candidate that fails to compile or launch, or whose result is wrong, is never chosen: the
    trial says why.
    """
    trials = [attempt(operator, option, arguments, config, agrees, time) for config in candidates]
    trusted = [t for t in trials if t.milliseconds is not None]
    fastest = min(trusted, key=lambda t: t.milliseconds or 0.0, default=None)
    if fastest is not None:
        key = call_key(operator.__name__, option, arguments)
        wins = stock is None or (fastest.milliseconds or 0.0) < time(stock)
        path, entries = cache_file(), memory()
        if wins:
            entries[key] = fastest.config
        else:
            entries.pop(key, None)
        kept = {name: config for name, config in load(path).items() if name != key}
        save(path, {**kept, **entries})
    return trials


def attempt(operator, option: str, arguments: Sequence[Any], config: Config, agrees, time) -> Trial:
    def run() -> Any:
        return operator(*arguments, **{option: config})

    try:
        if not agrees(run()):
            return Trial(config, None, "its result differs from the reference")
        return Trial(config, time(run))
    except (
        RuntimeError,
        triton.TritonError,
    ) as error:  # too many resources, or a tile this GPU's compiler rejects
        return Trial(config, None, f"it doesn't run: {error}")
