"""Shared by file and session reports: a layer's row, and Markdown tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# Rows of a table; the plotted report shows all layers.
MOST_ROWS = 40


@dataclass(frozen=True)
class Row:
    """One layer.

    Attributes:
        name: name of the layer.
        kind: "Linear" or "Conv2d".
        action: "quantize", "keep" or "skip"; for a session: what hswq would do.
        reason: one phrase.
        nbytes: bytes of its weight as stored.
        measure: cost of having it in 8 bits, in the report's unit; None: not measured.
        sqnr_db: SQNR of the quantized weight; None: not quantized, exact, or unknown.
        level: mean |input|; None: unknown.
    """

    name: str
    kind: str
    action: str
    reason: str
    nbytes: int
    measure: float | None = None
    sqnr_db: float | None = None
    level: float | None = None


def megabytes(nbytes: float) -> str:
    """Formatted in units of 2^20 bytes."""
    size = nbytes / 2**20
    return f"{size:,.0f} MB" if size >= 100 else f"{size:.1f} MB"


def markdown(title: str, facts: Sequence[str], columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A heading, a list of facts, and a table of at most ``MOST_ROWS`` rows."""
    lines = [f"## {_plain(title)}", "", *(f"- {_plain(fact)}" for fact in facts), ""]
    lines += [_line(columns), "|" + "---|" * len(columns), *map(_line, rows[:MOST_ROWS])]
    if len(rows) > MOST_ROWS:
        lines += ["", f"... and {len(rows) - MOST_ROWS} more"]
    return "\n".join(lines)


def _line(cells: Sequence[object]) -> str:
    return "| " + " | ".join(_cell(cell) for cell in cells) + " |"


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else _plain(str(value))


def _plain(text: str) -> str:
    """Escaped to one line of plain Markdown text: names come from untrusted files."""
    text = " ".join(text.split())
    return "".join(f"\\{letter}" if letter in "\\`*|<>[]#" else letter for letter in text)
