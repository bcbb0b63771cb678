"""The tree as a stranger reads it: a reason at the top of every file, short files, and one list of what is public."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from pathlib import Path

import pytest

from tests.support.packaging import ROOT

FOLDERS = ("benchmarks", "csrc", "docs", "fastalex", "kernels", "tests")
SOURCES = sorted(
    path.relative_to(ROOT)
    for folder in FOLDERS
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".py", ".cpp", ".h", ".cu", ".cuh")
)
ABOUT = 440  # lines: "about 400"
LONG = {
    "csrc/cpu/conv/kernels/transforms.h": "written by generate_transforms.py, and by nobody's hand",
}
PUBLIC = ("fastalex", "fastalex.ops", "fastalex.models", "fastalex.train", "fastalex.reference")


def opening(path: Path) -> str:
    """The first line of prose of a file; its docstring's or its comment's."""
    text = (ROOT / path).read_text()
    if path.suffix == ".py":
        return (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]
    first = text.partition("\n")[0]
    return first.removeprefix("//").strip() if first.startswith("//") else ""


@pytest.mark.parametrize("path", [*SOURCES, Path("setup.py")], ids=str)
def test_a_file_says_why_it_exists_and_is_short(path):
    text = (ROOT / path).read_text()
    if path.name == "__init__.py" and not text:
        return  # marks a folder as a package
    assert len(opening(path).split()) >= 3, "no reason in its first line"
    if str(path) not in LONG:
        assert text.count("\n") <= ABOUT, "a second idea has moved in: split it"


def test_few_native_files_know_torch():
    """Those that docs/design.md names."""
    folder = ROOT / "csrc/cpu"
    sources = [path for path in folder.rglob("*") if path.suffix in (".cpp", ".h")]
    knowing = {path for path in sources if "#include <torch/" in path.read_text()}
    named = re.search(r"native library\. (.*) know torch", (ROOT / "docs/design.md").read_text())[1]
    allowed = {path for glob in re.findall(r"`(.*?)`", named) for path in folder.glob(glob)}
    assert knowing <= allowed


@pytest.mark.parametrize("name", ["Makefile", "mkdocs.yml", "MANIFEST.in", "constraints.txt"])
def test_a_file_of_settings_says_why_it_exists(name):
    assert (ROOT / name).read_text().startswith("# ")


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_are_listed_documented_and_typed(name):
    module = importlib.import_module(name)
    listed = module.__all__
    assert sorted(listed) == sorted(set(listed))
    for public in listed:
        value = getattr(module, public)
        if inspect.isclass(value) or inspect.isroutine(value):
            assert value.__doc__, public
        if inspect.isfunction(value):
            parameters = [*inspect.signature(value).parameters.values()]
            assert all(p.annotation is not inspect.Parameter.empty for p in parameters), public
            assert inspect.signature(value).return_annotation is not inspect.Signature.empty


def test_the_page_of_the_api_has_every_public_module():
    page = (ROOT / "docs/api.md").read_text()
    for name in PUBLIC:
        assert f"\n::: {name}\n" in page


def test_nothing_public_is_left_off_the_list():
    """What a package shows without an underscore is in __all__, or a module."""
    for name in PUBLIC:
        module = importlib.import_module(name)
        shown = {
            public
            for public, value in vars(module).items()
            if not public.startswith("_") and not inspect.ismodule(value)
        }
        assert shown - {"annotations"} <= set(module.__all__), name
