"""The documentation site builds without a warning, names the whole public API, and needs no network to be read."""

from __future__ import annotations

import importlib
import inspect
import re
import sys

import pytest

from tests.support.packaging import ROOT, run

PUBLIC = ("fastalex", "fastalex.ops", "fastalex.models", "fastalex.train", "fastalex.reference")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("mkdocs", reason="needs the extra docs")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    result = run(command, ROOT, NO_MKDOCS_2_WARNING="1")
    assert result.code == 0, result.text
    assert "WARNING" not in result.text
    return folder


@pytest.mark.slow
def test_the_site_documents_every_public_name(site):
    page = (site / "api.html").read_text()
    anchors = set(re.findall(r'id="(fastalex[\w.]*)"', page))
    for module in PUBLIC:
        package = importlib.import_module(module)
        for name in package.__all__:
            # A function in a file of its own name is documented as the file's.
            if not inspect.ismodule(getattr(package, name)):
                assert anchors & {f"{module}.{name}", f"{module}.{name}.{name}"}, (module, name)
    assert not re.search(r":(func|class|meth|mod|attr|exc|data|math):|\.\. math", page)
    assert page.count('<math xmlns="http://www.w3.org/1998/Math/MathML" display="block">') == 2


@pytest.mark.slow
def test_links_into_the_source_reach_the_line(site):
    page = (site / "paper-to-code.html").read_text()
    links = re.findall(r'href="(source/[^"#]+)#(__codelineno-0-(\d+))"[^>]*><code>(\w+)<', page)
    assert len(links) > 10
    for target, anchor, line, name in links:
        assert f'id="{anchor}"' in (site / target).read_text()
        source = ROOT / target.removeprefix("source/").removesuffix(".html")
        assert name in source.read_text().splitlines()[int(line) - 1]


@pytest.mark.slow
def test_the_site_loads_nothing_from_elsewhere_and_its_links_have_targets(site):
    pages = list(site.rglob("*.html"))
    assert {"index.html", "contributing.html", "changelog.html"} <= {page.name for page in pages}
    for page in pages:
        text = page.read_text()
        loaded = re.findall(r'\bsrc="([^"]+)"|<link[^>]*? href="([^"]+)"', text)
        assert not [a or b for a, b in loaded if re.match(r"(https?:)?//", a or b)], page
        if page.name == "404.html":
            continue  # its links are from the root of the server
        for link in re.findall(
            r'<(?:a|img|link|script)[^>]*? (?:href|src)="(?!\w+:)([^"#]+)', text
        ):
            assert (page.parent / link).exists(), (page, link)
