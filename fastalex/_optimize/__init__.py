"""``fastalex.optimize``: puts fastalex's operators into a model that somebody else wrote."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fastalex._optimize import layout, match, measure, swap
from fastalex._optimize.report import Entry, Report
from fastalex._optimize.trace import Trace, Untraceable, trace
from fastalex.models._layers import TowerLocalResponseNorm

__all__ = ["Report", "optimize"]

#: Wrappers whose forward belongs to torch; the model inside is what is optimised.
_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)

#: Layers that have an operator with nothing around them.
_ALONE = (nn.MaxPool2d, nn.LocalResponseNorm, TowerLocalResponseNorm)


def optimize(model: nn.Module, example: Any = None) -> Report:
    """Makes ``model`` faster where it stands, and tells what was done.

    Args:
        model: any module; it stays the same object, with the same submodules, parameters and state dict.
        example: an input, or a tuple of inputs. With it every module that got another forward is timed against its
            stock forward on what the example brings to it, in the model's present mode and without gradients, and gets
            it back where that is faster.

    Returns:
        The report: ``print`` it; ``restore()`` undoes everything.

    Raises:
        TypeError: for anything but a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"optimize: model must be a torch.nn.Module, got {type(model).__name__}")
    optimizer = _Optimizer(model)
    optimizer.run()
    if example is not None:
        optimizer.keep_what_is_faster(example if isinstance(example, tuple) else (example,))
    return optimizer.report


class _Optimizer:
    """One walk over a model."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.report = Report(model)
        self.graphs: dict[nn.Module, dict[swap.Key, Trace]] = {}
        self.owners: dict[int, nn.Module] = {}  # whose forward an entry is in
        self.steps: set[str] = set()  # names of layers that became part of a step

    def run(self) -> None:
        modules = list(self.model.named_modules())
        for _, module in modules:
            swap.restore(module)
        for name, module in modules:
            self._trace(name, module)
        runs = {
            module: self._match(name, module) for name, module in modules if module in self.graphs
        }
        for training in (False, True):
            self._lay_out(training, runs)
        for module, changed in runs.items():
            if changed:
                self._swap(module)
        for name, module in modules:
            if name in self.steps or type(module) not in match.MODULES:
                continue
            if not self._replace_alone(name, module):
                self._keep(name, module)

    def keep_what_is_faster(self, example: tuple[Any, ...]) -> None:
        """Gives modules their stock forward back where it is the faster one, and notes the times."""
        for module, stock, fast in measure.compare(self.model, self.report.modules, example):
            if fast >= stock:
                swap.restore(module)
            for index, entry in enumerate(self.report.entries):
                if self.owners.get(index) is module:
                    slower = {"step": None, "why": "stock is faster"} if fast >= stock else {}
                    times = {"stock_ms": stock * 1e3, "step_ms": fast * 1e3}
                    self.report.entries[index] = replace(entry, **times, **slower)  # type: ignore[arg-type]

    def _lay_out(self, training: bool, runs: dict[nn.Module, bool]) -> None:
        """Lets the largest parts that can work in channels_last, in one mode."""
        graphs = {
            module: [trace.graph for key, trace in traces.items() if key[0] is training]
            for module, traces in self.graphs.items()
        }
        for island in layout.islands(self.model, graphs, training):
            for module in island.modules():
                for graph in graphs.get(module, ()):
                    runs[module] |= layout.without_views(graph)
            for graph in graphs[island]:
                layout.enter_and_leave(graph)
            runs[island] = True

    def _trace(self, name: str, module: nn.Module) -> None:
        """Keeps the graphs of a module that calls others."""
        if not module._modules:
            return
        refusal = _refusal(module)
        if refusal is None:
            try:
                traces = {(mode, False): trace(module, mode) for mode in (False, True)}
                one = next(iter(traces.values()))
                if one.asked_kind and len(one.inputs) == 1:
                    traces |= {(mode, True): trace(module, mode, list) for mode in (False, True)}
                self.graphs[module] = traces
                return
            except Untraceable as failure:
                refusal = str(failure)
        self.report.entries.append(Entry(name or "(model)", type(module).__name__, None, refusal))

    def _match(self, name: str, module: nn.Module) -> bool:
        """Puts steps into the module's graphs; whether there were any."""
        runs: dict[match.Run, None] = {}
        for traced in self.graphs[module].values():
            matcher = match.Matcher(module, traced.graph)
            for found in matcher.matches():
                runs[matcher.run_of(found)] = None
                matcher.apply(found)
        for run in runs:
            paths = [_join(name, part) for part in run.names]
            self.steps.update(paths if module._modules else [name])
            self.owners[len(self.report.entries)] = module
            self.report.entries.append(
                Entry(" + ".join(paths), " + ".join(run.layers), run.step, "")
            )
        return bool(runs)

    def _swap(self, module: nn.Module) -> None:
        traces = self.graphs[module]
        programs = {key: swap.Program.of(traced.graph) for key, traced in traces.items()}
        inputs = len(next(iter(traces.values())).inputs)
        swap.swap(module, swap.Plan.observe(module, programs, inputs))
        self.report.modules.append(module)

    def _replace_alone(self, name: str, module: nn.Module) -> bool:
        """A layer that no traced module calls, and that has an operator by itself."""
        if type(module) not in _ALONE or _refusal(module) is not None:
            return False
        self.graphs[module] = {(mode, False): trace(module, mode) for mode in (False, True)}
        found = self._match(name, module)
        if found:
            self._swap(module)
        return found

    def _keep(self, name: str, module: nn.Module) -> None:
        """Accounts for a layer that is in no step."""
        why = _refusal(module) or "nothing to fuse with"
        self.report.entries.append(Entry(name or "(model)", type(module).__name__, None, why))


def _join(prefix: str, name: str) -> str:
    return ".".join(part for part in (prefix, name) if part)


def _refusal(module: nn.Module) -> str | None:
    """Why a module's forward is not to be touched, whatever it does."""
    if isinstance(module, torch.jit.ScriptModule):
        return "it is scripted: optimize before torch.jit.script"
    if isinstance(module, _WRAPPERS):
        return "it is a wrapper: the model inside was optimised"
    if type(module).__call__ is not nn.Module.__call__:
        return "its class has a __call__ of its own"
    if "forward" in vars(module):
        return "somebody replaced its forward"
    return None
