"""What was replaced and what was kept, and the way back."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from torch import nn

from fastalex._optimize import swap


@dataclass(frozen=True)
class Entry:
    """One line: layers that became one step, or a layer that was kept and why."""

    where: str
    layers: str
    step: str | None
    why: str
    stock_ms: float | None = None
    step_ms: float | None = None


@dataclass
class Report:
    """The result of :func:`fastalex.optimize`: print it, or ``restore()`` the model."""

    model: nn.Module
    entries: list[Entry] = field(default_factory=list)
    modules: list[nn.Module] = field(default_factory=list)

    @property
    def replaced(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.step is not None]

    @property
    def kept(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.step is None]

    def restore(self) -> None:
        """Gives every module its class back, and with it its stock forward; weights stay as they are now."""
        for module in self.modules:
            swap.restore(module)

    def __str__(self) -> str:
        measured = any(entry.stock_ms is not None for entry in self.entries)
        head = ["where", "layers", "now", "why"] + (["stock ms", "ms"] if measured else [])
        lines = [
            [entry.where, entry.layers, entry.step or "kept", entry.why]
            + ([_ms(entry.stock_ms), _ms(entry.step_ms)] if measured else [])
            for entry in self.entries
        ]
        widths = [max(len(line[i]) for line in [head, *lines]) for i in range(len(head))]
        text = "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in [head, ["-" * width for width in widths], *lines]
        )
        return f"{text}\n{self.summary()}"

    def summary(self) -> str:
        """Counts of both kinds, in a line each."""
        replaced = Counter(f"{e.layers} -> {e.step}" for e in self.replaced)
        kept = Counter(e.layers for e in self.kept)
        return "\n".join(
            f"{title} {sum(counts.values())}"
            + "".join(
                f"{':' if i == 0 else ','} {n} {what}"
                for i, (what, n) in enumerate(counts.most_common())
            )
            for title, counts in (("replaced", replaced), ("kept", kept))
        )


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
