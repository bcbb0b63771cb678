"""Gives one instance another forward: a subclass of its class, made for it, that no other instance sees."""

from __future__ import annotations

import copyreg
import functools
import linecache
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.module import _has_any_global_hook

#: Whether the module trains, and whether it got one list instead of tensors.
Key = tuple[bool, bool]


@dataclass(frozen=True)
class Program:
    """Source of one forward and the functions it calls; both survive pickling."""

    source: str
    functions: dict[str, Any]

    @staticmethod
    def of(graph: fx.Graph) -> Program:
        code = graph.python_code("self")
        functions = {
            name: value
            for name, value in code.globals.items()
            if name in code.src and not isinstance(value, ModuleType)
        }
        return Program(code.src, functions)

    def compile(self) -> Callable[..., Any]:
        file = f"<fastalex.optimize {hash(self.source):x}>"
        linecache.cache[file] = (len(self.source), None, self.source.splitlines(True), file)
        scope = {"torch": torch, **self.functions}
        exec(compile(self.source, file, "exec"), scope)
        return scope["forward"]  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Plan:
    """What an instance runs instead of its class's forward, and what that was derived from."""

    programs: dict[Key, Program]
    inputs: int  # tensors a call must give
    counts: dict[str, int]  # children of the module and of its containers
    attributes: dict[str, Any]  # plain ones, which a trace bakes in

    def __deepcopy__(self, memo: Any) -> Plan:
        return self  # nothing in it changes

    def is_baked(self, name: str, value: Any) -> bool:
        """Whether the trace saw another value of the attribute ``name``."""
        if name not in self.attributes:
            return False
        was = self.attributes[name]
        comparable = isinstance(was, (bool, int, float, str, tuple))
        return not (was is value or (comparable and type(was) is type(value) and was == value))

    @staticmethod
    def observe(module: nn.Module, programs: dict[Key, Program], inputs: int) -> Plan:
        counts = {"": _count(module)}
        counts |= {name: _count(module._modules[name]) for name in _containers(module)}
        attributes = {
            name: value
            for name, value in vars(module).items()
            if not name.startswith("_") and name != "training"
        }
        return Plan(programs, inputs, counts, attributes)


def _containers(module: nn.Module) -> list[str]:
    """Lists and dicts of modules directly below, which a forward may walk."""
    return [
        name
        for name, child in module.named_children()
        if isinstance(child, (nn.ModuleList, nn.ModuleDict, nn.Sequential))
    ]


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class the module had before it was optimised."""
    return getattr(type(module), "_fastalex_class", type(module))


def is_swapped(module: nn.Module) -> bool:
    return "_fastalex_class" in vars(type(module))


def swap(module: nn.Module, plan: Plan) -> None:
    """Makes ``module`` run ``plan``; ``restore`` undoes it."""
    module.__class__ = _subclass(original_class(module), plan)


def restore(module: nn.Module) -> None:
    if is_swapped(module):
        module.__class__ = original_class(module)


def _subclass(base: type[nn.Module], plan: Plan) -> type[nn.Module]:
    forwards = {key: program.compile() for key, program in plan.programs.items()}
    own = plan.counts[""]
    inner_counts = tuple((name, count) for name, count in plan.counts.items() if name)

    @functools.wraps(base.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        run = None
        if len(args) == plan.inputs and not kwargs and not _has_any_global_hook():
            tensors = True
            for arg in args:
                tensors = tensors and isinstance(arg, Tensor)
            lists = len(args) == 1 and isinstance(args[0], (list, tuple))
            same = len(self._modules) == own
            for name, count in inner_counts:
                same = same and _count(self._modules[name]) == count
            if same and (tensors or lists):
                run = forwards.get((self.training, lists))
        if run is None:
            return base.forward(self, *args, **kwargs)
        return run(self, *args)

    def __init__(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        # Made anew through type(self), as a slice of a Sequential is: a stock module.
        object.__setattr__(self, "__class__", base)
        base.__init__(self, *args, **kwargs)

    def __setattr__(self: nn.Module, name: str, value: Any) -> None:
        # The forward may depend on it, and so may the trace: the stock forward is right in any case.
        children = vars(self).get("_modules", ())
        lost_child = name in children and not isinstance(value, nn.Module)
        if lost_child or plan.is_baked(name, value):
            object.__setattr__(self, "__class__", base)
        base.__setattr__(self, name, value)

    def __reduce_ex__(self: nn.Module, protocol: Any) -> Any:
        reduced = base.__reduce_ex__(self, protocol)
        if reduced[0] is copyreg.__newobj__:  # type: ignore[attr-defined]
            return (_rebuild, (base, plan), *reduced[2:])
        return reduced

    namespace = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__init__": __init__,
        "__setattr__": __setattr__,
        "__reduce_ex__": __reduce_ex__,
        "forward": forward,
        "_fastalex_class": base,
    }
    return type(base.__name__, (base,), namespace)


def _count(module: nn.Module | None) -> int:
    return -1 if module is None else len(module._modules)


def _rebuild(base: type[nn.Module], plan: Plan) -> nn.Module:
    """An empty instance for a pickle or a copy to fill."""
    module = base.__new__(base)
    module.__class__ = _subclass(base, plan)
    return module
