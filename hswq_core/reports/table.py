"""What reports of files and of sessions share: a layer's row, and tables in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# Rows of a table; a picture shows all layers.
MOST_ROWS = 40


@dataclass(frozen=True)
class Row:
    """One layer, in model order among others.

    Attributes:
        name: of the layer.
        kind: "Linear" or "Conv2d".
        action: "quantize", "keep" or "skip"; of a session: what hswq would do.
        reason: one phrase.
        nbytes: of its weight, as it is stored.
        measure: what it costs to have it in 8 bits, in the report's own unit; None: not measured.
        sqnr_db: of the quantized weight; None: not quantized, exact, or not known.
        level: mean |input|; None: not known.
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
    """In units of 2^20 bytes."""
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
    """One line that no Markdown reader takes for something else: names come from files of strangers."""
    text = " ".join(text.split())
    return "".join(f"\\{letter}" if letter in "\\`*|<>[]#" else letter for letter in text)
