"""What mkdocs lacks for these files: pages from outside docs/, links to lines of code, Sphinx's roles in docstrings."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

import griffe
from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
#: Pages that lie at the repository's root, where its hosts look for them.
FRONT = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
_LINK = re.compile(r"\]\((?!\w+:|#)(?P<path>[^)#\s]+)(?:#L(?P<line>\d+))?")
_LINE = re.compile(r'<a id="(__codelineno-0-\d+)"')
_ROLE = re.compile(r":(?:func|class|meth|mod|attr|exc|data):(?=`)")
_MATH = re.compile(r"^ *\.\. math:: (.*)$", re.MULTILINE)
_INLINE_MATH = re.compile(r":math:`([^`]*)`")


def _in_repository(page: str) -> str:
    """The file that a page is made of."""
    origins = {target: origin for origin, target in FRONT.items()}
    return origins.get(page, f"docs/{page}")


def _on_site(path: str) -> str:
    """The site's file for one of the repository: what isn't a page or a picture gets a page that shows it."""
    if path in FRONT:
        return FRONT[path]
    return path.removeprefix("docs/") if path.startswith("docs/") else f"source/{path}.md"


def _target(page: str, link: str) -> str:
    """What a link in a page points at, as a path in the repository."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(_in_repository(page)), link))


def on_files(files: Files, config: Any) -> Files:
    """Adds the front pages, and a page for each source file that some page links to."""
    for origin, page in FRONT.items():
        files.append(File.generated(config, page, content=(ROOT / origin).read_text()))
    linked = {
        _target(file.src_uri, match["path"])
        for file in files.documentation_pages()
        for match in _LINK.finditer(file.content_string)
    }
    for path in sorted(linked):
        page = _on_site(path)
        if page.startswith("source/") and (ROOT / path).is_file():
            language = {".py": "python", ".cpp": "cpp", ".h": "cpp"}.get(Path(path).suffix, "text")
            text = (ROOT / path).read_text()
            content = f'# {path}\n\n````{language} linenums="1"\n{text}````\n'
            files.append(File.generated(config, page, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links between the repository's files become links between the site's."""
    here = page.file.src_uri
    if here.startswith("source/"):
        return markdown

    def relink(match: re.Match[str]) -> str:
        place = posixpath.relpath(_on_site(_target(here, match["path"])), posixpath.dirname(here))
        return f"]({place}" + (f"#__codelineno-0-{match['line']}" if match["line"] else "")

    return _LINK.sub(relink, markdown)


def on_page_content(html: str, page: Any, **_: Any) -> str:
    """Tells mkdocs, which checks the links, of the lines' anchors: the highlighter keeps its output from it."""
    page.present_anchor_ids |= set(_LINE.findall(html))
    return html


class SphinxMarkup(griffe.Extension):
    """Docstrings use Sphinx's roles, which torch's readers know; the site's are written in Markdown."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            text = _MATH.sub(lambda m: convert(m[1], display="block"), obj.docstring.value)
            text = _INLINE_MATH.sub(lambda m: convert(m[1]), text)
            obj.docstring.value = _ROLE.sub("", text)
