"""Reads one module's forward as a graph whose nodes are calls of its submodules, or says why it cannot."""

from __future__ import annotations

import copy
import inspect
import operator
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fastalex.models._layers import images


class Untraceable(Exception):
    """The forward does something that a graph would lose; the message says what."""


@dataclass(frozen=True)
class Trace:
    """A forward in one mode (training or not), for arguments of one kind."""

    graph: fx.Graph
    inputs: tuple[str, ...]
    asked_kind: bool  # whether the forward looks at the type of an argument


def required_inputs(module: nn.Module) -> tuple[str, ...]:
    """Names of the arguments that a call must give; Untraceable where there are none or any number."""
    names = []
    for parameter in inspect.signature(module.forward).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise Untraceable("its forward takes any number of arguments")
        if parameter.default is parameter.empty:
            if parameter.kind is parameter.KEYWORD_ONLY:
                raise Untraceable("its forward takes a keyword without a default")
            names.append(parameter.name)
    if not names:
        raise Untraceable("its forward takes no input")
    return tuple(names)


class _Proxy(fx.Proxy):
    """A value of known kind: ``isinstance`` on an argument is answered, on anything else refused."""

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        # torch's own functions may look, fx's among them: they know what a proxy is.
        asker = sys._getframe(1).f_globals.get("__name__", "")
        if asker.partition(".")[0] in ("torch", "fastalex"):
            return fx.Proxy
        tracer: Any = self.tracer
        if self.node.op != "placeholder":
            tracer.refuse(f"it looks at the type of {self.node}")
        tracer.asked_kind = True
        return tracer.kind  # type: ignore[no-any-return]


def _in_place(function: Callable[..., Any]) -> Callable[..., Any]:
    def method(self: _Proxy, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return method


# fx would record `x += y` as `x + y`, and whoever else holds x would miss the change.
for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul"):
    setattr(_Proxy, f"__{_name}__", _in_place(getattr(operator, _name)))


class _Tracer(fx.Tracer):
    """Every submodule is a leaf, so that its hooks and its replacements keep working."""

    def __init__(self, inputs: tuple[str, ...], kind: type) -> None:
        super().__init__(autowrap_functions=(images,))  # it checks sizes, which have no value here
        self.inputs = inputs
        self.kind = kind
        self.asked_kind = False
        self.refusal: str | None = None
        self.modes = _modes()

    def refuse(self, reason: str) -> None:
        # Kept aside as well: the traced code may catch exceptions.
        self.refusal = self.refusal or reason
        raise Untraceable(reason)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def to_bool(self, obj: fx.Proxy) -> bool:
        raise fx.proxy.TraceError("its forward branches on a value, which no graph of it can do")

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        """Required arguments become placeholders, the others keep their defaults."""
        return root_fn, [
            self.root,
            *(self.create_proxy("placeholder", name, (), {}) for name in self.inputs),
        ]

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _modes() != self.modes:
            self.refuse("it switches gradients or autocast on or off")
        return super().create_node(*args, **kwargs)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Tensor) and not isinstance(a, nn.Parameter):
            known = any(a is buffer for buffer in self.root.buffers())
            if not known:
                self.refuse("it makes tensors out of nothing")
        return super().create_arg(a)


def _modes() -> tuple[bool, ...]:
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_enabled("cuda"),
    )


def _state(module: nn.Module) -> dict[str, Any]:
    """What a forward with side effects might change: attributes, and lists and dicts in them."""
    return {
        name: copy.copy(value) if isinstance(value, (list, dict, set)) else value
        for name, value in vars(module).items()
    }


def _same(before: Any, after: Any) -> bool:
    if isinstance(before, (list, dict, set)):
        if type(before) is not type(after) or len(before) != len(after):
            return False
        values = before.values() if isinstance(before, dict) else before
        others = after.values() if isinstance(after, dict) else after
        return all(a is b for a, b in zip(values, others, strict=True))
    return before is after


def trace(module: nn.Module, training: bool, kind: type = Tensor) -> Trace:
    """``module.forward`` as a graph, as it runs in one mode.

    Raises:
        Untraceable: where the forward branches on values, draws random numbers, has side effects, or otherwise does
            what a graph of it would not.
    """
    inputs = required_inputs(module)
    tracer = _Tracer(inputs, kind)
    was_training, before = module.training, _state(module)
    torch_rng, python_rng = torch.get_rng_state(), random.getstate()
    try:
        module.__dict__["training"] = training
        graph = tracer.trace(module)
    except Exception as failure:  # a forward may fail in any way on values that have no value
        reason = str(failure).strip().splitlines() or [type(failure).__name__]
        raise Untraceable(tracer.refusal or reason[0]) from failure
    finally:
        module.__dict__["training"] = was_training
        after = _state(module)
        changed = [n for n in {*before, *after} if not _same(before.get(n), after.get(n))]
        for name in changed:
            _put_back(module, name, before)
        drew = not torch.equal(torch_rng, torch.get_rng_state()) or python_rng != random.getstate()
        torch.set_rng_state(torch_rng)
        random.setstate(python_rng)
    if tracer.refusal or changed or drew:
        raise Untraceable(
            tracer.refusal
            or ("it draws random numbers" if drew else f"it changes its own '{min(changed)}'")
        )
    return Trace(graph, inputs, tracer.asked_kind)


def _put_back(module: nn.Module, name: str, before: dict[str, Any]) -> None:
    if name not in before:
        del module.__dict__[name]
    elif isinstance(before[name], list):
        module.__dict__[name][:] = before[name]
    elif isinstance(before[name], (dict, set)):
        module.__dict__[name].clear()
        module.__dict__[name].update(before[name])
    else:
        module.__dict__[name] = before[name]
