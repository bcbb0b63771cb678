"""The benchmarks themselves: statistics, selection, costs, reports, no timing on a red check."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import re
from html.parser import HTMLParser

import pytest
import torch
from torch import nn

import fastalex
from benchmarks import (
    bench_zoo,
    cases,
    html_report,
    memory,
    parity,
    photos,
    plots,
    record,
    report,
    run,
    runner,
    timing,
)
from benchmarks.roofline import Roof
from fastalex import costs
from fastalex.ops._operator import REGISTRY

CPU = torch.device("cpu")
TINY = "overhead/max_pool"


def test_ratio_is_the_median_of_the_rounds_ratios():
    # The machine halves its speed after the first round; the ratios do not see it.
    samples = {"eager": [10.0, 20.0, 20.0], "fastalex": [4.0, 10.0, 16.0]}
    summary = timing.summarise(samples, "eager")
    assert summary["fastalex"].ratio == 0.5
    assert summary["fastalex"].median == 10.0
    assert summary["eager"].ratio == 1.0


def test_no_ratio_without_the_baseline():
    assert timing.summarise({"fastalex": [1.0, 2.0]}, "eager")["fastalex"].ratio is None


def test_percentiles_interpolate():
    assert timing.percentile([4, 1, 3, 2, 5], 20) == pytest.approx(1.8)
    assert timing.percentile([4, 1, 3, 2, 5], 80) == pytest.approx(4.2)
    assert timing.percentile([7], 80) == 7


def test_interleaving_takes_turns_and_rotates():
    turns: list[str] = []
    calls = {name: lambda name=name: turns.append(name) for name in "abc"}
    samples = timing.interleave(calls, 0.0, CPU)
    assert [len(times) for times in samples.values()] == [timing.FEWEST_ROUNDS] * 3
    runs = [name for i, name in enumerate(turns) if i == 0 or turns[i - 1] != name]
    rotated = ["b", "c", "a"]
    assert any(runs[i : i + 6] == ["a", "b", "c", *rotated] for i in range(len(runs)))


def test_names_are_unique_and_every_operator_has_cases_costs_and_parity():
    known = cases.all_cases()
    names = [case.name for case in known]
    assert len(names) == len(set(names))
    for op in REGISTRY:
        forward = op.removesuffix("_backward")
        assert any(case.subject == forward for case in known), forward
        assert forward in parity.CHECKS
        schema = getattr(torch.ops.fastalex, op).default._schema
        ours = list(inspect.signature(getattr(costs, op)).parameters)
        assert ours == [argument.name for argument in schema.arguments]


def test_selection():
    known = cases.all_cases()
    assert all(not case.full for case in cases.select(known, None, full=False))
    assert len(cases.select(known, None, full=True)) == len(known)
    chosen = cases.select(known, "alexnet/train/*, lrn/fwd/f32/conv1-b32", full=False)
    assert {case.name for case in chosen} == {
        "alexnet/train/f32/b32",
        "alexnet/train/bf16/b32",
        "lrn/fwd/f32/conv1-b32",
    }
    with pytest.raises(ValueError, match="no case matches 'nothing'"):
        cases.select(known, "nothing", full=False)


def test_costs_by_hand():
    x = torch.empty(2, 4, 5, 5, device="meta")  # 200 elements, 800 bytes
    y = torch.empty(2, 4, 2, 2, device="meta")  # 32 elements, 128 bytes
    offsets = torch.empty(2, 4, 2, 2, dtype=torch.uint8, device="meta")
    lrn = (5, 1e-4, 0.75, 2.0, 1)
    pool = ((3, 3), (2, 2), (0, 0))
    assert costs.lrn(x, *lrn) == costs.Cost(1600, 200 * 9)
    assert costs.lrn_backward(x, x, *lrn) == costs.Cost(2400, 200 * 20)
    assert costs.max_pool(x, *pool, (1, 1), False, True) == costs.Cost(800 + 128 + 32, 32 * 8)
    assert costs.max_pool(x, *pool, (1, 1), False, False) == costs.Cost(928, 256)
    expected = costs.Cost(128 + 32 + 800, 32)
    assert costs.max_pool_backward(y, offsets, (5, 5), *pool, (1, 1)) == expected
    assert costs.lrn_max_pool(x, *lrn, *pool, False, True) == costs.Cost(960, 256 + 1800)
    expected = costs.Cost(128 + 32 + 1600, 4000 + 32)
    assert costs.lrn_max_pool_backward(y, x, offsets, *lrn, *pool) == expected


def test_convolution_costs_by_hand():
    x = torch.empty(2, 4, 5, 5, device="meta")
    weight = torch.empty(6, 2, 3, 3, device="meta")  # 108 elements, 18 multiply-adds an output
    bias = torch.empty(6, device="meta")
    out = torch.empty(2, 6, 3, 3, device="meta")  # 108 elements
    geometry = ((2, 2), (1, 1), (1, 1), 2)
    moved = 800 + 432 + 24 + 432
    assert costs.conv_relu(x, weight, bias, *geometry) == costs.Cost(moved, 108 * 38)
    moved = 432 + 432 + 800 + 432 + 800 + 432 + 24
    everything = costs.conv_relu_backward(out, out, x, weight, *geometry, (True, True, True))
    assert everything == costs.Cost(moved, 108 * (1 + 36 + 36 + 1))
    weight_only = costs.conv_relu_backward(out, out, x, weight, *geometry, (False, True, False))
    assert weight_only == costs.Cost(432 * 4 + 800, 108 * 37)


def test_linear_costs_by_hand():
    x = torch.empty(2, 3, 4, device="meta")  # 24 elements, 96 bytes
    weight = torch.empty(5, 4, device="meta")  # 20 elements
    bias = torch.empty(5, device="meta")
    out = torch.empty(2, 3, 5, device="meta")  # 30 elements
    assert costs.linear_relu(x, weight, bias, True) == costs.Cost(96 + 80 + 20 + 120, 30 * 10)
    assert costs.linear_relu(x, weight, None, False) == costs.Cost(96 + 80 + 120, 30 * 8)
    moved = 120 + 120 + 96 * 2 + 80 * 2 + 20
    everything = costs.linear_relu_backward(out, out, x, weight, (True, True, True))
    assert everything == costs.Cost(moved, 30 * (8 + 8 + 1 + 1))
    weight_only = costs.linear_relu_backward(out, None, x, weight, (False, True, False))
    assert weight_only == costs.Cost(120 + 96 + 80, 30 * 8)


def test_half_types_move_half_the_bytes():
    x = torch.empty(1, 4, 5, 5, dtype=torch.bfloat16, device="meta")
    assert costs.lrn(x, 5, 1e-4, 0.75, 2.0, 1).bytes == 2 * 100 * 2


def test_alexnet_costs_add_up():
    case = next(case for case in cases.all_cases() if case.name == "alexnet/infer/f32/b32")
    multiply_adds = 32 * (105_415_200 + 223_948_800 + 149_520_384 + 112_140_288 + 74_760_192)
    multiply_adds += 32 * (9216 * 4096 + 4096 * 4096 + 4096 * 1000)
    flops = sum(cost.flops for cost in case.costs)
    assert 2 * multiply_adds < flops < 2 * multiply_adds * 1.01  # the rest is LRN, pools, biases


def small_network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.ReLU(),
        nn.LocalResponseNorm(5),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(36, 5),
    )


@pytest.mark.parametrize("to_images", [False, True])
def test_a_row_of_the_zoo_has_a_roofline_and_tells_what_was_replaced(to_images):
    network = bench_zoo.Network("zoo/small", small_network, ((2, 3, 8, 8),), to_images)
    case = cases.Case(network.name, network.name, torch.float32, network.prepare, ())
    map = torch.empty(2, 4, 6, 6, device="meta")  # 288 elements, 27 multiply-adds each
    forward = [288 * (2 * 27 + 2), 288 * 9, 72 * 3, 10 * (2 * 36 + 1)]
    backward = [288 * (1 + 2 * 27), costs.lrn_backward(map, map, 5, 1e-4, 0.75, 1.0, 1).flops]
    backward += [72, 10 * 2 * 36]
    both = [flops for pair in zip(forward, backward, strict=True) for flops in pair]
    assert [cost.flops for cost in network.costs()] == (both if to_images else forward)

    roof = Roof(1e10, {torch.float32: 1e11})
    stock, fused = runner.run_case(case, ["eager", "fastalex"], CPU, roof, full=False)
    least = 1e3 * roof.seconds(network.costs(), torch.float32)
    assert fused.pct_roofline == pytest.approx(100 * least / fused.median_ms)
    assert stock.note is None
    (note,) = report.notes([stock, fused])
    assert "1 Conv2d + ReLU + LocalResponseNorm + MaxPool2d -> convolution_max_pool" in note
    assert "kept 1: 1 Linear (zoo/small)" in note


def test_roof_takes_the_slower_of_memory_and_arithmetic():
    roof = Roof(bandwidth=100.0, flops={torch.float32: 10.0})
    assert roof.seconds([costs.Cost(100, 1), costs.Cost(1, 30)], torch.float32) == 1 + 3


def test_photographs_are_varied_and_reproducible():
    images = photos.batch(4)
    assert images.shape == (4, 3, 227, 227)
    assert torch.equal(images, photos.batch.__wrapped__(4))
    assert images.std() > 0.5
    assert not torch.equal(images[0], images[2])


def test_saved_memory_counts_storages_once_and_no_parameters():
    x = torch.randn(1000, requires_grad=True)
    weight = torch.randn(1000, requires_grad=True)
    saved = memory.saved_mib(lambda: (x * weight) * x, [weight])
    assert saved * memory.MIB == 2 * 4000  # x, saved twice, and the product; not the weight


def test_peak_memory_sees_what_is_freed_in_between():
    def call() -> torch.Tensor:
        torch.ones(1 << 20)  # 4 MiB, freed at once
        return torch.ones(1 << 10)

    assert memory.peak_mib(call, CPU) == pytest.approx(4, abs=0.1)


def test_a_nan_or_a_wrong_shape_fails_parity():
    truth = {"output": torch.ones(4, dtype=torch.float64)}
    stock = [{"output": torch.ones(4)}]
    eps = torch.finfo(torch.float32).eps
    for broken in (torch.tensor([1.0, math.nan, 1.0, 1.0]), torch.ones(5), torch.ones(4) * 1.001):
        (check,) = parity.judge("op", truth, stock, [*stock, {"output": broken}], eps)
        assert not check.passed
    (check,) = parity.judge("op", truth, stock, stock, eps)
    assert check.passed


def test_a_broken_kernel_exits_1_and_times_nothing(monkeypatch, capsys, tmp_path):
    healthy = fastalex.ops.max_pool2d
    monkeypatch.setattr(
        fastalex.ops, "max_pool2d", lambda input, *args: healthy(input, *args) * 1.001
    )
    monkeypatch.setattr(timing, "_sample", lambda *args: pytest.fail("timed on a red check"))
    code = run.main(["--cases", TINY, "--providers", "eager,fastalex", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert code == 1
    assert "DIFFERS" in printed
    assert "nothing was timed" in printed
    assert " us" not in printed
    assert " ms" not in printed
    assert not list(tmp_path.iterdir())


def test_a_run_writes_its_json_markdown_and_plot(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(
        run.roofline, "measure", lambda device, dtypes: Roof(1e10, dict.fromkeys(dtypes, 1e11))
    )
    table = tmp_path / "table.md"
    arguments = ["--cases", TINY, "--providers", "eager,fastalex", "--out", str(tmp_path)]
    assert run.main([*arguments, "--device", "cpu", "--markdown", str(table)]) == 0
    document = json.loads((tmp_path / "results.json").read_text())
    assert set(document) == {"environment", "roof", "parity", "rows"}
    keys = {"cpu", "cores", "device", "isa", "threads", "versions", "commit", "date"}
    assert keys <= set(document["environment"])
    assert [row["provider"] for row in document["rows"]] == ["eager", "fastalex"]
    for row in document["rows"]:
        assert row["case"] == TINY
        assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
        assert row["ratio"] > 0
    assert (tmp_path / "speedup.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") == 1
    assert "times as fast as torch eager" in page
    assert document["environment"]["versions"]["torch"] in page
    assert table.read_text().startswith("| case | eager | fastalex |")
    assert TINY in capsys.readouterr().out


class Page(HTMLParser):
    """What a browser would read: the tags with their attributes, and the texts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


