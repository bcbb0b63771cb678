"""docs/add-an-operator.md as instructions: files and insertions to apply to a copy of the tree, and commands."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from tests.support.packaging import ROOT

PAGE = ROOT / "docs/add-an-operator.md"
_STEP = re.compile(
    r"^(?:(?P<new>New file) `(?P<made>[^`]+)`"
    r"|(?P<end>At the end of) `(?P<ended>[^`]+)`"
    r"|In `(?P<path>[^`]+)`, (?P<where>before|after every|after) (?P<tick>`+)(?P<anchor>.+?)(?P=tick)):"
    r"\n\n```\w+\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Step:
    """One block: ``where`` is new, end, before, after or after every; ``anchor`` is a whole line."""

    path: str
    where: str
    anchor: str
    text: str

    def apply(self, tree: Path) -> None:
        """Raises AssertionError where the tree is not what the page says it is."""
        target = tree / self.path
        if self.where == "new":
            assert not target.exists(), f"{self.path} is there already"
            target.write_text(self.text)
            return
        before = target.read_text()
        if self.where == "end":
            target.write_text(before + self.text)
            return
        line = self.anchor + "\n"
        found = re.findall(f"^{re.escape(line)}", before, re.MULTILINE)
        wanted = len(found) >= 2 if self.where == "after every" else len(found) == 1
        assert wanted, f"{self.path} has {len(found)} lines {self.anchor!r}"
        replaced = self.text + line if self.where == "before" else line + self.text
        pattern = re.compile(f"^{re.escape(line)}", re.MULTILINE)
        target.write_text(pattern.sub(lambda match: replaced, before))


def steps() -> list[Step]:
    found = []
    for match in _STEP.finditer(PAGE.read_text()):
        where = "new" if match["new"] else "end" if match["end"] else match["where"]
        path = match["made"] or match["ended"] or match["path"]
        found.append(Step(path, where, match["anchor"] or "", match["text"]))
    return found


def commands() -> list[list[str]]:
    """The lines of each shell block."""
    blocks = re.findall(r"^```sh\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    return [block.splitlines() for block in blocks]
