"""Every command and every code block of the documents does what the text around it says."""

from __future__ import annotations

import re
import sys

import pytest
import torch

from fastalex import _native, models
from fastalex.models.alexnet import PRESETS
from fastalex.ops._operator import REGISTRY
from tests.support import caffemodel, line_links
from tests.support.packaging import ROOT, run

DOCUMENTS = (
    "README.md",
    "CONTRIBUTING.md",
    "docs/design.md",
    "docs/models.md",
    "docs/optimize.md",
    "docs/paper-to-code.md",
)
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
#: Installations that test_install.py carries out.
_INSTALL = re.compile(r"(FASTALEX_BUILD=(cpu|none) )?pip install --no-build-isolation \.")
_MAKE = re.compile(r"(PYTHON=\S+ )?make (?P<target>\S+)")


def blocks(document: str) -> list[tuple[str, str]]:
    """(language, text) of each fenced block."""
    return _BLOCK.findall((ROOT / document).read_text())


def commands(document: str) -> list[str]:
    """The lines of the shell blocks, without their comments."""
    lines = "".join(text for language, text in blocks(document) if language == "sh").splitlines()
    return [line.partition("#")[0].strip() for line in lines if line]


def make_targets() -> set[str]:
    (phony,) = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    return set(phony.split())


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
    assert {"make bench", "make test"} <= set(commands("README.md"))


@pytest.mark.parametrize("document", DOCUMENTS)
def test_shell_commands_exist(document):
    for command in commands(document):
        make = _MAKE.fullmatch(command)
        if make:
            assert make["target"] in make_targets(), command
        elif not _INSTALL.fullmatch(command):
            assert command.startswith("python -m fastalex")
            result = run([sys.executable, *command.split()[1:]], ROOT)
            assert result.code == 0, result.text
            assert f"backend cpu     {_native.isa()} kernels" in result.text


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