HOSTILE = "<script src='http://x.example/a.js'>&\"</script>"


FIGURES = {"Speed-up": plots.svg(lambda pyplot: pyplot.figure(), "Speed-up")}


def page_of(rows: list[runner.Row], figures: dict[str, str]) -> str:
    described = {
        "cpu": HOSTILE,
        "cores": 2,
        "device": "cpu",
        "isa": "avx2",
        "threads": 2,
        "python": "3.11.0",
        "versions": {"torch": "2.14.1", "fastalex": "1.2.3"},
        "commit": None,
        "date": "2026-01-02T03:04:05+00:00",
    }
    roof = Roof(25e9, {torch.float32: 150e9})
    checks = [parity.Check("lrn", "output", 1e-8, 1e-8, 3e-8)]
    return html_report.render(rows, ["eager", "fastalex"], roof, checks, described, figures)


def test_the_html_report_has_every_row_and_its_provenance():
    names = [case.name for case in cases.all_cases()]
    rows = [
        runner.Row(name, provider, median_ms=123.0, ratio=ratio, pct_roofline=50.0)
        for name in names
        for provider, ratio in (("eager", 1.0), ("fastalex", 0.5))
    ]
    page = Page(page_of(rows, FIGURES))
    assert page.open == []
    assert [text for text in page.texts if text in set(names)] == names
    assert [tag for tag, _ in page.tags].count("tr") == 1 + len(names)
    for fact in ("2.14.1", "unknown: not a git checkout", "25.0 GB/s, measured in this run"):
        assert fact in page.texts
    assert "150 GFLOP/s, measured in this run" in page.texts
    assert "1 of 1 quantities within their bounds of float64" in page.texts


