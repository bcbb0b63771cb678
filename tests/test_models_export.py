"""Every network through torch.export and torch.onnx.export: standard operators, and equal results."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import nn

from fastalex.models import GoogLeNet, NetworkInNetwork, ZFNet, alexnet
from fastalex.models.alexnet import PRESETS
from tests.support import bounds

#: Narrow fully connected layers: they repeat those of the whole network. ZFNet has no option for it.
SIDES = {"torchvision": 224, "cifar10": 32, "googlenet": 224, "nin": 224, "zfnet": 224}
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    name: functools.partial(alexnet, name, **({} if name == "cifar10" else {"hidden": 16}))
    for name in PRESETS
}
NETWORKS["googlenet"] = GoogLeNet
NETWORKS["nin"] = NetworkInNetwork
NETWORKS["zfnet"] = ZFNet
#: The rest differ from these in what other tests cover.
QUICK = ("paper", "cifar10", "googlenet")
CASES = [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in NETWORKS]
DYNAMIC = ({0: torch.export.Dim("batch", min=1)},)
STANDARD = {
    *("Conv", "Relu", "LRN", "MaxPool", "Gemm", "Reshape", "Flatten", "Concat", "Pad"),
    *("GlobalAveragePool", "ReduceMean", "AveragePool", "BatchNormalization"),
    # Sizes that a dynamic batch has to be asked for.
    *(
        "Shape",
        "Gather",
        "Unsqueeze",
        "Squeeze",
        "Slice",
        "Mul",
        "Div",
        "Cast",
        "Constant",
        "Expand",
    ),
}


def network(name: str) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """In evaluation, and batches of two and of three."""
    torch.manual_seed(2012)
    net = NETWORKS[name]().eval().requires_grad_(False)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2)
    side = SIDES.get(name, 227)
    return net, torch.randn(2, 3, side, side) * 64, torch.randn(3, 3, side, side) * 64


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Two float32 evaluations of sums of up to 9,216 terms in up to 22 layers; errors grow with their root."""
    tolerance = 2 * (22 * 9216) ** 0.5 * bounds.eps(torch.float32)
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("name", CASES)
def test_torch_export(name):
    """One program with fastalex's operators, for any batch."""
    net, x, more = network(name)
    program = torch.export.export(net, (x,), dynamic_shapes=DYNAMIC)
    operators = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert any(operator.startswith("fastalex.conv_relu") for operator in operators)
    assert not any(
        "local_response" in operator or "avg_pool3d" in operator for operator in operators
    )
    assert_close(program.module()(x), net(x))
    assert_close(program.module()(more), net(more))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_onnx(name, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    net, x, more = network(name)
    path = tmp_path / "net.onnx"
    program = torch.onnx.export(
        net, (x,), str(path), dynamo=True, dynamic_shapes=DYNAMIC, verbose=False
    )
    nodes = list(program.model.graph)
    assert {node.domain for node in nodes} == {""}
    assert {node.op_type for node in nodes} <= STANDARD
    counts = {kind: sum(node.op_type == kind for node in nodes) for kind in ("LRN", "Conv")}
    assert counts["LRN"] == sum(hasattr(m, "alpha") for m in net.modules())
    assert counts["Conv"] == sum(isinstance(m, nn.Conv2d) for m in net.modules()) - (
        2 if name == "googlenet" else 0  # the auxiliary heads
    )
    for node in nodes:
        if node.op_type == "LRN":  # ONNX divides alpha by the size, as torch does
            assert node.attributes["alpha"].as_float() == pytest.approx(
                1e-3 if name == "cifar10" else 1e-4
            )
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (input,) = session.get_inputs()
    for batch in (x, more):
        (found,) = session.run(None, {input.name: batch.numpy()})
        assert_close(torch.from_numpy(found), net(batch))
