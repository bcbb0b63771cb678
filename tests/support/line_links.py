"""``python -m tests.support.line_links``: points the links of the documents at the lines where their names are defined.

A link is written [`name`](../path/to/file.py#L12); a test asks that running this changes nothing.
"""

from __future__ import annotations

import re
from pathlib import Path

from tests.support.packaging import ROOT

DOCUMENTS = ("docs/paper-to-code.md",)
_LINK = re.compile(r"\[`(?P<name>\w+)`\]\((?P<path>[^)#]+)#L(?P<line>\d+)\)")


def line_of(name: str, path: Path) -> int:
    """Where a class, a function or a constant is defined."""
    definition = re.compile(rf"^(\s*(def|class) {name}\b|{name}(: .*)? = )")
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if definition.match(line):
            return number
    raise LookupError(f"{path.relative_to(ROOT)} defines no {name}")


def corrected(document: Path) -> str:
    """The document's text with every line number right."""

    def link(match: re.Match[str]) -> str:
        target = (document.parent / match["path"]).resolve()
        return f"[`{match['name']}`]({match['path']}#L{line_of(match['name'], target)})"

    return _LINK.sub(link, document.read_text())


if __name__ == "__main__":
    for name in DOCUMENTS:
        (ROOT / name).write_text(corrected(ROOT / name))
