"""``explain``: which backend a call would run on, and why not the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastalex import ops
from fastalex.ops._operator import REGISTRY

#: The public function of each operator.
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "augment": ops.augment,
    "conv_relu": ops.conv2d_relu,
    "conv_relu_lrn_max_pool": ops.conv2d_relu_lrn_max_pool2d,
    "conv_relu_max_pool": ops.conv2d_relu_max_pool2d,
    "linear_relu": ops.linear_relu,
    "lrn": ops.local_response_norm,
    "lrn_max_pool": ops.lrn_max_pool2d,
    "max_pool": ops.max_pool2d,
}


class _Captured(Exception):
    """Carries an operator's name and arguments out of the call that was about to run it."""


class _Capture(TorchDispatchMode):
    """Ends the call where it reaches a fastalex operator."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "fastalex":
            raise _Captured(func.name().removeprefix("fastalex::"), args)
        return func(*args, **(kwargs or {}))


def explanation(op: str, *args: Any, **kwargs: Any) -> str:
    """The text that :func:`explain` prints."""
    if op not in FUNCTIONS:
        of = {function.__name__: name for name, function in FUNCTIONS.items()}
        hint = f": {op}'s is '{of[op]}'" if op in of else ""
        raise ValueError(f"no operator '{op}'; there are {', '.join(FUNCTIONS)}{hint}")
    try:
        with torch.no_grad(), _Capture():  # type: ignore[no-untyped-call]
            FUNCTIONS[op](*args, **kwargs)
    except _Captured as captured:
        name, arguments = captured.args
        return REGISTRY[name].kernels.explain(*arguments)
    raise AssertionError(f"{op} returned without running its operator")


def explain(op: str, *args: Any, **kwargs: Any) -> None:
    """Prints every backend of an operator: the one that would run this call, and why the others would not.

    Args:
        op: ``"augment"``, ``"conv_relu"``, ``"conv_relu_max_pool"``, ``"conv_relu_lrn_max_pool"``, ``"linear_relu"``,
            ``"lrn"``, ``"max_pool"`` or ``"lrn_max_pool"``.
        args, kwargs: those of its public function in :mod:`fastalex.ops`; a fake tensor will do.

    Raises:
        ValueError: for an unknown operator, and whatever the public function raises for bad arguments.
    """
    print(explanation(op, *args, **kwargs))
