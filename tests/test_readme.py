"""Every code block of the documents runs, and prints what they say; links, tables and figures are true."""

from __future__ import annotations

import re

import pytest
import torch

from benchmarks import record
from docs import diagrams
from fastalex import models
from fastalex.models.alexnet import PRESETS
from fastalex.ops._operator import REGISTRY
from tests.support import caffemodel, line_links
from tests.support.packaging import ROOT

#: All pages; the blocks of add-an-operator.md are files, and test_tutorial.py applies them.
DOCUMENTS = (
    "README.md",
    "CONTRIBUTING.md",
    *sorted(f"docs/{path.name}" for path in ROOT.glob("docs/*.md") if "operator" not in path.name),
)
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(document: str) -> list[tuple[str, str]]:
    """(language, text) of each fenced block."""
    return _BLOCK.findall((ROOT / document).read_text())


@pytest.fixture
def folder_of_a_reader(tmp_path, monkeypatch):
    """A folder with the files that docs/models.md reads, which are Caffe's in form and random in content."""
    monkeypatch.chdir(tmp_path)
    source = models.GoogLeNet()
    for name, data in {
        "bvlc_googlenet.caffemodel": caffemodel.of_model(source, source.caffe_name),
        "places205_mean.binaryproto": caffemodel.blob(torch.rand(3, 256, 256), legacy=True),
    }.items():
        (tmp_path / name).write_bytes(data)


@pytest.mark.parametrize("document", DOCUMENTS)
@pytest.mark.usefixtures("folder_of_a_reader")
def test_python_blocks_run_and_print_what_follows_them(document, capsys):
    """The blocks of a document are one session, as a reader would type them."""
    session: dict[str, object] = {}
    for language, text in blocks(document):
        assert language in ("python", "text", "sh")
        if language == "python":
            exec(compile(text, document, "exec"), session)
        elif language == "text":
            assert capsys.readouterr().out == text


def test_the_readme_has_what_the_tests_above_run():
    languages = [language for language, _ in blocks("README.md")]
    assert languages.count("python") >= 3
    assert "text" in languages


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_and_named_files_exist(document):
    text = (ROOT / document).read_text()
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", text)
    named = re.findall(r"`((?:fastalex|csrc|tests|kernels|docs)/[\w/.]*)`", text)
    for path in links:
        assert (ROOT / document).parent.joinpath(path).exists(), path
    for path in named:
        assert (ROOT / path).exists(), path


def test_links_to_definitions_have_their_lines() -> None:
    """Mended by ``python -m tests.support.line_links``."""
    for name in line_links.DOCUMENTS:
        document = ROOT / name
        assert document.read_text() == line_links.corrected(document)


def test_tables_of_figures_are_those_of_the_recorded_rows():
    """Mended by ``python benchmarks/record.py``."""
    results, peers = record.load("results"), record.load("peers")
    for path, text in record.documents(results, peers).items():
        assert path.read_text() == text, path
    plots = record.draw(results, peers)
    assert set(plots) == {"peers.svg", "roofline.svg", "speedup.svg"}
    for (
        name
    ) in plots:  # versions of matplotlib differ in digits: the rows they were drawn from count
        run = peers if name == "peers.svg" else results
        assert f"<desc>rows {run.digest}</desc>" in (record.FIGURES / name).read_text(), name


def test_diagrams_are_those_of_the_script():
    """Mended by ``python docs/diagrams.py``."""
    for name, draw in diagrams.DRAWINGS.items():
        assert (diagrams.FIGURES / f"{name}.svg").read_text() == draw().svg(), name


def test_every_operator_is_counted_and_explained_among_the_kernels():
    text = (ROOT / "docs/kernels.md").read_text()
    counted = set(re.findall(r"costs\.(\w+)\(", text))
    assert counted == set(REGISTRY)


def test_every_picture_is_shown():
    pages = "".join((ROOT / document).read_text() for document in DOCUMENTS)
    for picture in (ROOT / "docs/figures").glob("*.[sp][vn]g"):
        assert f"figures/{picture.name})" in pages, picture.name


def test_backends_table_is_the_registry():
    text = (ROOT / "README.md").read_text()
    (heading,) = re.findall(r"^\| operator \| (.*) \|$", text, re.MULTILINE)
    backends = re.findall(r"`(\w+)`", heading)
    rows = re.findall(r"^\| `(\w+)` \|((?: ✓? ?\|)+)$", text, re.MULTILINE)
    documented = {
        name: {b for b, mark in zip(backends, marks.split("|"), strict=False) if mark.strip()}
        for name, marks in rows
    }
    assert documented == {
        name: {kernel.backend for kernel in operator.kernels.kernels}
        for name, operator in REGISTRY.items()
        if not name.endswith("_backward")
    }


def test_variables_table_has_all_that_the_package_and_its_build_read():
    table = re.findall(r"^\| `(FASTALEX_\w+)` \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    sources = [
        *(ROOT / "fastalex").rglob("*.py"),
        *(ROOT / "kernels").rglob("*.py"),
        ROOT / "setup.py",
    ]
    text = "".join(path.read_text() for path in sources)
    assert set(table) == set(re.findall(r"environ(?:\.get\(|\[)\"(FASTALEX_\w+)\"", text))


def test_presets_have_the_parameters_that_the_documents_count():
    (count,) = re.findall(
        r"two-tower network, ([\d,]+) parameters", (ROOT / "README.md").read_text()
    )
    assert count == f"{parameters('paper'):,}"
    table = (ROOT / "docs/models.md").read_text()
    counted = dict(re.findall(r"^\| `(\w+)` \|.*?\| ([\d,]{5,}) \|", table, re.MULTILINE))
    assert counted == {name: f"{parameters(name):,}" for name in PRESETS}


def parameters(preset: str) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in models.alexnet(preset).parameters())
