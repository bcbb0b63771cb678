"""Finds, in a traced forward, the runs of layers that one operator does, and puts a step in their place."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fastalex import ops
from fastalex._optimize import steps
from fastalex.models._layers import TowerLocalResponseNorm

#: What a node does, by exact type: a subclass may do something else.
MODULES: dict[type, str] = {
    nn.Conv2d: "conv",
    nn.BatchNorm2d: "norm",
    nn.ReLU: "relu",
    nn.MaxPool2d: "pool",
    nn.LocalResponseNorm: "lrn",
    TowerLocalResponseNorm: "lrn",
    nn.Linear: "linear",
}
FUNCTIONS: dict[Any, str] = {
    F.relu: "relu",
    F.relu_: "relu",
    torch.relu: "relu",
    torch.relu_: "relu",
    F.conv2d: "conv",
    F.linear: "linear",
    F.max_pool2d: "pool",
    torch.max_pool2d: "pool",
    F.local_response_norm: "lrn",
    operator.add: "add",
    operator.iadd: "add",
    torch.add: "add",
    torch.cat: "cat",
    torch.concat: "cat",
}
METHODS = {"relu": "relu", "relu_": "relu", "add": "add", "add_": "add"}


@dataclass(frozen=True)
class Match:
    """Nodes in the order of the computation, and what stands for them."""

    nodes: tuple[fx.Node, ...]
    step: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Run:
    """A replaced run of layers, as the report shows it."""

    names: tuple[str, ...]  # submodules' names, and functions' in brackets
    layers: tuple[str, ...]  # types or functions
    step: str


class Matcher:
    """Works on one graph of one module."""

    def __init__(self, root: nn.Module, graph: fx.Graph) -> None:
        self.root = root
        self.graph = graph
        self.order = {node: place for place, node in enumerate(graph.nodes)}

    def role(self, node: fx.Node) -> str | None:
        if node.op == "call_module":
            simple = len(node.args) == 1 and not node.kwargs and isinstance(node.args[0], fx.Node)
            module = self.root.get_submodule(str(node.target))
            return MODULES.get(type(module)) if simple else None
        if node.op == "call_function":
            return FUNCTIONS.get(node.target)
        if node.op == "call_method":
            return METHODS.get(str(node.target))
        return None

    def next(self, node: fx.Node, *roles: str) -> fx.Node | None:
        """The one user of ``node``, where it has that role and takes ``node`` as its input."""
        if len(node.users) != 1:
            return None
        (user,) = node.users
        takes = bool(user.args) and (user.args[0] is node or "add" in roles)
        return user if takes and self.role(user) in roles else None

    def module(self, node: fx.Node) -> fx.Node:
        """A node whose value is the submodule itself, for a step to call or to look into."""
        with self.graph.inserting_before(node):
            return self.graph.get_attr(str(node.target))

    def relu(self, node: fx.Node | None) -> fx.Node | bool | None:
        if node is None:
            return None
        return self.module(node) if node.op == "call_module" else True

    def matches(self) -> Iterator[Match]:
        """Disjoint matches, the first nodes first; each is to be applied before the next is asked for."""
        for node in list(self.graph.nodes):
            if node not in self.order:  # part of an earlier match
                continue
            role = self.role(node)
            find = getattr(self, f"_{role}", None) if role else None
            match = find(node) if find else None
            if match is not None:
                yield match

    def _conv(self, conv: fx.Node) -> Match | None:
        if conv.op == "call_function":
            relu = self.next(conv, "relu")
            return self._function((conv, relu), ops.conv2d_relu) if relu else None
        norm = self.next(conv, "norm")
        last = norm or conv
        add = self.next(last, "add")
        other = self._other(add, last) if add else None
        if add is not None and other is not None:
            relu = self.next(add, "relu")
            nodes = tuple(n for n in (conv, norm, add, relu) if n is not None)
            if relu is not None and self._may_move(nodes):
                args = (conv.args[0], other, self.module(conv))
                return Match(nodes, steps.convolution_add, args, self._rest(norm, relu))
        relu = self.next(last, "relu")
        pooled = self._conv_max_pool(conv, relu) if relu is not None and norm is None else None
        if pooled is not None:
            return pooled
        nodes = tuple(n for n in (conv, norm, relu) if n is not None)
        if not self._may_move(nodes):
            return None
        return Match(
            nodes, steps.convolution, (conv.args[0], self.module(conv)), self._rest(norm, relu)
        )

    def _norm(self, norm: fx.Node) -> Match | None:
        """A normalisation that follows no convolution, before one."""
        relu = self.next(norm, "relu")
        conv = self.next(relu or norm, "conv")
        if conv is None or conv.op != "call_module":
            return None
        after = self.next(conv, "norm")
        after_relu = self.next(after or conv, "relu")
        cat = self._concatenation(norm.args[0])
        nodes = tuple(n for n in (cat, norm, relu, conv, after, after_relu) if n is not None)
        if not self._may_move(nodes):
            return None
        inputs = [norm.args[0]] if cat is None else cat.args[0]
        args = (inputs, self.module(norm), self.relu(relu), self.module(conv))
        after_args = (after and self.module(after), self.relu(after_relu))
        return Match(nodes, steps.normalized_convolution, (*args, *after_args), {})

    def _concatenation(self, node: Any) -> fx.Node | None:
        """``node``, where it concatenates channels for one user."""
        if not isinstance(node, fx.Node) or self.role(node) != "cat" or len(node.users) != 1:
            return None
        positional = len(node.args) == 2 and node.args[1] == 1 and not node.kwargs
        named = len(node.args) == 1 and node.kwargs == {"dim": 1}
        return node if positional or named else None

    def _conv_max_pool(self, conv: fx.Node, relu: fx.Node) -> Match | None:
        norm = self.next(relu, "lrn")
        pool = self.next(norm or relu, "pool")
        nodes = tuple(n for n in (conv, relu, norm, pool) if n is not None)
        functions = any(n.op != "call_module" for n in (norm, pool) if n is not None)
        if pool is None or functions or not self._may_move(nodes):
            return None
        args = (conv.args[0], self.module(conv), self.relu(relu), norm and self.module(norm))
        return Match(nodes, steps.convolution_max_pool, (*args, self.module(pool)), {})

    def _rest(self, norm: fx.Node | None, relu: fx.Node | None) -> dict[str, Any]:
        rest = {"norm": norm and self.module(norm), "relu": self.relu(relu)}
        return {name: value for name, value in rest.items() if value is not None}

    def _other(self, add: fx.Node, value: fx.Node) -> fx.Node | None:
        """What is added to ``value``, where that is another node and nothing is scaled."""
        if len(add.args) != 2 or add.kwargs:
            return None
        first, second = add.args
        other = second if first is value else first
        return other if isinstance(other, fx.Node) and other is not value else None

    def _linear(self, linear: fx.Node) -> Match | None:
        relu = self.next(linear, "relu")
        if relu is None or linear.op != "call_module" or not self._may_move((linear, relu)):
            return None
        args = (linear.args[0], self.module(linear), self.relu(relu))
        return Match((linear, relu), steps.linear, args, {})

    def _lrn(self, norm: fx.Node) -> Match | None:
        pool = self.next(norm, "pool")
        if norm.op == "call_function":
            return self._function((norm,), ops.local_response_norm)
        if pool is not None and pool.op == "call_module" and self._may_move((norm, pool)):
            args = (norm.args[0], self.module(norm), self.module(pool))
            return Match((norm, pool), steps.lrn_max_pool, args, {})
        return Match((norm,), steps.lrn, (norm.args[0], self.module(norm)), {})

    def _pool(self, pool: fx.Node) -> Match | None:
        if pool.op == "call_function":
            return self._function((pool,), ops.max_pool2d)
        return Match((pool,), steps.max_pool, (pool.args[0], self.module(pool)), {})

    def _relu(self, relu: fx.Node) -> Match | None:
        pool = self.next(relu, "pool")
        if pool is None or pool.op != "call_module" or self._others_see_it(relu):
            return None
        args = (relu.args[0], self.relu(relu), self.module(pool))
        return Match((relu, pool), steps.relu_max_pool, args, {})

    def _others_see_it(self, relu: fx.Node) -> bool:
        """Whether the ReLU works in place on what others read as well: they are to find it rectified."""
        source = relu.args[0]
        fresh = (
            isinstance(source, fx.Node) and len(source.users) == 1 and source.op != "placeholder"
        )
        return _changes_arguments(self.root, relu) and not fresh

    def _function(self, nodes: tuple[fx.Node, ...], target: Callable[..., Any]) -> Match | None:
        """A function replaced by one of the same signature."""
        first = nodes[0]
        if not self._may_move(nodes):
            return None
        kwargs = {k: v for k, v in first.kwargs.items() if k != "return_indices"}
        if first.kwargs.get("return_indices"):
            return None
        return Match(nodes, target, first.args, kwargs)

    def _may_move(self, nodes: tuple[fx.Node, ...]) -> bool:
        """Whether the first nodes can run where the last does: nothing between may change what they read."""
        read = {node for first in nodes[:-1] for node in first.all_input_nodes} - set(nodes)
        low, high = self.order[nodes[0]], self.order[nodes[-1]]
        for node, place in self.order.items():
            if low < place < high and node not in nodes:
                opaque = node.op == "call_module" and bool(read & set(node.all_input_nodes))
                if opaque or _changes_arguments(self.root, node):
                    return False
        return True

    def apply(self, match: Match) -> None:
        last = match.nodes[-1]
        with self.graph.inserting_before(last):
            new = self.graph.call_function(match.step, match.args, match.kwargs)
        last.replace_all_uses_with(new)
        self.order[new] = self.order[last]
        for node in reversed(match.nodes):
            self.graph.erase_node(node)
            del self.order[node]

    def run_of(self, match: Match) -> Run:
        return Run(
            tuple(
                str(n.target) if n.op == "call_module" else f"({self.layer(n)})"
                for n in match.nodes
            ),
            tuple(self.layer(node) for node in match.nodes),
            match.step.__name__,
        )

    def layer(self, node: fx.Node) -> str:
        if node.op == "call_module":
            return type(self.root.get_submodule(str(node.target))).__name__
        return getattr(node.target, "__name__", str(node.target))


def _changes_arguments(root: nn.Module, node: fx.Node) -> bool:
    """Whether a call that shows what it does writes to its arguments."""
    if node.op == "call_module":
        return bool(getattr(root.get_submodule(str(node.target)), "inplace", False))
    if node.kwargs.get("inplace"):
        return True
    if node.op == "call_method":
        return str(node.target).endswith("_")
    name = getattr(node.target, "__name__", "")
    return name.endswith("_") or (
        name.startswith("i") and getattr(operator, name, None) is node.target
    )
