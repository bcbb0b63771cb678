"""Which modules can work in channels_last from their input to their output, without anybody noticing."""

from __future__ import annotations

import functools
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fastalex._optimize import match, steps
from fastalex.models._layers import TowerLocalResponseNorm, images

#: Layers whose result depends on the values alone, and that keep the layout of maps.
LAYERS = (
    nn.Conv2d, nn.BatchNorm2d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d,
    nn.LocalResponseNorm, TowerLocalResponseNorm, nn.Linear, nn.Flatten, nn.Identity, nn.ReLU, nn.ReLU6,
    nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Sigmoid, nn.Tanh, nn.Hardswish, nn.Hardsigmoid, nn.Softmax,
    nn.LogSoftmax, nn.ZeroPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d, nn.Upsample, nn.BatchNorm1d,
)  # fmt: skip
FUNCTIONS = {
    *match.FUNCTIONS, images,
    *(value for value in vars(steps).values() if callable(value)),
    operator.mul, operator.sub, operator.truediv, operator.pow, operator.neg, operator.getitem, operator.floordiv,
    torch.cat, torch.flatten, torch.mul, torch.sub, torch.div, torch.pow, torch.mean, torch.sum, torch.sqrt,
    torch.sigmoid, torch.tanh, torch.chunk, torch.split, torch.clamp, torch.exp, torch.log, torch.abs, getattr,
    F.adaptive_avg_pool2d, F.adaptive_max_pool2d, F.avg_pool2d, F.relu6, F.leaky_relu, F.elu,
    F.gelu, F.silu, F.sigmoid, F.tanh, F.hardswish, F.hardsigmoid, F.softmax, F.log_softmax, F.pad, F.interpolate,
}  # fmt: skip
#: Draws one number for a whole image, in torchvision: the layout does not matter.
DRAWS_BY_IMAGE = "stochastic_depth"
#: Draw a number for each element in the order of memory: in training another layout would drop other elements.
DRAWING_LAYERS = (nn.Dropout, nn.Dropout2d)
DRAWING_FUNCTIONS = {F.dropout, F.dropout2d}
METHODS = {
    *match.METHODS, "size", "dim", "flatten", "mean", "sum", "mul", "sub", "div", "pow", "sqrt", "sigmoid", "tanh",
    "chunk", "split", "clamp", "softmax", "log_softmax", "exp", "abs", "float", "to", "detach", "reshape",
}  # fmt: skip


def keeps_values(graph: fx.Graph, training: bool) -> bool:
    """Whether every function in the graph gives the same values in any layout; views become reshapes."""
    for node in graph.nodes:
        if node.op == "call_function" and not _function_keeps_values(node.target, training):
            return False
        if node.op == "call_method" and node.target not in METHODS:
            source = node.args[0]
            if node.target != "view" or not isinstance(source, fx.Node) or len(source.users) != 1:
                return False
    return True


def _function_keeps_values(function: Any, training: bool) -> bool:
    if function in DRAWING_FUNCTIONS:
        return not training
    return function in FUNCTIONS or getattr(function, "__name__", "") == DRAWS_BY_IMAGE


def without_views(graph: fx.Graph) -> bool:
    """A view of a channels_last map fails where one of a contiguous map doesn't; a reshape copies then."""
    views = [node for node in graph.nodes if node.op == "call_method" and node.target == "view"]
    for node in views:
        node.target = "reshape"
    return bool(views)


def islands(
    module: nn.Module, graphs: dict[nn.Module, list[fx.Graph]], training: bool
) -> list[nn.Module]:
    """The largest modules that can work in channels_last, in this mode, and contain a convolution."""
    if _is_safe(module, graphs, training):
        convolves = any(type(child) is nn.Conv2d for child in module.modules())
        return [module] if convolves and module in graphs else []
    return [found for child in module.children() for found in islands(child, graphs, training)]


def _is_safe(module: nn.Module, graphs: dict[nn.Module, list[fx.Graph]], training: bool) -> bool:
    if _observed(module):
        return False
    if module not in graphs:
        return type(module) in LAYERS or (type(module) in DRAWING_LAYERS and not training)
    return all(keeps_values(graph, training) for graph in graphs[module]) and all(
        _is_safe(child, graphs, training) for child in _called(module, graphs[module])
    )


def _called(module: nn.Module, graphs: list[fx.Graph]) -> list[nn.Module]:
    names = {
        str(node.target)
        for graph in graphs
        for node in graph.nodes
        if node.op in ("call_module", "get_attr")
    }
    found: list[Any] = [functools.reduce(getattr, name.split("."), module) for name in names]
    return [child for child in found if isinstance(child, nn.Module)]


def _observed(module: nn.Module) -> bool:
    """Whether somebody looks at what comes by, and may mind its strides."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def enter_and_leave(graph: fx.Graph) -> None:
    """Takes the maps among the inputs to channels_last, and the results back."""
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    output = next(node for node in graph.nodes if node.op == "output")
    with graph.inserting_after(inputs[-1]):
        entered = {node: graph.call_function(steps.enter, (node,)) for node in inputs}
    for node, inside in entered.items():
        node.replace_all_uses_with(
            inside, delete_user_cb=lambda user, inside=inside: user is not inside
        )
    with graph.inserting_before(output):
        left = graph.call_function(steps.leave, (output.args[0], tuple(inputs)))
    output.args = (left,)
