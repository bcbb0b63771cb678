"""Makes runs the ones that the documents show: ``python benchmarks/record.py out/results.json [out/peers.json]``.

Keeps the rows as docs/figures/*.json, and writes from them the tables between the marks of README.md and of
documents in docs, and the plots in docs/figures. A test asks that the documents are what the rows kept there give.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

from benchmarks import plots, report  # noqa: E402
from benchmarks.roofline import Roof  # noqa: E402
from benchmarks.runner import Row  # noqa: E402

FIGURES = ROOT / "docs/figures"
#: What a run needs for its place: `results` the default one, `peers` that of other engines.
RUNS = {
    "results": "make bench",
    "peers": "python benchmarks/run.py --cases 'alexnet/infer/f32/*' "
    "--providers eager,compile,fastalex,onnxruntime,openvino --json out/peers.json",
}

#: What docs/paper-to-code.md shows beside the paper's sections: its network's layers, fastalex against stock.
LAYERS = (
    *(f"conv_relu/fwd/f32/conv{number}-b32-nhwc" for number in range(1, 6)),
    *(
        f"{op}/{kind}/f32/conv1-b32-nhwc"
        for op in ("lrn", "max_pool", "lrn_max_pool")
        for kind in ("fwd", "fwdbwd")
    ),
    "linear_relu/fwd/f32/fc6-b32",
    "augment/fwd/f32/b32",
    "alexnet/infer/f32/b32",
    "alexnet/train/f32/b32",
)
PAIR = ("eager", "fastalex")


@dataclass(frozen=True)
class Run:
    """A recorded run, read back."""

    name: str
    rows: tuple[Row, ...]
    roof: Roof
    environment: dict[str, Any]
    digest: str

    @property
    def providers(self) -> list[str]:
        return list(dict.fromkeys(row.provider for row in self.rows))

    @property
    def provenance(self) -> str:
        """Machine and date, for a reader who sees a figure alone."""
        e = self.environment
        versions = {
            k: v
            for k, v in e["versions"].items()
            if k in (*self.providers, "torch") and k != "fastalex"
        }
        software = ", ".join(f"{name} {version}" for name, version in versions.items())
        return (
            f"{e['cpu']}, {e['threads']} threads, {e['isa']}; {software}; {e['date'][:10]}, "
            f"commit {(e['commit'] or 'unknown')[:7]}"
        )


def load(name: str, folder: Path = FIGURES) -> Run:
    text = (folder / f"{name}.json").read_text()
    document = json.loads(text)
    rates = document["roof"]["flops_per_second"].items()
    roof = Roof(
        document["roof"]["bytes_per_second"], {getattr(torch, kind): rate for kind, rate in rates}
    )
    rows = tuple(Row(**row) for row in document["rows"])
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return Run(name, rows, roof, document["environment"], digest)


def keep(source: Path, name: str, folder: Path = FIGURES) -> None:
    """Without what a figure does not need, a row a line, so that a diff can be read."""
    document = json.loads(source.read_text())
    commit = document["environment"]["commit"]
    if commit is None or commit.endswith("-dirty"):
        raise SystemExit(f"{source} is of a tree with changes ({commit}): commit, and run again")
    parts = [f'"{key}": {json.dumps(document[key])}' for key in ("environment", "roof")]
    rows = ",\n".join(json.dumps(row) for row in document["rows"])
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.json").write_text("{" + ",\n".join(parts) + f',\n"rows": [\n{rows}\n]}}\n')


def table(run: Run, rows: Sequence[Row], notes: bool = False) -> str:
    present = {row.provider for row in rows}
    lines = report.markdown(rows, [name for name in run.providers if name in present])
    text = f"{lines}\n\nMeasured by `{RUNS[run.name]}` on {run.provenance}."
    if notes:
        text += f" {report.legend(run.roof, run.environment)}\n"
        text += "".join(f"\n- {note}" for note in report.notes(rows))
    return text


def blocks(results: Run, peers: Run) -> dict[str, dict[str, str]]:
    """The text between each pair of marks, by document."""
    network = [row for row in results.rows if row.case.startswith("alexnet/")]
    layers = [row for row in results.rows if row.case in LAYERS and row.provider in PAIR]
    link = "Ratios, not times, are comparable: the machine is virtual and drifts."
    return {
        "README.md": {"network": f"{table(results, network)} {link}"},
        "docs/paper-to-code.md": {"layers": table(results, layers)},
        "docs/benchmarks.md": {
            "all": table(results, results.rows, notes=True),
            "peers": table(peers, peers.rows),
        },
    }


def with_blocks(text: str, found: dict[str, str]) -> str:
    for name, block in found.items():
        mark = f"<!-- {name}: written by benchmarks/record.py -->"
        end = f"<!-- {name}: end -->"
        pattern = re.compile(f"{re.escape(mark)}.*?{re.escape(end)}", re.DOTALL)
        text, count = pattern.subn(lambda _: f"{mark}\n{block}\n{end}", text)  # noqa: B023
        if count != 1:
            raise LookupError(f"the document has {count} places {mark}")
    return text


def documents(results: Run, peers: Run) -> dict[Path, str]:
    """Each document as it should be."""
    found = blocks(results, peers)
    return {ROOT / name: with_blocks((ROOT / name).read_text(), found[name]) for name in found}


def stamp(text: str, run: Run) -> str:
    """Says in a plot which rows it was drawn from."""
    return text.replace("</title>", f"</title>\n<desc>rows {run.digest}</desc>", 1)


def draw(results: Run, peers: Run) -> dict[str, str]:
    """Every plot as SVG, by the name of its file."""
    title = "AlexNet, two towers with LRN, inference in float32: milliseconds an image, times as fast as eager"
    figures = {
        "peers": (plots.engines(peers.rows, f"{title}\n{peers.provenance}"), peers, title),
        "speedup": (
            plots.speedup(results.rows, results.provenance),
            results,
            "fastalex and torch.compile against eager torch, every row",
        ),
        "roofline": (
            plots.roofline(results.rows, results.roof, results.provenance),
            results,
            "Operators under the measured roof",
        ),
    }
    return {
        f"{name}.svg": stamp(plots.svg(figure, title), run)
        for name, (figure, run, title) in figures.items()
        if figure is not None
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, nargs="?", help=f"of `{RUNS['results']}`")
    parser.add_argument("peers", type=Path, nargs="?", help=f"of `{RUNS['peers']}`")
    options = parser.parse_args(arguments)
    for name in RUNS:
        if getattr(options, name) is not None:
            keep(getattr(options, name), name)
    results, peers = load("results"), load("peers")
    for path, text in documents(results, peers).items():
        path.write_text(text)
    for name, text in draw(results, peers).items():
        (FIGURES / name).write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