def test_the_html_report_loads_nothing_and_escapes_what_it_shows():
    rows = [
        runner.Row(HOSTILE, "eager", median_ms=1.0),
        runner.Row(HOSTILE, "fastalex", note=HOSTILE),
    ]
    text = page_of(rows, FIGURES)
    page = Page(text)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "base", "object"}
    references = [
        attributes[name]
        for _, attributes in page.tags
        for name in attributes
        if name in ("src", "href")
    ]
    assert not references
    assert not re.search(r"@import|url\(", text)
    assert HOSTILE in page.texts  # the case's name, read back whole
    assert "prefers-color-scheme: dark" in text
    assert "width=device-width" in text


def test_the_html_report_says_where_there_is_nothing_to_draw():
    page = Page(page_of([runner.Row("lrn", "eager", median_ms=1.0)] * 2, {}))
    assert "svg" not in {tag for tag, _ in page.tags}
    assert any("nothing to draw" in text for text in page.texts)


def test_a_provider_that_cannot_run_leaves_a_reason(monkeypatch):
    def no_compiler(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no C++ compiler found")

    monkeypatch.setattr("benchmarks.operation.compiled", no_compiler)
    (case,) = cases.select(cases.all_cases(), TINY, full=False)
    rows = runner.run_case(case, ["eager", "compile", "openvino"], CPU, None, full=False)
    assert [row.provider for row in rows] == ["eager", "compile", "openvino"]
    assert rows[1].median_ms is None
    assert rows[1].note == "no C++ compiler found"
    assert "whole networks" in rows[2].note
    assert report.notes(rows)[0].startswith("compile: no C++ compiler found")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--providers", "eager,tensorflow"], "no provider tensorflow; there are eager"),
        (["--device", "tpu"], "invalid choice"),
    ],
)
def test_wrong_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        run.main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_without_a_gpu(capsys):
    with pytest.raises(SystemExit, match="2"):
        run.main(["--device", "cuda"])
    assert "sees no CUDA GPU" in capsys.readouterr().err


def test_an_unknown_case_exits_2(capsys):
    assert run.main(["--cases", "nothing"]) == 2
    assert "no case matches 'nothing'; there are alexnet/infer" in capsys.readouterr().err


def test_plots_of_few_rows_show_the_whole_roof_and_bars_from_one():
    from matplotlib import pyplot

    run = record.load("results")
    few = [row for row in run.rows if row.case.startswith("lrn/fwd/f32/")]
    few = [dataclasses.replace(row, ratio=row.ratio and row.ratio / 20) for row in few]
    (axes,) = plots.roofline(few, run.roof, "")(pyplot).axes
    low, high = axes.get_xlim()
    assert low < run.roof.flops[torch.float32] / run.roof.bandwidth < high
    (axes,) = plots.speedup(few, "")(pyplot).axes
    low, high = axes.get_xlim()
    assert not any("e+" in text.get_text() for text in axes.texts)
    assert low < 1 < min(1 / row.ratio for row in few if row.provider == "fastalex") < high
    pyplot.close("all")
