"""Inference engines to compare with, given ONNX's ``LRN`` rather than its decomposition."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import fastalex
from benchmarks.cases import Unavailable
from benchmarks.timing import Call
from fastalex.models import AlexNet


def _missing(failure: ImportError) -> Unavailable:
    return Unavailable(f"{failure.name} is not installed: pip install 'fastalex[peers]'")


class _Graph:
    """Collects the nodes of a chain of layers."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []
        self.last = "input"

    def constant(self, name: str, value: Tensor) -> str:
        from onnx import numpy_helper

        self.initializers.append(numpy_helper.from_array(value.detach().numpy(), name))
        return name

    def add(self, op: str, *inputs: str, **attributes: Any) -> None:
        from onnx import helper

        output = f"{op}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, [self.last, *inputs], [output], **attributes))
        self.last = output

    def reshape(self, *shape: int) -> None:
        shape_name = self.constant(f"shape_{len(self.nodes)}", torch.tensor(shape))
        self.add("Reshape", shape_name)

    def layer(self, name: str, module: nn.Module) -> None:
        """One module of the stock network; dropout and identity vanish."""
        if isinstance(module, nn.Conv2d):
            self.add(
                "Conv",
                self.constant(f"{name}.weight", module.weight),
                self.constant(f"{name}.bias", module.bias),
                strides=module.stride,
                pads=module.padding * 2,
                group=module.groups,
            )
        elif isinstance(module, nn.ReLU):
            self.add("Relu")
        elif isinstance(module, nn.LocalResponseNorm):
            self.add("LRN", size=module.size, alpha=module.alpha, beta=module.beta, bias=module.k)
        elif isinstance(module, nn.MaxPool2d):
            self.add("MaxPool", kernel_shape=[3, 3], strides=[2, 2])
        elif isinstance(module, nn.Linear):
            weight = self.constant(f"{name}.weight", module.weight)
            self.add("Gemm", weight, self.constant(f"{name}.bias", module.bias), transB=1)


def to_onnx(net: AlexNet, batch: int) -> bytes:
    """The stock network as standard ONNX operators; towers are folded into the batch around LRN."""
    from onnx import TensorProto, helper

    graph = _Graph()
    for name, module in net.features.named_children():
        towers = getattr(module, "groups", 1) if isinstance(module, nn.LocalResponseNorm) else 1
        if towers > 1:
            channels, side = {"norm1": (96, 55), "norm2": (256, 27)}[name]
            graph.reshape(batch * towers, channels // towers, side, side)
        graph.layer(name, module)
        if towers > 1:
            graph.reshape(batch, channels, side, side)
    graph.add("Flatten")
    for name, module in net.classifier.named_children():
        graph.layer(name, module)
    input = helper.make_tensor_value_info("input", TensorProto.FLOAT, (batch, 3, 227, 227))
    output = helper.make_tensor_value_info(graph.last, TensorProto.FLOAT, (batch, 1000))
    whole = helper.make_graph(graph.nodes, "alexnet", [input], [output], graph.initializers)
    model = helper.make_model(whole, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return bytes(model.SerializeToString())


def exported(net: nn.Module, inputs: Sequence[Tensor]) -> bytes:
    """Any network as standard ONNX operators: optimised first, so that its LRN is one of them too."""
    fastalex.optimize(net)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(net, tuple(inputs), dynamo=True, verbose=False)
    assert program is not None
    buffer = io.BytesIO()
    program.save(buffer)
    return buffer.getvalue()


def inference(provider: str, net: AlexNet, images: Tensor, dtype: torch.dtype) -> Call:
    """A call that runs ``net`` on ``images`` in the peer, on as many threads as torch has."""
    try:
        return _ENGINES[provider](to_onnx(net, images.shape[0]), [images], dtype)
    except ImportError as failure:
        raise _missing(failure) from failure


def inference_of(provider: str, net: nn.Module, inputs: Sequence[Tensor]) -> Call:
    """The same of any network, in float32."""
    try:
        return _ENGINES[provider](exported(net, inputs), inputs, torch.float32)
    except ImportError as failure:
        raise _missing(failure) from failure


def _onnxruntime(model: bytes, inputs: Sequence[Tensor], dtype: torch.dtype) -> Call:
    import onnxruntime

    if dtype is not torch.float32:
        raise Unavailable("ONNX Runtime has no bfloat16 convolution on the CPU")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # shares its cores
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    names = (input.name for input in session.get_inputs())
    feed = {name: input.numpy() for name, input in zip(names, inputs, strict=True)}
    return lambda: session.run(None, feed)


def _openvino(model: bytes, inputs: Sequence[Tensor], dtype: torch.dtype) -> Call:
    import openvino

    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": "f32" if dtype is torch.float32 else "bf16",
    }
    core = openvino.Core()
    request = core.compile_model(core.read_model(model), "CPU", settings).create_infer_request()
    feed = {at: input.numpy() for at, input in enumerate(inputs)}
    return lambda: request.infer(feed, share_inputs=True)


_ENGINES = {"onnxruntime": _onnxruntime, "openvino": _openvino}
