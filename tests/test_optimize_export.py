"""Optimised models under ``torch.compile``, ``torch.export``, AOTInductor and ``torch.onnx.export``."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch._dynamo
from torch import nn

import fastalex
from fastalex import ops
from tests.support import optimized
from tests.support.optimized import MODELS, Residual, chain

NAMES = ("chain", "functional", "residual")
DYNAMIC = ({0: torch.export.Dim("batch", min=1)},)


def prepared(name: str) -> tuple[nn.Module, nn.Module, torch.Tensor, torch.Tensor]:
    """Stock and optimised, and inputs of two batch sizes."""
    build, shape = MODELS[name]
    stock = optimized.with_statistics(build().eval()).requires_grad_(False)
    fast = copy.deepcopy(stock)
    fastalex.optimize(fast)
    return stock, fast, torch.randn(2, *shape), torch.randn(5, *shape)


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Sums of at most a thousand terms of order one, in float32."""
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", NAMES)
def test_compiles_whole_and_once(name, backend):
    stock, fast, x, more = prepared(name)
    torch._dynamo.reset()
    compiled = torch.compile(fast, fullgraph=True, backend=backend)
    close(compiled(x), stock(x))
    with torch._dynamo.config.patch(error_on_recompile=True):
        other = torch.randn_like(x)
        close(compiled(other), stock(other))
    torch._dynamo.reset()
    compiled = torch.compile(fast, fullgraph=True, dynamic=True, backend=backend)
    close(compiled(x), stock(x))
    with torch._dynamo.config.patch(error_on_recompile=True):
        close(compiled(more), stock(more))


@pytest.mark.parametrize("name", NAMES)
def test_trains_compiled(name):
    build, shape = MODELS[name]
    stock, fast = build().double(), None
    fast = copy.deepcopy(stock)
    fastalex.optimize(fast)
    torch._dynamo.reset()
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, *shape, dtype=torch.float64)
    for model in (stock, compiled):
        model(x).square().mean().backward()
    for a, b in zip(stock.parameters(), fast.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, **optimized.EXACT)


@pytest.mark.parametrize("name", NAMES)
def test_exports_with_any_batch(name):
    stock, fast, x, more = prepared(name)
    program = torch.export.export(fast, (x,), dynamic_shapes=DYNAMIC)
    targets = {str(node.target) for node in program.graph.nodes}
    operator = "conv_relu_lrn_max_pool" if name == "chain" else "conv_relu"
    assert f"fastalex.{operator}.default" in targets
    assert (
        program.state_dict.keys()
        == stock.state_dict().keys()
        - {key for key in stock.state_dict() if key.endswith("num_batches_tracked")}
        or program.state_dict.keys() == stock.state_dict().keys()
    )
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    for saved in (program, torch.export.load(buffer)):
        close(saved.module()(more), stock(more))


@pytest.mark.slow
def test_aot_inductor(tmp_path):
    stock, fast, x, _ = prepared("chain")
    program = torch.export.export(fast, (x,))
    package = torch._inductor.aoti_compile_and_package(
        program, package_path=str(tmp_path / "chain.pt2")
    )
    close(torch._inductor.aoti_load_package(package)(x), stock(x))


# --- ONNX ----------------------------------------------------------------------------------------


def to_onnx(model: nn.Module, x: torch.Tensor, path, **options):
    return torch.onnx.export(
        model, (x,), str(path), dynamo=True, dynamic_shapes=DYNAMIC, verbose=False, **options
    )


def run_onnx(path, x: torch.Tensor) -> torch.Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (name,) = (each.name for each in session.get_inputs())
    return torch.from_numpy(session.run(None, {name: x.numpy()})[0])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NAMES)
def test_onnx_has_standard_operators_and_equal_results(name, tmp_path):
    stock, fast, x, more = prepared(name)
    path = tmp_path / "model.onnx"
    program = to_onnx(fast, x, path)
    nodes = list(program.model.graph)
    assert {node.domain for node in nodes} == {""}
    assert not [f for f in program.model.functions if "fastalex" in str(f)]
    types = [node.op_type for node in nodes]
    assert types.count("LRN") == {"chain": 2, "functional": 1, "residual": 0}[name]
    assert {"Conv", "Relu"} <= set(types)
    close(run_onnx(path, x), stock(x))
    close(run_onnx(path, more), stock(more))


@pytest.mark.filterwarnings("ignore")
def test_onnx_lrn_of_towers_even_sizes_and_the_formula_of_the_paper(tmp_path):
    x = torch.randn(2, 8, 9, 9) * 3

    def check(*layers: nn.Module, lrns: int) -> None:
        model = nn.Sequential(*layers).eval()
        program = to_onnx(model, x, tmp_path / "lrn.onnx")
        assert [n.op_type for n in program.model.graph].count("LRN") == lrns
        close(run_onnx(tmp_path / "lrn.onnx", x), model(x))

    lrn = {"alpha": 0.3, "beta": 0.5, "k": 2.0}
    check(ops.LocalResponseNorm(3, groups=2, **lrn), ops.LRNMaxPool2d(5, groups=2, **lrn), lrns=2)
    check(ops.LocalResponseNorm(3, alpha_mode="sum", **lrn), lrns=1)
    check(ops.LocalResponseNorm(4, **lrn), lrns=0)


@pytest.mark.filterwarnings("ignore")
def test_the_older_onnx_exporter(tmp_path):
    stock, fast, x, _ = prepared("chain")
    path = tmp_path / "old.onnx"
    torch.onnx.export(fast, (x,), str(path), dynamo=False)
    close(run_onnx(path, x), stock(x))


def test_nothing_is_left_of_an_export():
    fast = optimized.with_statistics(chain().eval())
    fastalex.optimize(fast)
    model = Residual().eval()
    fastalex.optimize(model)
    x = torch.randn(1, 8, 5, 5)
    program = torch.export.export(model, (x,))
    assert "fastalex" in str(program.graph)
