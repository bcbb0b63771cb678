"""Every command and every code block of the documents does what the text around it says."""

from __future__ import annotations

import re
import sys

import pytest

from fastalex import _native
from fastalex.ops._operator import REGISTRY
from tests.support.packaging import ROOT, run

DOCUMENTS = ("README.md", "CONTRIBUTING.md", "docs/design.md")
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


@pytest.mark.parametrize("document", DOCUMENTS)
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


def test_backends_table_is_the_registry():
    rows = re.findall(r"^\| `(\w+)` \| (`.*?`) \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    documented = {backend: set(re.findall(r"`(\w+)`", names)) for backend, names in rows}
    registered: dict[str, set[str]] = {}
    for name, operator in REGISTRY.items():
        if not name.endswith("_backward"):
            for kernel in operator.kernels.kernels:
                registered.setdefault(kernel.backend, set()).add(name)
    assert documented == registered


def test_presets_have_the_parameters_that_the_readme_counts():
    from fastalex import models

    (count,) = re.findall(
        r"two-tower network, ([\d,]+) parameters", (ROOT / "README.md").read_text()
    )
    net = models.alexnet("paper")
    assert sum(p.numel() for p in net.parameters()) == int(count.replace(",", ""))
